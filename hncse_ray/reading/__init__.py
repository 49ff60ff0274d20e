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
from hncse_ray.reading.kinds import Kind, check_file, ending_of, expand_path, kind_of, names_folder
from hncse_ray.reading.lines import (
    UNPARTED,
    Span,
    content_identity,
    explained,
    is_blank,
    is_unicode,
    line_spans,
    read_lines,
    text_lines,
)
from hncse_ray.reading.tables import MAX_RECORD, Record, group_rows, read_records, read_table, require_column
from hncse_ray.reading.urls import File, UrlFile, is_remote

__all__ = [
    "Document",
    "DocumentError",
    "File",
    "MAX_RECORD",
    "Kind",
    "Record",
    "Span",
    "UNPARTED",
    "UrlFile",
    "check_file",
    "content_identity",
    "document_kind",
    "documents_in",
    "ending_of",
    "expand_path",
    "explained",
    "group_rows",
    "is_blank",
    "is_remote",
    "is_unicode",
    "kind_of",
    "line_spans",
    "names_folder",
    "paragraphs_of",
    "read_document",
    "read_lines",
    "read_records",
    "read_table",
    "require_column",
    "text_lines",
    "titled",
]
