"""Every setting of a run: frozen pydantic models.

The defaults of ``encoder`` and ``train`` are those of unsupervised SimCSE on BERT-base
(Gao et al. 2021, arXiv 2104.08821, section 3 and appendix A) unless a comment names another source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from hncse_ray.config.base import LONGEST_S, MOST, Section, StrTuple, as_tuple
from hncse_ray.config.corpus import CorpusSettings
from hncse_ray.config.export import ExportSettings
from hncse_ray.config.negatives import NegativesSettings
from hncse_ray.config.objective import HardNegativeMixing, Hybrid, InfoNCE, InstanceSmoothing, ObjectiveSettings
from hncse_ray.config.values import read_value
from hncse_ray.config.views import ViewsSettings
from hncse_ray.recipe import write_yaml

Pooling = Literal[
    "auto",
    "cls",
    "mean",
    "max",
    "mean_sqrt_len_tokens",
    "weightedmean",
    "lasttoken",
    "first_last_mean",
    "last_two_mean",
]
Precision = Literal["auto", "fp32", "bf16"]
Tracker = Literal["mlflow", "wandb"]
Side = Literal["query", "document"]
Suite = Literal["stsb", "pairs", "python-docs", "python-code", "retrieval", "cloze", "pseudo-relevance"]

LOCAL_IS_ONE = "engine 'local' is one worker in the command's own process"
ACCELERATOR_LABEL = "ray.io/accelerator-type"  # Ray sets it on nodes with GPUs

RETRIEVAL_METRICS = ("recall@1", "recall@10", "mrr", "ndcg@10")
COLLECTION_METRICS = ("ndcg@10", "mrr@10", "recall@100")
SUITE_METRICS: dict[str, tuple[str, ...]] = {
    "stsb": ("spearman",),
    "pairs": RETRIEVAL_METRICS,
    "python-docs": RETRIEVAL_METRICS,
    "python-code": RETRIEVAL_METRICS,
    "retrieval": COLLECTION_METRICS,
    "cloze": RETRIEVAL_METRICS,
    "pseudo-relevance": COLLECTION_METRICS,
}


class RunSettings(Section):
    """Where a run lives and what makes it reproducible."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="of the run, and of its folder"
    )
    storage_path: str = Field("runs", min_length=1, description="the run's folder is <storage_path>/<name>")
    seed: int = Field(0, ge=0, lt=2**31, description="of the order of rows, of dropout and of random choices")
    trackers: Annotated[tuple[Tracker, ...] | None, BeforeValidator(as_tuple)] = Field(
        None, description="where its numbers go too, as set up by the tracker's own variables; null = $HNCSE_TRACKERS"
    )


class LoraSettings(Section):
    """Low-rank adapters instead of all weights (Hu et al. 2021, arXiv 2106.09685); needs the extra ``lora``."""

    r: int = Field(16, ge=1, le=1024, description="rank of the adapters")
    alpha: float = Field(32, gt=0, description="their weight is alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' input")
    target_modules: StrTuple = Field((), description="names of linear layers, such as q_proj; empty = all")


class EncoderSettings(Section):
    """The backbone, how token states become one vector, and in what precision."""

    model: str = Field(
        "bert-base-uncased",
        min_length=1,
        description="a folder, a hub name, or package:NAME[/FOLDER] for weights inside an installed package",
    )
    revision: str | None = Field(None, min_length=1, description="of a hub model: a commit, a tag or a branch")
    pooling: Pooling = Field(
        "auto", description="auto = what the model's own folder says, else mean; of causal models lasttoken"
    )
    prompts: dict[str, str] = Field(
        {}, description="what is put before texts, by side (query, document); default: what the folder says"
    )
    default_prompt: str | None = Field(None, description="the prompt of texts that are of no side, by its name")
    max_length: int = Field(32, ge=4, le=8192, description="tokens in training, special tokens included")
    inference_max_length: int | None = Field(
        None, ge=4, le=8192, description="tokens when encoding and scoring; default: the model's own limit"
    )
    head: Literal["none", "tanh"] = Field("none", description="a dense layer with tanh after pooling")
    head_in_training_only: bool = Field(True, description="leave the head out of scores and export, as SimCSE does")
    dropout: float | None = Field(None, ge=0, lt=1, description="default: what the model's own config says")
    precision: Precision = Field("auto", description="auto = bf16 autocast where the hardware computes in it")
    inference_precision: Precision = Field("fp32", description="of scores and of vectors that are handed out")
    lora: LoraSettings | None = Field(None, description="train adapters only; exported merged")
    gradient_checkpointing: bool = Field(
        False, description="less memory, a third more time: activations are recomputed"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class TrainSettings(Section):
    """The optimisation. Batch sizes are global: sentences per optimiser step over all workers."""

    batch_size: int = Field(64, ge=2, le=1_048_576, description="sentences in one contrastive batch, over all workers")
    accumulation_steps: int = Field(1, ge=1, le=65_536, description="contrastive batches per optimiser step")
    grad_cache_chunk_size: int | None = Field(
        None,
        ge=1,
        le=1_048_576,
        description="sentences a worker encodes at a time (gradient caching, arXiv 2101.06983)",
    )
    learning_rate: float = Field(3e-5, gt=0, le=1, description="of AdamW, at its highest")
    weight_decay: float = Field(0.0, ge=0, le=1, description="of AdamW; biases and norms have none")
    max_grad_norm: float = Field(1.0, gt=0, le=1e6, description="longer gradients are scaled down to it")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate falls after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, le=MOST, description="steps in which the learning rate rises from 0")
    epochs: float = Field(1.0, gt=0, le=1_000_000, description="passes over the corpus")
    max_steps: int | None = Field(None, ge=1, le=MOST, description="optimiser steps; wins over epochs")
    bucket_by_length: bool = Field(True, description="rows of like length share a batch: less padding")
    log_every_steps: int = Field(10, ge=1, le=MOST, description="optimiser steps between two lines of the log")
    evaluate_every_steps: int = Field(125, ge=1, le=MOST, description="steps between two scores on dev")
    checkpoint_every_steps: int = Field(500, ge=1, le=MOST, description="steps between two checkpoints")
    early_stopping_evaluations: int | None = Field(
        None, ge=1, le=MOST, description="stop after so many evaluations without a better dev score"
    )
    max_uniformity: float = Field(
        -0.05, le=0, description="a mean uniformity (Wang & Isola 2020) above this is reported as collapse"
    )

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TrainSettings:
        if self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} is not less than max_steps {self.max_steps}")
        return self


class EvaluationSettings(Section):
    """Which sets are scored, and which dev metric chooses the checkpoint."""

    suites: Annotated[tuple[Suite, ...], BeforeValidator(as_tuple)] = Field(
        ("stsb",), description="what is scored; of a corpus of documents pseudo-relevance, without labels"
    )
    metric: str = Field(
        "stsb/spearman",
        description="the dev metric that chooses, as suite/metric; pseudo-relevance/ndcg@10 of documents",
    )
    senteval_path: str | None = Field(None, description="default: $HNCSE_DATA/senteval")
    pairs_dev: str | None = Field(None, description="TSV, JSONL, CSV or Parquet file of query and answer")
    pairs_test: str | None = Field(None, description="such a file for the test scores")
    code_dev: StrTuple = Field(
        (),
        description="python-code: packages of the dev pairs; empty = a tested selection, or what corpus.held_out is",
    )
    code_test: StrTuple = Field((), description="those of the test pairs")
    code_pairs: int | None = Field(
        800, ge=2, le=MOST, description="python-code: a sample of so many pairs of a split, whose codes are searched"
    )
    collection: StrTuple = Field(
        (), description="for retrieval: folders with corpus.jsonl, queries.jsonl and qrels/{dev,test}.tsv"
    )
    held_out_queries: int = Field(
        300, ge=10, le=100_000, description="cloze, pseudo-relevance: sentences that ask; their documents are held out"
    )
    held_out_candidates: int = Field(
        5000, ge=100, le=MOST, description="of these suites: rows that are searched; of a larger corpus a random sample"
    )
    test: bool = Field(True, description="score the test sets too, before and after; the trials of a sweep do not")
    batch_size: int = Field(128, ge=1, le=65_536, description="sentences that are encoded at a time for scores")

    @model_validator(mode="after")
    def _metric_is_measured(self) -> EvaluationSettings:
        if "pairs" in self.suites and self.pairs_dev is None:
            raise ValueError("suite 'pairs' needs pairs_dev")
        if "retrieval" in self.suites and not self.collection:
            raise ValueError("suite 'retrieval' needs collection")
        known = [f"{suite}/{metric}" for suite in self.suites for metric in SUITE_METRICS[suite]]
        if self.suites and self.metric not in known:
            raise ValueError(f"metric {self.metric!r} is not measured by suites; choose from {', '.join(known)}")
        return self


class ClusterSettings(Section):
    """What trains a run, and what Ray is asked for."""

    engine: Literal["auto", "ray", "local"] = Field(
        "auto",
        description="local = one worker in the command's own process, without Ray; ray = workers are processes of Ray,"
        " which starts them again if they die; auto = as local where one worker on this machine is all that is asked"
        " for, but with the actors of a pool",
    )
    num_workers: int = Field(1, ge=1, le=4096, description="trainers, each a process (DDP)")
    min_workers: int | None = Field(
        None, ge=1, le=4096, description="elastic: train with as few while nodes are away; default: always num_workers"
    )
    use_gpu: Literal["auto", True, False] = Field(
        "auto", description="auto = GPUs if the cluster has them for every worker"
    )
    gpus_per_worker: float = Field(
        1, gt=0, le=1, description="a fraction leaves the rest of a GPU to a shard of the pool"
    )
    cpus_per_worker: float | None = Field(None, gt=0, le=1024, description="default: the cluster's CPUs shared out")
    max_failures: int = Field(3, ge=0, le=MOST, description="worker group restarts before the run fails")
    accelerator_type: str | None = Field(
        None, min_length=1, description="GPU that workers must have, by Ray's names such as H100; default: any"
    )
    trainer_labels: dict[str, str] = Field({}, description="nodes that workers may be on, by Ray's labels")
    pool_labels: dict[str, str] = Field({}, description="nodes that the negative pool may be on")
    start_timeout_s: float = Field(
        600, gt=0, le=LONGEST_S, description="wait so long for nodes to be free, or to be started"
    )

    @model_validator(mode="after")
    def _local_is_one_process(self) -> ClusterSettings:
        if self.engine == "local" and (self.num_workers > 1 or self.min_workers is not None):
            name = "num_workers" if self.num_workers > 1 else "min_workers"
            raise ValueError(f"{LOCAL_IS_ONE}; {name} needs engine: ray")
        return self

    @property
    def worker_labels(self) -> dict[str, str]:
        """What nodes must have for workers, by Ray's labels; it sets that of the GPU itself."""
        return self.trainer_labels | ({ACCELERATOR_LABEL: self.accelerator_type} if self.accelerator_type else {})

    @model_validator(mode="after")
    def _an_accelerator_is_used(self) -> ClusterSettings:
        if self.accelerator_type and self.use_gpu is False:
            raise ValueError(f"accelerator_type {self.accelerator_type} asks for GPUs, and use_gpu is false")
        return self

    @model_validator(mode="after")
    def _elastic_is_clear(self) -> ClusterSettings:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        if self.min_workers is not None and self.use_gpu == "auto":
            raise ValueError("with min_workers, GPUs come and go with the nodes: set use_gpu to true or false")
        return self

    @model_validator(mode="after")
    def _no_two_workers_on_a_gpu(self) -> ClusterSettings:
        if self.num_workers > 1 and self.gpus_per_worker <= 0.5:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} would put two workers on one GPU, which NCCL refuses;"
                " with several workers it must be above 0.5"
            )
        return self


class Settings(Section):
    """The whole tree. Build it with :func:`~hncse_ray.config.load_settings`."""

    run: RunSettings = RunSettings()
    corpus: CorpusSettings
    encoder: EncoderSettings = EncoderSettings()
    objective: ObjectiveSettings = InfoNCE()
    negatives: NegativesSettings = NegativesSettings()
    views: ViewsSettings = ViewsSettings()
    train: TrainSettings = TrainSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()
    cluster: ClusterSettings = ClusterSettings()

    @model_validator(mode="before")
    @classmethod
    def _documents_judge_themselves(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        given = read_value(tree.get("evaluation") or {}, EvaluationSettings)
        if not isinstance(given, Mapping) or "suites" in given:
            return tree
        if not _are_documents(read_value(tree.get("corpus"), CorpusSettings)):
            return tree
        return {**tree, "evaluation": {"suites": ("pseudo-relevance",), "metric": "pseudo-relevance/ndcg@10", **given}}

    @model_validator(mode="after")
    def _sections_agree(self) -> Settings:
        batch, workers = self.train.batch_size, self.cluster.num_workers
        if isinstance(self.objective, HardNegativeMixing | Hybrid) and self.objective.k > batch - 1:
            raise ValueError(
                f"objective.k = {self.objective.k} is larger than the {batch - 1} candidates of an anchor"
                f" (train.batch_size - 1); lower objective.k or raise train.batch_size"
            )
        self._check_neighbours()
        self._check_views()
        if self.export.chooses and not self.evaluation.suites:
            raise ValueError("export.merge and export.whiten choose by a dev score, and evaluation.suites is empty")
        if workers > batch:
            raise ValueError(f"cluster.num_workers = {workers} is more than train.batch_size = {batch} sentences")
        return self

    def _check_neighbours(self) -> None:
        negatives, name = self.negatives, self.objective.name
        given = bool(self.corpus.negative_columns)
        if given and name in ("instance_smoothing", "distillation"):
            raise ValueError(f"objective {name!r} has no use for corpus.negative_columns")
        if negatives.source == "none" and not given:
            return
        if negatives.columns == "none" and name in ("info_nce", "three_view", "distillation"):
            what = "global negatives" if negatives.source != "none" else "corpus.negative_columns"
            raise ValueError(f"negatives.columns = none leaves objective {name!r} without use for {what}")
        if name == "instance_smoothing":
            if negatives.use == "fresh":
                raise ValueError("instance_smoothing draws its groups from stored vectors; set negatives.use=stored")
            if self.neighbours_per_anchor + negatives.skip_hardest > negatives.candidates:
                raise ValueError(
                    f"objective.group_size {self.neighbours_per_anchor} + negatives.skip_hardest"
                    f" {negatives.skip_hardest} is more than negatives.candidates = {negatives.candidates}"
                )

    def _check_views(self) -> None:
        views, negatives = self.views, self.negatives
        if views.active and self.corpus.has_pairs:
            raise ValueError("views.mix makes positives, and the corpus has pairs already; leave one of them out")
        if views.mix.neighbour and self.corpus.repel_within_document:
            raise ValueError("views.mix.neighbour takes passages of one document for positives, and"
                             " corpus.repel_within_document repels them")  # fmt: skip
        by_index = {
            "views.agreement": views.agreement is not None,
            "negatives.mask_batch": negatives.mask_batch,
            "negatives.mask_reciprocal": negatives.mask_reciprocal is not None,
        }
        for setting in (name for name, asked in by_index.items() if asked and negatives.source == "none"):
            raise ValueError(f"{setting} asks the index, and there is none; set negatives.source")
        if views.agreement is not None and views.agreement > negatives.candidates:
            raise ValueError(f"views.agreement = {views.agreement} is more than negatives.candidates ="
                             f" {negatives.candidates}, which are looked up")  # fmt: skip

    @property
    def neighbours_per_anchor(self) -> int:
        """How many neighbours of an anchor the objective is given, m."""
        if isinstance(self.objective, InstanceSmoothing):
            return self.objective.group_size
        return self.negatives.per_anchor

    @property
    def smallest_batch(self) -> int:
        """Rows that the last batch of an epoch must have, or it is left out."""
        return max(2, self.cluster.num_workers)

    @property
    def fits_one_process(self) -> bool:
        """Whether one process may train it all; a shard of a pool on a GPU needs Ray to keep the trainer from that."""
        cluster, negatives = self.cluster, self.negatives
        is_placed = cluster.worker_labels or cluster.pool_labels or negatives.gpus_per_shard
        return cluster.engine != "ray" and cluster.num_workers == 1 and cluster.min_workers is None and not is_placed

    @property
    def run_dir(self) -> str:
        """The run's folder, ``<storage_path>/<name>``."""
        return os.path.join(self.run.storage_path, self.run.name)

    def to_yaml(self) -> str:
        """Return the resolved settings as YAML; ``load_settings`` reads it back to the same tree."""
        return write_yaml(self.model_dump(mode="json"))


def _are_documents(corpus: Any) -> bool:
    """Whether a corpus, its settings not yet checked, is one of documents."""
    try:
        return CorpusSettings.model_validate(corpus).of_documents
    except ValidationError:  # which the whole will tell
        return False
