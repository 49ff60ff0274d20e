"""Every setting of a run, read from YAML, changed by ``a.b=c`` overrides, checked as a whole."""

from hncse_ray.config.base import Section, changes, leaves
from hncse_ray.config.corpus import CorpusSettings
from hncse_ray.config.load import load_settings, read_setting, setting_kinds
from hncse_ray.config.negatives import NegativesSettings
from hncse_ray.config.objective import OBJECTIVES, InfoNCE, InstanceSmoothing, ObjectiveSettings, OwnObjective
from hncse_ray.config.sections import (
    COLLECTION_METRICS,
    LOCAL_IS_ONE,
    RETRIEVAL_METRICS,
    SUITE_METRICS,
    ClusterSettings,
    EncoderSettings,
    EvaluationSettings,
    LoraSettings,
    Pooling,
    Precision,
    Settings,
    Side,
    TrainSettings,
)
from hncse_ray.config.views import ViewKind

__all__ = [
    "COLLECTION_METRICS",
    "ClusterSettings",
    "CorpusSettings",
    "EncoderSettings",
    "EvaluationSettings",
    "InfoNCE",
    "InstanceSmoothing",
    "LOCAL_IS_ONE",
    "LoraSettings",
    "NegativesSettings",
    "OBJECTIVES",
    "ObjectiveSettings",
    "OwnObjective",
    "Pooling",
    "Precision",
    "RETRIEVAL_METRICS",
    "SUITE_METRICS",
    "Section",
    "Settings",
    "Side",
    "TrainSettings",
    "ViewKind",
    "changes",
    "leaves",
    "load_settings",
    "read_setting",
    "setting_kinds",
]
