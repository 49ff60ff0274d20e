"""Where the shards of a run keep what they spill to disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hncse_ray.config import Settings, load_settings
from hncse_ray.corpus import prepare_corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import StorageError
from hncse_ray.negatives import IndexVersion, plan_index
from hncse_ray.negatives.shard import IndexShard
from hncse_ray.training.shard import build_shard


def built(tree: dict[str, Any], kind: str, **negatives: Any) -> tuple[IndexShard, Settings]:
    settings = load_settings(tree | {"negatives": {"source": "in_process", "index": kind, **negatives}})
    encoder = load_encoder(settings.encoder.model, settings.encoder)
    corpus = prepare_corpus(
        settings.corpus, tokenize=encoder.token_rows, tokenizer_digest=encoder.tokenizer_digest(), max_length=24
    )
    plan = plan_index(kind, rows=len(corpus), dimension=encoder.dimension, memory_bytes=None)  # type: ignore[arg-type]
    shard = build_shard(settings.negatives, settings.encoder, corpus, plan=plan, cache_dir=settings.corpus.cache_dir)
    weights = {name: tensor.numpy() for name, tensor in encoder.state_dict().items()}
    shard.build(IndexVersion(0, "weights", corpus.digest, len(corpus)), weights)
    return shard, settings


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what the kernel has mapped")
@pytest.mark.parametrize("named", [False, True])
def test_vectors_on_disk_are_in_the_cache_folder_or_where_the_setting_says(
    tree: dict[str, Any], tmp_path: Path, named: bool
) -> None:
    shard, settings = built(tree, "ivf_flat", **({"index_dir": str(tmp_path / "fast/disk")} if named else {}))
    folder = tmp_path / "fast/disk" if named else Path(settings.corpus.cache_dir or "") / "index"
    assert len(shard.versions()) == 1
    assert f" {folder}/" in Path("/proc/self/maps").read_text()
    assert list(folder.iterdir()) == []  # without a name: nothing is left, however the process ends


def test_an_index_in_memory_needs_no_folder(tree: dict[str, Any], tmp_path: Path) -> None:
    built(tree, "flat", index_dir=str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_made_is_named_with_its_setting(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/index: cannot be written .*negatives\.index_dir"):
        built(tree, "ivf_flat", index_dir=str(tmp_path / "file/index"))
