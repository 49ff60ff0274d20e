"""Train a recipe: ``ray job submit --working-dir . -- python jobs/train.py RECIPE [KEY=VALUE ...] [--json]``."""

import sys

from hncse_ray.cli import app

if __name__ == "__main__":
    app(["train", *sys.argv[1:]])
