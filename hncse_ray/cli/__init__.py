"""The command line: ``hncse``, one module a group of commands.

Every expected failure is one message on standard error and exit status 2. With ``--json`` the last line on
standard output is one JSON object, and everything meant for people goes to standard error.
"""

# Importing a module adds its commands, in the order in which `hncse --help` lists them.
from hncse_ray.cli import train, tune, report, mine, evaluate, encode, search, data, publish, submit, settings, doctor  # noqa: I001
from hncse_ray.cli.app import app, run_job

__all__ = [
    "app",
    "data",
    "doctor",
    "encode",
    "evaluate",
    "mine",
    "publish",
    "report",
    "run_job",
    "search",
    "settings",
    "submit",
    "train",
    "tune",
]
