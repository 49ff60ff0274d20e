"""Global hard negatives: the index of a shard, selection rules, refresh policy, the source protocol. No actors here.

What needs torch, `shard.IndexShard` and `in_process.InProcessSource`, is imported from its module, so that
a module which needs neither can be imported without torch.
"""

from hncse_ray.negatives.hits import Offers, WordQuery, merge_hits, merge_offers
from hncse_ray.negatives.in_batch import NearHits, near_hits, score_limit
from hncse_ray.negatives.index_plan import IndexPlan, plan_index
from hncse_ray.negatives.refresh import RefreshDecision, RefreshFacts, RefreshRules, decide
from hncse_ray.negatives.selection import FATES, Selection, SelectionRules, select
from hncse_ray.negatives.source import (
    BuildReport,
    Hits,
    IndexVersion,
    NegativeSource,
    SourceStatus,
    SourceUnavailable,
    TokenRow,
    Weights,
    share_anchors,
    weights_digest,
)

__all__ = [
    "FATES",
    "BuildReport",
    "Hits",
    "IndexPlan",
    "IndexVersion",
    "NearHits",
    "NegativeSource",
    "Offers",
    "RefreshDecision",
    "RefreshFacts",
    "RefreshRules",
    "Selection",
    "SelectionRules",
    "SourceStatus",
    "SourceUnavailable",
    "TokenRow",
    "Weights",
    "WordQuery",
    "share_anchors",
    "decide",
    "merge_hits",
    "merge_offers",
    "near_hits",
    "plan_index",
    "score_limit",
    "select",
    "weights_digest",
]
