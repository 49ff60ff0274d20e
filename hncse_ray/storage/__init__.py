"""Where runs are kept: folders written without halves, and copies of them at URLs."""

from hncse_ray.storage.lease import LEASES, Lease, LeaseLost, leased
from hncse_ray.storage.local import (
    check_outlasts_job,
    is_job,
    is_locked,
    locked,
    replacing,
    write_atomically,
    write_folder,
)
from hncse_ray.storage.mirror import (
    Damaged,
    Uploader,
    delete_folder,
    fetch_folder,
    keep_trying,
    send_folder,
    whole_folders,
)
from hncse_ray.storage.remote import Remote, is_url

__all__ = [
    "LEASES",
    "Damaged",
    "Lease",
    "LeaseLost",
    "Remote",
    "Uploader",
    "check_outlasts_job",
    "delete_folder",
    "fetch_folder",
    "is_job",
    "is_locked",
    "is_url",
    "keep_trying",
    "leased",
    "locked",
    "replacing",
    "send_folder",
    "whole_folders",
    "write_atomically",
    "write_folder",
]
