"""Score models: ``ray job submit --working-dir . -- python jobs/evaluate.py MODEL... [--suite NAME]``."""

from hncse_ray.cli import run_job

if __name__ == "__main__":
    run_job(__file__)
