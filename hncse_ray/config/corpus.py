"""The settings of a corpus: where its rows come from, and which of them are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from hncse_ray.config.base import MOST, Section, StrTuple
from hncse_ray.reading import is_remote, names_folder

CorpusSource = Literal[
    "auto", "text", "jsonl", "csv", "parquet", "hub", "python-docs", "python-code", "documents", "memory"
]  # fmt: skip


class CorpusSettings(Section):
    """Where the sentences or pairs come from and which of them are kept."""

    source: CorpusSource = Field(
        "auto",
        description="auto = files, each read as its ending says, and a folder as the documents in it;"
        " memory = handed to hncse_ray.train(sentences=...)",
    )
    path: StrTuple = Field(
        (),
        description="files and globs, also at s3://, gs:// and https:// (files only); folders (documents, python-code;"
        " a URL ends in /); or one data set name (hub)",
    )
    column: str = Field("text", description="the column of tables and hub sources")
    title_column: str | None = Field(
        None, min_length=1, description="documents in tables: default: title, where there is one"
    )
    positive_column: str | None = Field(
        None, min_length=1, description="what a row of `column` belongs to, such as the answer to a question"
    )
    negative_columns: StrTuple = Field((), description="what it does not belong to, each a text or a list of texts")
    document_column: str | None = Field(
        None, min_length=1, description="which rows belong together; of documents by default _id or id, if there is one"
    )
    repel_within_document: bool = Field(False, description="rows of one document are negatives of each other too")
    unit: Literal["title_and_passage", "passage"] = Field(
        "title_and_passage", description="documents: what a row is, as it is trained, indexed and searched"
    )
    passage_words: int = Field(
        200, ge=10, le=1_000_000, description="documents: a longer one is split at ends of sentences"
    )
    near_duplicates: float | None = Field(
        0.9, ge=0.5, le=0.99, description="documents that share so much (Jaccard) with an earlier one are dropped"
    )
    subset: str | None = Field(None, description="the configuration of a hub data set")
    split: str = Field("train", description="the split of a hub data set")
    packages: StrTuple = Field(
        (), description="python-docs and python-code: packages to read; empty = a tested selection, or what path names"
    )
    held_out: float = Field(
        0.0, ge=0, lt=1, description="python-code: share of the modules that are scored on, not trained on"
    )
    min_words: int = Field(
        1, ge=1, le=1000, description="words as blanks part them: one for a line of Chinese or Japanese"
    )
    max_chars: int = Field(
        10_000, ge=10, le=10_000_000, description="longer lines are dropped and counted; documents may be longer"
    )
    max_sentences: int | None = Field(
        None, ge=1, le=MOST, description="a random sample of this size is kept; of documents whole ones"
    )
    cache_dir: str | None = Field(None, description="default: $HNCSE_CACHE, else ~/.cache/hncse_ray")
    num_processes: int | None = Field(None, ge=1, le=1024, description="default: one per CPU")

    @property
    def of_documents(self) -> bool:
        """Whether rows are passages of documents: it is said so, or a folder is named."""
        folders = any(names_folder(path) for path in self.path)
        return self.source == "documents" or (self.source == "auto" and folders)

    @property
    def is_elsewhere(self) -> bool:
        """Whether the source, or a part of it, is not on this machine."""
        return self.source == "hub" or any(map(is_remote, self.path))

    @property
    def place(self) -> str:
        """What messages call it: its paths, else its source."""
        return " ".join(self.path) or self.source

    @model_validator(mode="after")
    def _path_fits_source(self) -> CorpusSettings:
        if self.source == "python-docs":
            if self.path:
                raise ValueError("python-docs reads installed packages and takes no path; name them in packages")
        elif self.source == "memory":
            if self.path:
                raise ValueError("source 'memory' is handed to hncse_ray.train(sentences=...) and takes no path")
        elif not self.path and self.source != "python-code":
            raise ValueError(f"source {self.source!r} needs a path; python-docs and python-code need none")
        elif self.source == "hub" and len(self.path) > 1:
            raise ValueError("source 'hub' takes one data set name")
        return self

    @property
    def further_columns(self) -> tuple[tuple[str, str], ...]:
        """The columns beside ``column`` that are asked for, each after the name of its setting."""
        found = [("positive_column", self.positive_column)]
        found += [("negative_columns", name) for name in self.negative_columns]
        found += [("document_column", self.document_column)]
        return tuple((setting, name) for setting, name in found if name is not None)

    @property
    def has_pairs(self) -> bool:
        """Whether rows may have positives."""
        return self.positive_column is not None or self.source == "python-code"

    @property
    def first_document_setting(self) -> str:
        """The first setting for documents alone that is not as by default; empty if all are."""
        alone = ("title_column", "unit", "passage_words", "near_duplicates")
        return next((name for name in alone if getattr(self, name) != type(self).model_fields[name].default), "")

    @model_validator(mode="after")
    def _columns_fit(self) -> CorpusSettings:
        if self.further_columns and self.source in ("text", "python-docs", "python-code", "memory"):
            setting = self.further_columns[0][0]
            raise ValueError(f"source {self.source!r} has no columns, so {setting} cannot be read from it")
        if self.negative_columns and self.positive_column is None:
            raise ValueError("negative_columns needs positive_column")
        if self.source == "documents" and (self.positive_column or self.negative_columns):
            setting = "positive_column" if self.positive_column else "negative_columns"
            raise ValueError(f"documents are no pairs; for {setting} read the table by another source")
        may_know = self.source == "python-code" or (self.source in ("auto", "documents") and not self.positive_column)
        if self.repel_within_document and self.document_column is None and not may_know:
            raise ValueError("repel_within_document needs document_column, or documents")
        if self.held_out and self.source != "python-code":
            raise ValueError(f"held_out is for python-code, and the source is {self.source!r}")
        if self.source not in ("auto", "documents") and (setting := self.first_document_setting):
            raise ValueError(f"{setting} is for documents, and the source is {self.source!r}")
        texts = [
            self.column,
            *([self.title_column] if self.title_column else []),
            *(name for setting, name in self.further_columns if setting != "document_column"),
        ]
        if twice := [name for name in texts if texts.count(name) > 1]:
            raise ValueError(f"column {twice[0]!r} is named twice among column, positive_column and negative_columns")
        return self
