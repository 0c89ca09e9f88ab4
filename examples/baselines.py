"""Supervised convolutional networks of about the size of a pruned mapex-nano, with the inputs and outputs of MAPEX's
heads: what a user would train instead. `--convnet` of the fine-tuning scripts takes them.

All sensors, at the size of the one with the smallest pixels, are the channels of one image; a sensor that a sample
lacks is zero, and a channel says so.
"""

from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel, ResNetConfig, ResNetModel
from transformers.modeling_outputs import ImageClassifierOutput, SemanticSegmenterOutput

from modeling_mapex import (
    MapexConfig,
    MapexForImageClassification,
    MapexForPixelRegression,
    MapexForSemanticSegmentation,
)
from modeling_mapex.modeling_mapex import MapexPixelRegressionOutput
from modeling_mapex.task_losses_mapex import weighted_cross_entropy
from modeling_mapex.tokens_mapex import pixels_that_count


def resized(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps `(batch_size, channels, height, width)` at another height and width."""
    return nn.functional.interpolate(values, size=size, mode="bilinear", align_corners=False)


def to_image(
    config: MapexConfig,
    pixel_values: dict[str, torch.Tensor],
    modality_mask: dict[str, torch.BoolTensor] | None = None,
    valid_mask: dict[str, torch.BoolTensor] | None = None,
) -> torch.Tensor:
    """All sensors as one image `(batch_size, bands + sensors, height, width)`."""
    names = list(config.modalities)
    reference = min(pixel_values, key=lambda name: config.modalities[name]["gsd"])
    batch_size, _, *size = pixel_values[reference].shape
    channels = []
    for name in names:
        bands = len(config.modalities[name]["bands"])
        if name not in pixel_values:
            channels.append(pixel_values[reference].new_zeros(batch_size, bands + 1, *size))
            continue
        pixels, there = pixels_that_count(name, pixel_values, modality_mask, valid_mask)
        there = torch.ones_like(pixels[:, :1]) if there is None else there.to(pixels.dtype)
        image = torch.cat([pixels, there], dim=1)
        channels.append(resized(image, size))
    return torch.cat(channels, dim=1)


class ConvNet(PreTrainedModel):
    """What the networks share: the configuration of MAPEX, whose sensors, labels and losses they take."""

    config_class = MapexConfig
    main_input_name = "flattened_pixel_values"  # inputs are dictionaries, as MAPEX's
    accepts_loss_kwargs = False
    base_model_prefix = "network"

    def __init__(self, config: MapexConfig):
        super().__init__(config)
        self.num_channels = sum(len(spec["bands"]) + 1 for spec in config.modalities.values())

    def _init_weights(self, module: nn.Module) -> None:
        """As torch's own layers begin."""


class ResNetClassifier(ConvNet):
    """transformers' ResNet with eight residual layers of 32 to 256 channels, for chips of tens of pixels."""

    def __init__(self, config: MapexConfig):
        super().__init__(config)
        self.network = ResNetModel(
            ResNetConfig(
                num_channels=self.num_channels,
                embedding_size=32,
                hidden_sizes=[32, 64, 128, 256],
                depths=[1, 1, 1, 1],
                layer_type="basic",
            )
        )
        self.classifier = nn.Linear(256, config.num_labels)

    def forward(self, pixel_values, modality_mask=None, valid_mask=None, gsd=None, labels=None):
        features = self.network(to_image(self.config, pixel_values, modality_mask, valid_mask)).pooler_output.flatten(1)
        logits = self.classifier(features)
        if labels is None:
            return ImageClassifierOutput(logits=logits)
        if self.config.problem_type == "multi_label_classification":
            loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        else:
            loss = weighted_cross_entropy(logits, labels, self.config.class_weights)
        return ImageClassifierOutput(loss=loss, logits=logits)


class DoubleConvolution(nn.Sequential):
    """Twice: 3 x 3 convolution, normalisation over the batch, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        layers = []
        for channels in (in_channels, out_channels):
            layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)]
            layers += [nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet(nn.Module):
    """A U-Net (Ronneberger et al., arXiv 1505.04597) of four levels."""

    def __init__(self, in_channels: int, out_channels: int, widths: tuple[int, ...] = (24, 48, 96, 192)):
        super().__init__()
        pairs = list(pairwise(widths))
        self.first = DoubleConvolution(in_channels, widths[0])
        self.down = nn.ModuleList(DoubleConvolution(*pair) for pair in pairs)
        self.up = nn.ModuleList(DoubleConvolution(narrow + wide, narrow) for narrow, wide in reversed(pairs))
        self.last = nn.Conv2d(widths[0], out_channels, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        levels = [self.first(image)]
        for block in self.down:
            levels.append(block(nn.functional.max_pool2d(levels[-1], 2)))
        features = levels.pop()
        for block in self.up:
            level = levels.pop()
            features = block(torch.cat([level, resized(features, level.shape[-2:])], dim=1))
        return self.last(features)


class UNetModel(ConvNet):
    """A U-Net from all sensors to maps."""

    def __init__(self, config: MapexConfig, out_channels: int):
        super().__init__(config)
        self.network = UNet(self.num_channels, out_channels)

    def maps(self, pixel_values, modality_mask, valid_mask, labels, output_size) -> torch.Tensor:
        """`(batch_size, out_channels, height, width)`, at the size of the labels, or of `output_size`, if given."""
        values = self.network(to_image(self.config, pixel_values, modality_mask, valid_mask))
        size = output_size if labels is None else labels.shape[-2:]
        return values if size is None else resized(values, size)


class UNetSegmenter(UNetModel):
    """A class for each pixel."""

    map_loss = MapexForSemanticSegmentation.map_loss

    def __init__(self, config: MapexConfig):
        super().__init__(config, config.num_labels)

    def forward(self, pixel_values, modality_mask=None, valid_mask=None, gsd=None, labels=None, output_size=None):
        logits = self.maps(pixel_values, modality_mask, valid_mask, labels, output_size)
        return SemanticSegmenterOutput(None if labels is None else self.map_loss(logits, labels), logits)


class UNetRegressor(UNetModel):
    """A value for each pixel."""

    map_loss = MapexForPixelRegression.map_loss

    def __init__(self, config: MapexConfig):
        super().__init__(config, 1)

    def forward(self, pixel_values, modality_mask=None, valid_mask=None, gsd=None, labels=None, output_size=None):
        values = self.maps(pixel_values, modality_mask, valid_mask, labels, output_size).squeeze(1).float()
        values = values * self.config.label_std + self.config.label_mean
        return MapexPixelRegressionOutput(None if labels is None else self.map_loss(values, labels), values)


BASELINES: dict[type, type[ConvNet]] = {
    MapexForImageClassification: ResNetClassifier,
    MapexForSemanticSegmentation: UNetSegmenter,
    MapexForPixelRegression: UNetRegressor,
}
