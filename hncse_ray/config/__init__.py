"""Every setting of a run, read from YAML, changed by ``a.b=c`` overrides, checked as a whole."""

from hncse_ray.config.load import load_settings
from hncse_ray.config.sections import (
    COLLECTION_METRICS,
    OBJECTIVES,
    RETRIEVAL_METRICS,
    SUITE_METRICS,
    ClusterSettings,
    CorpusSettings,
    EncoderSettings,
    EvaluationSettings,
    InfoNCE,
    InstanceSmoothing,
    NegativesSettings,
    ObjectiveSettings,
    Pooling,
    Precision,
    Settings,
    TrainSettings,
)

__all__ = [
    "COLLECTION_METRICS",
    "ClusterSettings",
    "CorpusSettings",
    "EncoderSettings",
    "EvaluationSettings",
    "InfoNCE",
    "InstanceSmoothing",
    "NegativesSettings",
    "OBJECTIVES",
    "ObjectiveSettings",
    "Pooling",
    "Precision",
    "RETRIEVAL_METRICS",
    "SUITE_METRICS",
    "Settings",
    "TrainSettings",
    "load_settings",
]
