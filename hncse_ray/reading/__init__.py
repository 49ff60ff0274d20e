"""Files that users bring: what kind they are, their lines, and the records of tables. All is read through here."""

from hncse_ray.reading.documents import (
    Document,
    DocumentError,
    document_kind,
    documents_in,
    paragraphs_of,
    read_document,
    titled,
)
from hncse_ray.reading.kinds import ENDINGS, Kind, check_file, expand_path, kind_of
from hncse_ray.reading.lines import Span, explained, is_blank, is_unicode, line_spans, read_lines, text_lines
from hncse_ray.reading.tables import MAX_RECORD, Record, group_rows, read_records, read_table, require_column

__all__ = [
    "Document",
    "DocumentError",
    "ENDINGS",
    "MAX_RECORD",
    "Kind",
    "Record",
    "Span",
    "check_file",
    "document_kind",
    "documents_in",
    "expand_path",
    "explained",
    "group_rows",
    "is_blank",
    "is_unicode",
    "kind_of",
    "line_spans",
    "paragraphs_of",
    "read_document",
    "read_lines",
    "read_records",
    "read_table",
    "require_column",
    "text_lines",
    "titled",
]
