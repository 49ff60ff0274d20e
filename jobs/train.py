"""Train a recipe: ``ray job submit --working-dir . -- python jobs/train.py RECIPE run.storage_path=URL ...``."""

from hncse_ray.cli import run_job

if __name__ == "__main__":
    run_job(__file__)
