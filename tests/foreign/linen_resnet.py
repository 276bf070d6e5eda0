"""An ImageNet-style ResNet: layer classes injected by partial, automatic names."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

ModuleDef = Any


class PlainBlock(nn.Module):
    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        shortcut = x
        h = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        h = self.norm(scale_init=nn.initializers.zeros)(
            self.conv(self.filters, (3, 3))(h)
        )
        if shortcut.shape != h.shape:
            shortcut = self.conv(self.filters, (1, 1), self.strides, name="proj_conv")(
                shortcut
            )
            shortcut = self.norm(name="proj_norm")(shortcut)
        return self.act(shortcut + h)


class NeckBlock(nn.Module):
    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        shortcut = x
        h = self.act(self.norm()(self.conv(self.filters, (1, 1))(x)))
        h = self.act(self.norm()(self.conv(self.filters, (3, 3), self.strides)(h)))
        h = self.conv(self.filters * 4, (1, 1))(h)
        h = self.norm(scale_init=nn.initializers.zeros)(h)
        if shortcut.shape != h.shape:
            shortcut = self.conv(
                self.filters * 4, (1, 1), self.strides, name="proj_conv"
            )(shortcut)
            shortcut = self.norm(name="proj_norm")(shortcut)
        return self.act(shortcut + h)


class ImageNetResNet(nn.Module):
    stage_sizes: Sequence[int]
    block_cls: ModuleDef
    num_classes: int
    num_filters: int = 8
    dtype: Any = jnp.float32
    act: Callable = nn.relu
    conv: ModuleDef = nn.Conv
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(self.conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        x = conv(
            self.num_filters,
            (7, 7),
            (2, 2),
            padding=[(3, 3), (3, 3)],
            name="conv_init",
        )(x)
        x = self.act(norm(name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, block_size in enumerate(self.stage_sizes):
            for j in range(block_size):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = self.block_cls(
                    self.num_filters * 2**i,
                    strides=strides,
                    conv=conv,
                    norm=norm,
                    act=self.act,
                )(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return jnp.asarray(x, self.dtype)


TinyResNet = partial(ImageNetResNet, stage_sizes=[1, 1], block_cls=PlainBlock)
TinyResNet50 = partial(ImageNetResNet, stage_sizes=[1, 2], block_cls=NeckBlock)
