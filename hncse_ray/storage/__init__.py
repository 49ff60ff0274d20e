"""Files and folders that nobody ever finds half of; in modules of their own, a folder at a URL and the claim on one."""

from hncse_ray.storage.local import (
    BLOCK,
    check_outlasts_job,
    check_writable,
    is_job,
    is_locked,
    leave_nothing,
    locked,
    replacing,
    write_atomically,
    write_folder,
    write_past_cache,
)
from hncse_ray.storage.remote import flaw_of, is_url, open_filesystem, reason_of, without_secret

__all__ = [
    "BLOCK",
    "check_outlasts_job",
    "check_writable",
    "flaw_of",
    "is_job",
    "is_locked",
    "is_url",
    "leave_nothing",
    "locked",
    "open_filesystem",
    "reason_of",
    "replacing",
    "without_secret",
    "write_atomically",
    "write_folder",
    "write_past_cache",
]
