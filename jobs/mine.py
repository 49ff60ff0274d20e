"""Mine hard negatives: ``ray job submit --working-dir . -- python jobs/mine.py MODEL CORPUS --out FILE``."""

import sys

from hncse_ray.cli import app

if __name__ == "__main__":
    app(["mine", *sys.argv[1:]])
