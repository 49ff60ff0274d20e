"""The command line: ``hncse``, one module a group of commands.

Every expected failure is one message on standard error and exit status 2. With ``--json`` the last line on
standard output is one JSON object, and everything meant for people goes to standard error.
"""

import signal
import threading

# Ctrl-C while the commands are imported ends the process and shows no traceback: nothing has begun yet.
_interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
_interruptible &= threading.current_thread() is threading.main_thread()
if _interruptible:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Importing a module adds its commands, in the order in which `hncse --help` lists them.
from hncse_ray.cli import train, tune, report, mine, evaluate, encode, search, data, publish, submit, settings, doctor  # noqa: E402, I001
from hncse_ray.cli.app import app, run_job  # noqa: E402

if _interruptible:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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
