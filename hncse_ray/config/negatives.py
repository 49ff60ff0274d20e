"""The settings of the neighbours that an index of the whole corpus gives."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from hncse_ray.config.base import LONGEST_S, MOST, Section, as_tuple


class NegativesSettings(Section):
    """Neighbours from the whole corpus, found by an index of an earlier state of the encoder.

    The index is a pool of actors beside the trainers (``pool``), or lives in the trainer (``in_process``).
    """

    source: Literal["none", "in_process", "pool"] = Field(
        "none", description="none = only the other sentences of the global batch"
    )
    use: Literal["fresh", "stored"] = Field(
        "stored", description="fresh = encoded again with the batch, with gradient; stored = the index's vectors"
    )
    columns: Literal["own", "all", "none"] = Field(
        "own", description="whose neighbours an anchor is repelled from; none = they are only mixed"
    )
    per_anchor: int = Field(1, ge=1, le=1024, description="neighbours used of each anchor, m")
    candidates: int = Field(32, ge=1, le=2000, description="neighbours looked up of each anchor, k; m are selected")
    # Defaults: benchmarks/negatives_quality.py. A cap of 0.9 lost what one of 0.7 gained.
    max_score: float | None = Field(0.7, gt=-1, le=1, description="nearer ones are taken for false negatives")
    relative_margin: float | None = Field(
        None, ge=0, lt=1, description="so are those above (1 - margin) x the similarity of the positive"
    )
    mask_batch: bool = Field(False, description="rows of the batch that are hits above these limits are not repelled")
    mask_reciprocal: int | None = Field(
        None, ge=1, le=2000, description="nor are two rows of it that are each among so many nearest of the other"
    )
    skip_hardest: int = Field(0, ge=0, le=2000, description="of those left, pass over so many of the nearest")
    sampling: Literal["top", "uniform", "softmax", "bands"] = Field(
        "top",
        description="how m are drawn from those left: nearest first, any, by a softmax of cosines, in turn from bands",
    )
    sampling_temperature: float = Field(0.05, gt=0, le=1000, description="of softmax sampling")
    bands: Annotated[tuple[Annotated[int, Field(ge=1, le=2000)], ...], BeforeValidator(as_tuple)] = Field(
        (5, 30), description="last rank of each band but the last, which ends with the candidates"
    )
    score: Literal["cosine", "lexical", "hybrid"] = Field(
        "cosine", description="what makes a row near, and teaches a distillation: its cosine, BM25, or both"
    )
    lexical_weight: float = Field(0.3, gt=0, le=100, description="of BM25, whose best is 1, beside the cosine")
    refresh: Literal["async", "sync"] = Field("async", description="sync = training waits for a new index")
    refresh_every_steps: int | None = Field(100, ge=1, le=MOST, description="null = one index, made at the start")
    max_staleness_steps: int | None = Field(
        None, ge=1, le=MOST, description="training waits rather than use an older index"
    )
    index: Literal["auto", "flat", "ivf_flat", "ivf_pq", "exact_torch"] = Field(
        "auto", description="auto = exact (flat; on a GPU exact_torch) where it fits into memory, else ivf_pq"
    )
    nprobe: int = Field(32, ge=1, le=65_536, description="lists searched by the ivf kinds")
    encode_batch_size: int | None = Field(None, ge=1, le=65_536, description="default: 128 on CPUs, 1,024 on a GPU")
    num_shards: int = Field(1, ge=1, le=4096, description="actors of the pool; each holds a part of the rows")
    cpus_per_shard: float = Field(0, ge=0, le=1024, description="reserved; 0 = the shards share the trainers' CPUs")
    gpus_per_shard: float = Field(0, ge=0, le=1024, description="whole, or a fraction of one")
    threads_per_shard: int | None = Field(
        None, ge=1, le=1024, description="default: the reserved CPUs, else those of a node over the shards on it"
    )
    index_dir: str | None = Field(
        None, description="where the ivf kinds keep their vectors, on each node; default: index/ in the cache folder"
    )
    prefetch_batches: int = Field(2, ge=1, le=64, description="batches whose neighbours are looked up ahead")
    timeout_s: float = Field(
        10, gt=0, le=LONGEST_S, description="a step waits so long for an answer, then goes on without"
    )
    build_timeout_s: float = Field(3600, gt=0, le=LONGEST_S, description="a build that takes longer is given up")

    @model_validator(mode="after")
    def _numbers_agree(self) -> NegativesSettings:
        if self.per_anchor + self.skip_hardest > self.candidates:
            raise ValueError(
                f"per_anchor {self.per_anchor} + skip_hardest {self.skip_hardest} is more than the"
                f" {self.candidates} candidates"
            )
        if self.mask_batch and self.max_score is None and self.relative_margin is None:
            raise ValueError("mask_batch has no limit to go by; set max_score or relative_margin")
        if self.mask_reciprocal is not None and self.mask_reciprocal > self.candidates:
            raise ValueError(f"mask_reciprocal {self.mask_reciprocal} is more than the {self.candidates} candidates")
        if self.sampling == "bands" and not all(a < b for a, b in pairwise((0, *self.bands, self.candidates))):
            raise ValueError(f"bands {list(self.bands)} must rise, to less than candidates = {self.candidates}")
        if self.source == "in_process" and (self.num_shards, self.cpus_per_shard, self.gpus_per_shard) != (1, 0, 0):
            raise ValueError("source 'in_process' is one shard in the trainer; for more set source: pool")
        if self.gpus_per_shard > 1 and self.gpus_per_shard % 1:
            raise ValueError(f"gpus_per_shard {self.gpus_per_shard} must be a whole number or a fraction of one")
        return self
