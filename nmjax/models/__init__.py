"""Networks to train, in Flax linen. None of them knows about sparsity."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from nmjax.models.resnet import ResNet as ResNet
from nmjax.models.resnet import ResNet8 as ResNet8
from nmjax.models.resnet import ResNet18 as ResNet18
from nmjax.models.resnet import ResNet34 as ResNet34
from nmjax.models.resnet import ResNet50 as ResNet50
from nmjax.models.resnet import ResNet101 as ResNet101
from nmjax.models.resnet import ResNet152 as ResNet152

_MODELS = {
    "resnet8": ResNet8,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "resnet152": ResNet152,
}

NAMES = tuple(_MODELS)


def create(
    name: str,
    num_classes: int = 1000,
    stem: str | None = None,
    dtype: Any = jnp.float32,
    **fields: Any,
) -> nn.Module:
    """Makes a model by name.

    Args:
      name: One of `NAMES`, such as "resnet50".
      num_classes: Size of the result.
      stem: "imagenet" or "small"; None is the model's own: "small" for ResNet-8,
        "imagenet" for the others.
      dtype: Compute dtype; parameters are float32.
      **fields: Further fields of the model, such as `width` or `conv`.

    Returns:
      A linen module called as `model.apply(variables, images, train=...)`.

    Raises:
      ValueError: No model has this name, or no stem.
    """
    if name not in _MODELS:
        raise ValueError(f"model {name!r} is none of: {', '.join(NAMES)}")
    if stem is not None:
        fields["stem"] = stem
    return _MODELS[name](num_classes=num_classes, dtype=dtype, **fields)
