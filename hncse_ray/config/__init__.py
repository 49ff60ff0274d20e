"""Every setting of a run, read from YAML, changed by ``a.b=c`` overrides, checked as a whole."""

from hncse_ray.config.load import load_settings
from hncse_ray.config.sections import (
    OBJECTIVES,
    RETRIEVAL_METRICS,
    ClusterSettings,
    CorpusSettings,
    EncoderSettings,
    EvaluationSettings,
    InfoNCE,
    InstanceSmoothing,
    LoraSettings,
    NegativesSettings,
    ObjectiveSettings,
    Pooling,
    Precision,
    Settings,
    TrainSettings,
)

__all__ = [
    "ClusterSettings",
    "CorpusSettings",
    "EncoderSettings",
    "EvaluationSettings",
    "InfoNCE",
    "InstanceSmoothing",
    "LoraSettings",
    "NegativesSettings",
    "OBJECTIVES",
    "ObjectiveSettings",
    "Pooling",
    "Precision",
    "RETRIEVAL_METRICS",
    "Settings",
    "TrainSettings",
    "load_settings",
]
