"""Global hard negatives: the index of a shard, selection rules, refresh policy, the source protocol. No actors here."""

from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.negatives.index import IndexPlan, merge_hits, plan_index
from hncse_ray.negatives.refresh import RefreshDecision, RefreshFacts, RefreshRules, decide
from hncse_ray.negatives.selection import Selection, SelectionRules, select
from hncse_ray.negatives.shard import BuildReport, IndexShard
from hncse_ray.negatives.source import (
    Hits,
    IndexVersion,
    NegativeSource,
    SourceStatus,
    SourceUnavailable,
    Weights,
    weights_digest,
)

__all__ = [
    "BuildReport",
    "Hits",
    "InProcessSource",
    "IndexPlan",
    "IndexShard",
    "IndexVersion",
    "NegativeSource",
    "RefreshDecision",
    "RefreshFacts",
    "RefreshRules",
    "Selection",
    "SelectionRules",
    "SourceStatus",
    "SourceUnavailable",
    "Weights",
    "decide",
    "merge_hits",
    "plan_index",
    "select",
    "weights_digest",
]
