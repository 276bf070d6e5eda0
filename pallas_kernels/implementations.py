"""Which implementation of an element-wise kernel runs.

mosaic     Pallas Mosaic GPU, compiled by jax itself
triton     Triton by way of jax-triton, where this jax has no Mosaic for this GPU
reference  jnp, anywhere
"""

import functools
import importlib
import logging
from typing import Any, Literal, get_args

from pallas_kernels.devices import this_device

Implementation = Literal["mosaic", "triton", "reference"]

# The GPUs, by CUDA's names, on which the tests marked `gpu` passed and the kernel was
# timed against the reference and won. None takes the kernel there and nowhere else.
PROVEN_ON: frozenset[str] = frozenset()

_LOGGER = logging.getLogger(__name__)

_MODULES: dict[Implementation, str] = {
    "mosaic": "pallas_kernels.{}_mosaic",
    "triton": "pallas_kernels.triton.{}",
}


def choose(implementation: Implementation | None, part: str) -> Implementation:
    """The name of what runs `part`, "compression" or "tile_masks".

    Raises:
      ValueError: There is no such implementation.
      NotImplementedError: It cannot run here; the message says why.
    """
    if implementation is None:
        return _best(part)
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"implementation={implementation!r}: expected None or one of "
            f"{get_args(Implementation)}"
        )
    if implementation != "reference":
        reason = module(implementation, part).unavailable()
        if reason:
            raise NotImplementedError(f"implementation={implementation!r}: {reason}")
    return implementation


def available(part: str) -> Implementation:
    """The first kernel of `part` that this device and this jax can run, proven or not.

    Raises:
      NotImplementedError: There is none; the message says why.
    """
    reasons = []
    for name in _MODULES:
        reason = module(name, part).unavailable()
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    raise NotImplementedError(f"{part}: {'; '.join(reasons)}")


def module(name: Implementation, part: str) -> Any:
    """The module of a kernel, loaded where it is used: Mosaic and Triton are large."""
    return importlib.import_module(_MODULES[name].format(part))


def _best(part: str) -> Implementation:
    device = this_device()
    if device is None:
        _say_once(f"{part}: no kernel for this device: plain jnp")
        return "reference"
    if device.name not in PROVEN_ON:
        _say_once(
            f"{part}: no kernel was tested on a {device.name} yet: plain jnp, unless "
            'implementation="mosaic" or "triton" says otherwise'
        )
        return "reference"
    try:
        return available(part)
    except NotImplementedError as error:
        _say_once(f"{error}: plain jnp")
        return "reference"


@functools.cache
def _say_once(message: str) -> None:
    _LOGGER.info(message)
