"""What a sparse nnx layer keeps beside its kernel, each a Variable of its own type."""

from flax import nnx


class NMMask(nnx.Variable):
    """The mask of a layer whose recipe keeps one: bool, the shape of its kernel.

    A transformation that names state by type must treat it as the kernel:
    `nnx.StateAxes({nnx.Param: 0, nmjax.nnx.NMMask: 0, ...: None})`. Where two layers
    share one kernel, give them one mask too: `b.nm_mask = a.nm_mask`.
    (`nmjax.sparsify` does where it makes them sparse.)
    """


class NMNumber(NMMask):
    """What is kept beside a mask: β of a soft threshold, τ of a learned mask, an order.

    Its rank is the kernel's, with size 1 along all axes but those that `nnx.vmap` has
    stacked, and the output axis for an order of outputs. It is an `NMMask`, as the two
    below, so that a filter for masks takes all.
    """


class NMFlipRate(NMNumber):
    """Share of the mask's bits that its last refresh changed, float32."""


class NMKey(NMMask):
    """Random bits for training, from `nmjax.nnx.set_key`."""


class NMLogits(nnx.Param):
    """Logits of a learned mask: trained, as `nnx.Param` are; see `nmjax.masks.learned`.

    `nmjax.nnx.logits` and `nmjax.nnx.params` tell them from weights; to train them
    alone, `nnx.grad(loss, argnums=nnx.DiffState(0, nmjax.nnx.NMLogits))`.
    """
