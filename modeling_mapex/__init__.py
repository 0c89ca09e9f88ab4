"""MAPEX: a mixture of modality experts for multi-modal remote sensing, pruned to the modalities of a task in one call.

An independent implementation following arXiv 2507.07527.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForDepthEstimation,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
)

from .configuration_mapex import MapexConfig
from .extension_mapex import add_modality
from .image_processing_mapex import MapexBatchFeature, MapexImageProcessor, terrain_slope
from .masking_mapex import PretrainingNoise
from .modeling_mapex import (
    MapexBackbone,
    MapexForImageClassification,
    MapexForPixelRegression,
    MapexForPreTraining,
    MapexForSemanticSegmentation,
    MapexModel,
    MapexPreTrainedModel,
)
from .pruning_mapex import PrunedCheckpoint, unprune
from .sensors_mapex import SENSORS, Band, Sensor


__version__ = "0.1.0"

__all__ = [
    "SENSORS",
    "Band",
    "MapexBackbone",
    "MapexBatchFeature",
    "MapexConfig",
    "MapexForImageClassification",
    "MapexForPixelRegression",
    "MapexForPreTraining",
    "MapexForSemanticSegmentation",
    "MapexImageProcessor",
    "MapexModel",
    "MapexPreTrainedModel",
    "PretrainingNoise",
    "PrunedCheckpoint",
    "Sensor",
    "add_modality",
    "terrain_slope",
    "unprune",
]


def __getattr__(name: str):
    """`MapexTrainer` on demand: transformers' Trainer takes long to import, and most programs that load models do not
    train any.
    """
    if name == "MapexTrainer":
        from .trainer_mapex import MapexTrainer

        return MapexTrainer
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


AutoConfig.register(MapexConfig.model_type, MapexConfig, exist_ok=True)
AutoModel.register(MapexConfig, MapexModel, exist_ok=True)
AutoModelForPreTraining.register(MapexConfig, MapexForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(MapexConfig, MapexForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(MapexConfig, MapexForSemanticSegmentation, exist_ok=True)
AutoModelForDepthEstimation.register(MapexConfig, MapexForPixelRegression, exist_ok=True)
AutoBackbone.register(MapexConfig, MapexBackbone, exist_ok=True)
AutoImageProcessor.register(MapexConfig, slow_image_processor_class=MapexImageProcessor, exist_ok=True)
