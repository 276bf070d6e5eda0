"""Models written by other people, for tests to make sparse.

The modules beside this one know nothing of nmjax: each is what its author would have
written. `MODELS` says for each how to build and to call it, and, as the oracle of
plans, which of its weights 2:4 can act on and which axes their GEMMs contract.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from . import linen_layers, linen_resnet, linen_transformer, nnx_models

Axes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class ForeignModel:
    """One model and what a test needs to know of it.

    Attributes:
      api: "linen" or "nnx".
      make: Makes the module; takes `rngs` for nnx.
      inputs: Makes the positional arguments of a call.
      layers: `layer path -> kernel axes that the GEMM contracts`, for each layer that
        can be 2:4. Axes count from the end of the kernel as stored, with the axes that
        scan and vmap stack.
      dense: `parameter path -> why`, for each other weight of rank 2 and more.
      kwargs: Keyword arguments of an evaluating call.
      train_kwargs: Keyword arguments of a training call.
      mutable: Collections that a training call updates (linen).
      streams: Random streams of a training call (linen).
      methods: `entry point besides __call__ -> its example arguments`.
      notes: What is special.
    """

    api: Literal["linen", "nnx"]
    make: Callable[..., Any]
    inputs: Callable[[], tuple]
    layers: Axes
    dense: Mapping[str, str]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mutable: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    methods: Mapping[str, Callable[[], tuple]] = dataclasses.field(default_factory=dict)
    notes: str = ""

    def build(self, seed: int = 0) -> Any:
        """A module; for nnx with values, in training mode."""
        if self.api == "linen":
            return self.make()
        # Without running the initialisers: compiling them one by one takes a minute.
        model = nnx.eval_shape(lambda: self.make(rngs=nnx.Rngs(0)))
        nnx.update(model, draw(nnx.state(model), seed))
        model.train()  # sets flags that attention asks for and init leaves unset
        return model

    def variables(self, seed: int = 0) -> Any:
        """Variables of a linen model, drawn without running its initialisers."""
        init = partial(self.make().init, **self.kwargs)
        return draw(jax.eval_shape(init, jax.random.key(0), *self.inputs()), seed)

    def rngs(self, seed: int = 0) -> dict[str, jax.Array]:
        """Keys for the streams of a training call (linen)."""
        keys = jax.random.split(jax.random.key(seed), 1 + len(self.streams))
        return dict(zip(self.streams, keys[1:], strict=True))


def draw(shapes: Any, seed: int) -> Any:
    """Arrays for a tree of `ShapeDtypeStruct`: the same for the same seed and tree."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(seed), leaf.shape)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = jax.tree_util.keystr(path)
        if "['var']" in name or "['scale']" in name:
            value = rng.uniform(0.5, 1.5, leaf.shape)
        else:
            value = rng.normal(0, 0.2, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _floats(*shape: int) -> Callable[[], tuple]:
    return lambda: (np.random.default_rng(1).normal(size=shape).astype(np.float32),)


def _tokens() -> tuple:
    return (np.random.default_rng(1).integers(0, 16, (2, 8), np.int32),)


def _under(prefix: str, axes: Axes) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}/{path}": value for path, value in axes.items()}


def _all(axes: tuple[int, ...], *paths: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(paths, axes)


_ATTENTION = {
    **_all((-3,), "attn/query", "attn/key", "attn/value"),  # (d, heads, head_dim)
    "attn/out": (-3, -2),  # (heads, head_dim, d)
}
_BLOCK = {**_ATTENTION, **_all((-2,), "mlp/up", "mlp/down")}
_BLOCK_STACKED_AT_1 = {
    **_all((-4,), "attn/query", "attn/key", "attn/value"),  # (d, depth, heads, ...)
    "attn/out": (-4, -2),  # (heads, depth, head_dim, d)
    **_all((-3,), "mlp/up", "mlp/down"),  # (d_in, depth, d_out)
}
_NNX_BLOCK = {**_ATTENTION, **_all((-2,), "up", "down")}

_linen = partial(ForeignModel, "linen")
_nnx = partial(ForeignModel, "nnx")


def _transformer(notes: str, layers: Axes, **fields: Any) -> ForeignModel:
    return _linen(
        partial(linen_transformer.TransformerLM, **fields),
        _tokens,
        layers={**layers, "lm_head": (-2,)},
        dense={"wte/embedding": "embedding", "wpe": "own parameter"},
        kwargs={"train": False},
        train_kwargs={"train": True},
        streams=("dropout",) if fields.get("dropout") else (),
        notes=notes,
    )


_LOOP = {**_under("block_0", _BLOCK), **_under("block_1", _BLOCK)}

MODELS: dict[str, ForeignModel] = {
    "linen_resnet": _linen(
        partial(linen_resnet.TinyResNet, num_classes=5),
        _floats(2, 16, 16, 3),
        layers={
            **_all((-2,), "PlainBlock_0/Conv_0", "PlainBlock_0/Conv_1"),
            **_all((-2,), "PlainBlock_1/Conv_0", "PlainBlock_1/Conv_1"),
            **_all((-2,), "PlainBlock_1/proj_conv", "Dense_0"),
        },
        dense={"conv_init/kernel": "3 input channels"},
        kwargs={"train": False},
        train_kwargs={"train": True},
        mutable=("batch_stats",),
        notes="partial(nn.Conv), batch norm, automatic names; a list as a field",
    ),
    "linen_resnet50": _linen(
        partial(linen_resnet.TinyResNet50, num_classes=5),
        _floats(2, 16, 16, 3),
        layers={
            **{
                f"NeckBlock_{i}/{conv}": (-2,)
                for i in range(3)
                for conv in ("Conv_0", "Conv_1", "Conv_2", "proj_conv")
                if (i, conv) != (2, "proj_conv")
            },
            "Dense_0": (-2,),
        },
        dense={"conv_init/kernel": "3 input channels"},
        kwargs={"train": False},
        train_kwargs={"train": True},
        mutable=("batch_stats",),
        notes="bottleneck blocks",
    ),
    "linen_transformer": _transformer(
        "a loop over blocks, dropout", _LOOP, dropout=0.1
    ),
    "linen_transformer_remat": _transformer("nn.remat", _LOOP, remat=True),
    "linen_transformer_jit": _transformer(
        "nn.jit(Block) at module level: both blocks share one trace", _LOOP, jit=True
    ),
    "linen_transformer_scan": _transformer(
        "nn.scan, parameters stacked at axis 0; no other collection is lifted",
        _under("blocks", _BLOCK),
        scan=True,
        dropout=0.1,
    ),
    "linen_transformer_scan_remat": _transformer(
        "nn.scan over nn.remat", _under("blocks", _BLOCK), scan=True, remat=True
    ),
    "linen_transformer_scan_axis_1": _transformer(
        "nn.scan, parameters stacked at axis 1",
        _under("blocks", _BLOCK_STACKED_AT_1),
        scan=True,
        scan_axis=1,
    ),
    "linen_ensemble": _linen(
        linen_transformer.EnsembleClassifier,
        _tokens,
        layers={**_under("members", _BLOCK), "heads": (-2,)},
        dense={"Embed_0/embedding": "embedding"},
        kwargs={"train": False},
        train_kwargs={"train": True},
        notes="nn.vmap over parameters, of a block and of a bare nn.Dense",
    ),
    "linen_vae": _linen(
        linen_layers.VAE,
        _floats(2, 64),
        layers=_all(
            (-2,),
            "encoder/hidden",
            "encoder/mean",
            "encoder/logvar",
            "decoder/layers_0",
            "decoder/layers_2",
        ),
        dense={},
        kwargs={"train": False},
        train_kwargs={"train": True},
        streams=("noise",),
        methods={"encode": _floats(2, 64), "decode": _floats(2, 8)},
        notes="setup style, nn.Sequential, method=; a tuple as result",
    ),
    "linen_own_parameters": _linen(
        linen_layers.GatedMlp,
        _floats(2, 32),
        layers={"Dense_0": (-2,)},
        dense={"gates": "own parameter", "Projection_0/w": "own parameter"},
        notes="self.param and jnp.einsum by hand, at the root and in a child",
    ),
    "linen_mobilenet": _linen(
        linen_layers.MobileNet,
        _floats(2, 16, 16, 3),
        layers=_all((-2,), "pointwise", "grouped", "classifier"),
        dense={
            "stem/kernel": "3 input channels",
            "depthwise/kernel": "depthwise",
            "multiplier/kernel": "depthwise",
        },
        notes="depthwise, pointwise and grouped convolutions",
    ),
    "linen_image_decoder": _linen(
        linen_layers.ImageDecoder,
        _floats(2, 8),
        layers={
            "Dense_0": (-2,),
            "ConvTranspose_0": (-2,),
            "ConvTranspose_1": (-1,),  # transpose_kernel: (h, w, c_out, c_in)
            "Conv_0": (-2,),
        },
        dense={},
        notes="nn.ConvTranspose, with transpose_kernel off and on",
    ),
    "linen_einsum": _linen(
        linen_layers.EinsumMixer,
        _floats(2, 6, 32),
        layers={**_all((-3,), "q", "v"), "out": (-3, -2), "head": (-1,)},
        dense={},
        notes="nn.Einsum: the axes are in the equation only",
    ),
    "linen_partitioned": _linen(
        linen_layers.PartitionedMlp,
        _floats(2, 16),
        layers=_all((-2,), "wi", "wo"),
        dense={},
        notes="init returns nn.Partitioned boxes; apply takes them boxed or unboxed",
    ),
    "linen_tied": _linen(
        linen_layers.TiedLM,
        _tokens,
        layers={"shared": (-2,)},
        dense={"embed/embedding": "embedding"},
        notes="a Dense applied twice; Embed.attend",
    ),
    "linen_text_cnn": _linen(
        linen_layers.TextCNN,
        _tokens,
        layers=_all((-2,), "Conv_0", "Conv_1", "Dense_0"),
        dense={"Embed_0/embedding": "embedding"},
        notes="1-D convolutions, one causal and dilated",
    ),
    "linen_rnn": _linen(
        linen_layers.Tagger,
        _tokens,
        layers={
            **_all((-2,), *(f"GRUCell_0/{a}{b}" for a in "hi" for b in "nrz")),
            "Dense_0": (-2,),
        },
        dense={
            "Embed_0/embedding": "embedding",
            **{
                f"OptimizedLSTMCell_0/{a}{b}/kernel": "own parameter"
                for a in "hi"
                for b in "fgio"
            },
        },
        notes="nn.RNN broadcasts params in a scan; the LSTM's kernels have no layer",
    ),
    "nnx_conv_net": _nnx(
        nnx_models.ConvNet,
        _floats(2, 8, 8, 3),
        layers=_all((-2,), "conv2", "fc1", "fc2"),
        dense={"conv1/kernel": "3 input channels"},
        notes="batch norm and dropout",
    ),
    "nnx_transformer": _nnx(
        nnx_models.Transformer,
        _tokens,
        layers={
            **_under("blocks/0", _NNX_BLOCK),
            **_under("blocks/1", _NNX_BLOCK),
            "head": (-2,),
        },
        dense={"embed/embedding": "embedding", "pos": "own parameter"},
        notes="nnx.List of blocks: the paths hold integers",
    ),
    "nnx_transformer_scan": _nnx(
        nnx_models.ScannedTransformer,
        _tokens,
        layers={**_under("blocks", _NNX_BLOCK), "head": (-2,)},
        dense={"embed/embedding": "embedding"},
        notes="blocks made by nnx.vmap, run by nnx.scan over nnx.remat",
    ),
    "nnx_mixer": _nnx(
        nnx_models.Mixer,
        _floats(2, 6, 32),
        layers={**_all((-3,), "q", "v"), "out": (-3, -2), "head": (-1,)},
        dense={},
        notes="nnx.LinearGeneral and nnx.Einsum",
    ),
    "nnx_autoencoder": _nnx(
        nnx_models.Autoencoder,
        _floats(2, 8, 8, 3),
        layers=_all((-2,), "encoder/layers/3", "decoder/layers/0", "decoder/layers/2"),
        dense={
            "encoder/layers/0/kernel": "3 input channels",
            "encoder/layers/2/kernel": "depthwise",
        },
        methods={"encode": _floats(2, 8, 8, 3), "decode": _floats(2, 4, 4, 16)},
        notes="nnx.ConvTranspose, depthwise, nnx.Sequential, further entry points",
    ),
    "nnx_tied": _nnx(
        nnx_models.TiedLM,
        _tokens,
        layers={"first": (-2,)},
        dense={"embed/embedding": "embedding"},
        notes="a layer under two names, a kernel in two layers: one path in the state",
    ),
}
