"""Sparse Flax nnx models: layers with `recipe=`, and what a model's masks are.

The layers are Flax's own, with one more argument; without it they are exactly Flax's:

    nmjax.nnx.Linear(512, 1024, recipe="2:4", rngs=rngs)

`nmjax.sparsify` gives the layers of a clone these classes and leaves everything else
as it is: the clone holds the same Variables in the same places. Code that reads the
kernel of a layer by hand (`model.head.kernel[...]`) reads the dense master weight.

Masks that outlive a step live in the layer as `NMMask`, logits of learned masks as
`NMLogits`, and random bits come by `set_key`. The rest of the library takes
nested dictionaries, which `params` and `state` read off a model:

    nmjax.check(nmjax.nnx.params(model), plan, nmjax.nnx.state(model))
"""

from nmjax.nnx.layers import Conv as Conv
from nmjax.nnx.layers import ConvTranspose as ConvTranspose
from nmjax.nnx.layers import Einsum as Einsum
from nmjax.nnx.layers import Linear as Linear
from nmjax.nnx.layers import LinearGeneral as LinearGeneral
from nmjax.nnx.model import densify as densify
from nmjax.nnx.model import logits as logits
from nmjax.nnx.model import params as params
from nmjax.nnx.model import plan as plan
from nmjax.nnx.model import refresh as refresh
from nmjax.nnx.model import set_key as set_key
from nmjax.nnx.model import set_state as set_state
from nmjax.nnx.model import sparsify as sparsify
from nmjax.nnx.model import state as state
from nmjax.nnx.variables import NMFlipRate as NMFlipRate
from nmjax.nnx.variables import NMKey as NMKey
from nmjax.nnx.variables import NMLogits as NMLogits
from nmjax.nnx.variables import NMMask as NMMask
from nmjax.nnx.variables import NMNumber as NMNumber
