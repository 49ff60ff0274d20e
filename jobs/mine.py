"""Mine hard negatives: ``ray job submit --working-dir . -- python jobs/mine.py MODEL CORPUS --out /...parquet``."""

from hncse_ray.cli import run_job

if __name__ == "__main__":
    run_job(__file__)
