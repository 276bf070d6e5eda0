"""ResNet v1.5 in Flax linen (arXiv:1512.03385), with torchvision's geometry.

Every layer is a plain Flax layer, so that a rule can name it. Layer paths, which are
part of the interface and stay as they are:

    stem, stem_norm                           the first convolution and its norm
    stage{s}_block{b}/conv{i}, .../norm{i}    s and b from 1; i = 1, 2 or 1, 2, 3
    stage{s}_block{b}/downsample              the shortcut's 1x1 convolution, if any
    stage{s}_block{b}/downsample_norm
    head                                      the classifier
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

ModuleDef = Callable[..., Any]

STEMS = ("imagenet", "small")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18 and ResNet-34.

    Attributes:
      features: Channels of the result.
      stride: Stride of the first convolution and of the shortcut.
      conv: Makes a convolution, as `nn.Conv` without bias.
      norm: Makes a normalisation layer, as `nn.BatchNorm`.
      last_scale_init: Initialiser of the scale of the last norm.
    """

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    last_scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., H, W, C)` to `(..., H/stride, W/stride, features)`."""
        y = self.conv(
            self.features, (3, 3), strides=self.stride, padding=1, name="conv1"
        )(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, (3, 3), padding=1, name="conv2")(y)
        y = self.norm(scale_init=self.last_scale_init, name="norm2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = self.conv(
                self.features, (1, 1), strides=self.stride, name="downsample"
            )(x)
            x = self.norm(name="downsample_norm")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: the block of ResNet-50 and deeper.

    The stride is on the 3x3 convolution ("v1.5"), as torchvision has it; the paper has
    it on the first 1x1. The result has four times `features` channels.

    Attributes:
      features: Channels of the 3x3 convolution.
      stride: Stride of the 3x3 convolution and of the shortcut.
      conv: Makes a convolution, as `nn.Conv` without bias.
      norm: Makes a normalisation layer, as `nn.BatchNorm`.
      last_scale_init: Initialiser of the scale of the last norm.
    """

    features: int
    stride: int
    conv: ModuleDef
    norm: ModuleDef
    last_scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., H, W, C)` to `(..., H/stride, W/stride, 4 * features)`."""
        out = 4 * self.features
        y = self.conv(self.features, (1, 1), name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(
            self.features, (3, 3), strides=self.stride, padding=1, name="conv2"
        )(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(out, (1, 1), name="conv3")(y)
        y = self.norm(scale_init=self.last_scale_init, name="norm3")(y)
        if self.stride != 1 or x.shape[-1] != out:
            x = self.conv(out, (1, 1), strides=self.stride, name="downsample")(x)
            x = self.norm(name="downsample_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network for image classification.

    Parameters are float32 whatever the compute `dtype`; batch statistics, the pooled
    features and the classifier are computed in float32. Convolutions start from He's
    normal distribution over the fan-out (arXiv:1502.01852), the classifier from
    Flax's default.

    Attributes:
      stage_sizes: Blocks in each stage. The first block of every stage but the first
        has stride 2, and each stage has twice the features of the one before.
      block: `BasicBlock`, `Bottleneck`, or a module with their fields.
      num_classes: Size of the result.
      width: Features of the stem and of the first stage.
      stem: "imagenet": 7x7 convolution of stride 2 and 3x3 max pooling of stride 2;
        "small": 3x3 convolution of stride 1, for images such as CIFAR's.
      dtype: Compute dtype of convolutions and norms.
      conv: Class of every convolution: `nn.Conv` or one with its fields.
      norm: Class of every norm: `nn.BatchNorm` or one with its fields, for example
        `functools.partial(nn.BatchNorm, axis_name="batch")` under `shard_map`.
      zero_init_residual: Start the last norm of each block at scale 0, so that each
        block starts as its shortcut (arXiv:1706.02677, section 5.1).

    Raises:
      ValueError: `stem` is not one of the names above.
    """

    stage_sizes: Sequence[int]
    block: ModuleDef
    num_classes: int = 1000
    width: int = 64
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    conv: ModuleDef = nn.Conv
    norm: ModuleDef = nn.BatchNorm
    zero_init_residual: bool = False

    def __post_init__(self):
        """Refuses an unknown stem before anything is traced."""
        if self.stem not in STEMS:
            raise ValueError(f"stem {self.stem!r} is none of: {', '.join(STEMS)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Classifies images.

        Args:
          images: `(batch, height, width, channels)`, any float dtype.
          train: Normalise with the statistics of the batch, and update the running
            ones in collection `"batch_stats"`, which must then be mutable. Otherwise
            normalise with the running ones.

        Returns:
          Logits `(batch, num_classes)`, float32.
        """
        conv = functools.partial(
            self.conv,
            use_bias=False,
            padding=0,
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
        )
        norm = functools.partial(
            self.norm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        last_scale_init = (
            nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones
        )

        # Padding is explicit: SAME would pad an even image by (0, 1) at stride 2 where
        # torchvision pads by (1, 1), and its weights would meet shifted images.
        if self.stem == "imagenet":
            x = conv(self.width, (7, 7), strides=2, padding=3, name="stem")(images)
            x = nn.relu(norm(name="stem_norm")(x))
            pad: Any = ((1, 1), (1, 1))  # Flax takes pairs too, its annotation does not
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=pad)
        else:
            x = conv(self.width, (3, 3), padding=1, name="stem")(images)
            x = nn.relu(norm(name="stem_norm")(x))

        for s, size in enumerate(self.stage_sizes):
            for b in range(size):
                x = self.block(
                    features=self.width * 2**s,
                    stride=2 if s > 0 and b == 0 else 1,
                    conv=conv,
                    norm=norm,
                    last_scale_init=last_scale_init,
                    name=f"stage{s + 1}_block{b + 1}",
                )(x)

        x = jnp.mean(x.astype(jnp.float32), axis=(-3, -2))  # (batch, channels)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)


_basic = functools.partial(ResNet, block=BasicBlock)
_bottleneck = functools.partial(ResNet, block=Bottleneck)

ResNet8 = functools.partial(_basic, stage_sizes=(1, 1, 1), width=16, stem="small")
ResNet18 = functools.partial(_basic, stage_sizes=(2, 2, 2, 2))
ResNet34 = functools.partial(_basic, stage_sizes=(3, 4, 6, 3))
ResNet50 = functools.partial(_bottleneck, stage_sizes=(3, 4, 6, 3))
ResNet101 = functools.partial(_bottleneck, stage_sizes=(3, 4, 23, 3))
ResNet152 = functools.partial(_bottleneck, stage_sizes=(3, 8, 36, 3))
