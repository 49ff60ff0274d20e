"""Search settings: ``ray job submit --working-dir . -- python jobs/tune.py RECIPE --space SPACE --out FOLDER``."""

from hncse_ray.cli import run_job

if __name__ == "__main__":
    run_job(__file__)
