"""A transformer language model with every lifting that such code bases use."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


class Mlp(nn.Module):
    hidden: int
    dropout: float = 0.0
    deterministic: bool = True

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = nn.gelu(nn.Dense(self.hidden, name="up")(x))
        x = nn.Dropout(self.dropout, deterministic=self.deterministic)(x)
        return nn.Dense(width, name="down")(x)


class Block(nn.Module):
    """Pre-norm block; returns a carry and None so that it can be scanned."""

    num_heads: int = 8
    mlp_dim: int = 256
    dropout: float = 0.0
    deterministic: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm(name="ln_1")(x)
        h = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dropout_rate=self.dropout,
            deterministic=self.deterministic,
            dtype=self.dtype,
            name="attn",
        )(h, h, mask=mask)
        x = x + nn.Dropout(self.dropout, deterministic=self.deterministic)(h)
        h = nn.LayerNorm(name="ln_2")(x)
        h = Mlp(self.mlp_dim, self.dropout, self.deterministic, name="mlp")(h)
        return x + h, None


JBlock = nn.jit(Block)


class TransformerLM(nn.Module):
    """Decoder-only language model on `(batch, length)` integer tokens."""

    vocab_size: int = 32
    max_len: int = 16
    depth: int = 2
    dim: int = 128
    num_heads: int = 8
    mlp_dim: int = 256
    dropout: float = 0.0
    remat: bool = False
    scan: bool = False
    scan_axis: int = 0
    jit: bool = False

    @nn.compact
    def __call__(self, tokens, *, train: bool = False):
        x = nn.Embed(self.vocab_size, self.dim, name="wte")(tokens)
        pos = self.param(
            "wpe", nn.initializers.normal(0.02), (1, self.max_len, self.dim)
        )
        x = x + pos[:, : tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)

        block = JBlock if self.jit else Block
        if self.remat:
            block = nn.remat(block, prevent_cse=not self.scan)
        fields = {
            "num_heads": self.num_heads,
            "mlp_dim": self.mlp_dim,
            "dropout": self.dropout,
            "deterministic": not train,
        }
        if self.scan:
            layers = nn.scan(
                block,
                variable_axes={"params": self.scan_axis},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            x, _ = layers(**fields, name="blocks")(x, mask)
        else:
            for i in range(self.depth):
                x, _ = block(**fields, name=f"block_{i}")(x, mask)

        x = nn.LayerNorm(name="ln_f")(x)
        return nn.Dense(self.vocab_size, use_bias=False, name="lm_head")(x)


class EnsembleClassifier(nn.Module):
    """Averages the logits of `members` independent blocks, stacked by vmap."""

    members: int = 3
    num_classes: int = 5
    dim: int = 128

    @nn.compact
    def __call__(self, tokens, *, train: bool = False):
        x = nn.Embed(32, self.dim)(tokens)
        members = nn.vmap(
            Block,
            in_axes=None,
            out_axes=0,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            axis_size=self.members,
        )
        x, _ = members(mlp_dim=128, deterministic=not train, name="members")(x, None)
        heads = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            axis_size=self.members,
        )
        logits = heads(self.num_classes, name="heads")(x.mean(axis=2))
        return jnp.mean(logits, axis=0)
