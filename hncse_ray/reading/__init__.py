"""Files that users bring: what kind they are, their lines, and the records of tables. All rooms read through here."""

from hncse_ray.reading.kinds import ENDINGS, Kind, check_file, kind_of
from hncse_ray.reading.lines import explained, is_blank, is_unicode, read_lines, text_lines
from hncse_ray.reading.tables import MAX_RECORD, Record, read_records, read_table, require_column

__all__ = [
    "ENDINGS",
    "MAX_RECORD",
    "Kind",
    "Record",
    "check_file",
    "explained",
    "is_blank",
    "is_unicode",
    "kind_of",
    "read_lines",
    "read_records",
    "read_table",
    "require_column",
    "text_lines",
]
