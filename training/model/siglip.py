"""The image encoder: SigLIP's vision transformer, and a convolutional stem for small models.

Legend: B images, M tokens per image, W width, S image side in pixels.
"""

from collections.abc import MutableSequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ki_vla_ros.errors import ConfigurationError
from training.model.gemma import as_layers, check_sizes, softmax_attention


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image encoder. `patch_size` is also the total stride of the convolutional stem."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp: int
    stem: Literal["patch", "conv"] = "patch"

    def __post_init__(self) -> None:
        check_sizes("vision", self, multiples={"image_size": "patch_size", "width": "heads"})
        if self.stem not in ("patch", "conv"):
            raise ConfigurationError(f"vision.stem: expected 'patch' or 'conv', got {self.stem!r}")
        if self.stem == "conv" and not self.width >> (len(prime_factors(self.patch_size)) - 1):
            raise ConfigurationError(
                f"vision.width: expected at least a channel in each layer of the stem, got {self.width} for patch_size "
                f"{self.patch_size}"
            )

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return (self.image_size // self.patch_size) ** 2


def prime_factors(number: int) -> list[int]:
    """The prime factors in rising order: 12 -> [2, 2, 3]."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors


def patch_stem(config: VisionConfig) -> nn.Module:
    """SigLIP's patch embedding: each token sees exactly its own cell."""
    return nn.Conv2d(3, config.width, config.patch_size, config.patch_size)


def conv_stem(config: VisionConfig) -> nn.Module:
    """One strided convolution per prime factor of the patch size, channels doubling up to the width.

    It learns colours and shapes from far fewer images than a patch embedding, and its cells overlap.
    """
    strides = prime_factors(config.patch_size)
    channels = [3] + [config.width >> shift for shift in reversed(range(len(strides)))]
    layers: list[nn.Module] = []
    for (before, after), stride in zip(pairwise(channels), strides, strict=True):
        kernel = stride + 1 + stride % 2  # odd, and always wider than the stride
        layers += [nn.Conv2d(before, after, kernel, stride, padding=1), nn.GELU("tanh")]
    return nn.Sequential(*layers[:-1])


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever the type of the input."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class VisionLayer(nn.Module):
    """Pre-norm transformer layer with biases; every token sees every token of its image."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, config.mlp)
        self.down = nn.Linear(config.mlp, width)

    def project(self, x_BMW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, M, W]."""
        return self.q(x_BMW), self.k(x_BMW), self.v(x_BMW)

    def forward(self, x_BMW: Tensor) -> Tensor:
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projected in self.project(self.norm1(x_BMW))
        )
        seen = softmax_attention(query, key, value).transpose(1, 2).flatten(2)
        x_BMW = x_BMW + self.out(seen)
        return x_BMW + self.down(F.gelu(self.up(self.norm2(x_BMW)), approximate="tanh"))


class Vision(nn.Module):
    """From images in [-1, 1] to tokens in raster order."""

    layers: MutableSequence[VisionLayer]

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.stem = patch_stem(config) if config.stem == "patch" else conv_stem(config)
        self.position = nn.Embedding(config.tokens, config.width)
        self.layers = as_layers(VisionLayer(config) for _ in range(config.depth))
        self.norm = LayerNorm(config.width, eps=1e-6)

    def forward(self, images_BCSS: Tensor) -> Tensor:
        # Channels last: a third faster on a CPU, and the tokens come out in the order that the layers want.
        map_BWHH = self.stem(images_BCSS.contiguous(memory_format=torch.channels_last))
        x_BMW = map_BWHH.flatten(2).transpose(1, 2) + self.position.weight
        for layer in self.layers:
            x_BMW = layer(x_BMW.to(layer.out.weight.dtype))
        return self.norm(x_BMW)
