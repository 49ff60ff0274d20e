"""Where runs are kept: folders written without halves, and copies of them at URLs."""

from hncse_ray.storage.lease import LAST_LEASE, LEASES, Lease, leased
from hncse_ray.storage.local import (
    BLOCK,
    check_outlasts_job,
    is_job,
    is_locked,
    locked,
    replacing,
    write_atomically,
    write_folder,
    write_past_cache,
)
from hncse_ray.storage.remote import Remote, is_url, open_filesystem, reason_of
from hncse_ray.storage.sending import LeaseLost, Sender, keep_trying

__all__ = [
    "BLOCK",
    "LAST_LEASE",
    "LEASES",
    "Lease",
    "LeaseLost",
    "Remote",
    "Sender",
    "check_outlasts_job",
    "is_job",
    "is_locked",
    "is_url",
    "keep_trying",
    "leased",
    "locked",
    "open_filesystem",
    "reason_of",
    "replacing",
    "write_atomically",
    "write_folder",
    "write_past_cache",
]
