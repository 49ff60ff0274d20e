"""``python -m hncse_ray.cli``."""

from hncse_ray.cli.app import app

app()
