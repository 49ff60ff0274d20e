"""Prepare a recipe's corpus: ``ray job submit --working-dir . -- python jobs/prepare.py RECIPE [KEY=VALUE ...]``."""

from hncse_ray.cli import run_job

if __name__ == "__main__":
    run_job(__file__)
