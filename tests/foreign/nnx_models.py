"""Networks in flax.nnx, as its users write them."""

from functools import partial

import jax.numpy as jnp
from flax import nnx


class ConvNet(nnx.Module):
    """Convolutions, batch norm, dropout and an MLP head."""

    def __init__(self, num_classes: int = 5, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 16, kernel_size=(3, 3), rngs=rngs)
        self.bn1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(32, momentum=0.9, rngs=rngs)
        self.fc1 = nnx.Linear(32 * 2 * 2, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.fc2 = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.bn2(self.conv2(x)))
        x = x.reshape(x.shape[0], -1)
        x = self.dropout(nnx.relu(self.fc1(x)))
        return self.fc2(x)


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, mlp_dim: int, num_heads: int = 8, *, rngs: nnx.Rngs):
        self.ln1 = nnx.LayerNorm(dim, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            num_heads, in_features=dim, dropout_rate=0.1, decode=False, rngs=rngs
        )
        self.ln2 = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(dim, mlp_dim, rngs=rngs)
        self.down = nnx.Linear(mlp_dim, dim, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.ln1(x))
        h = nnx.gelu(self.up(self.ln2(x)))
        return x + self.dropout(self.down(h))


class Transformer(nnx.Module):
    """A list of blocks between an embedding and a head."""

    def __init__(self, depth=2, dim=128, mlp_dim=256, vocab=32, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.pos = nnx.Param(0.02 * rngs.params.normal((1, 16, dim)))
        self.blocks = nnx.List([Block(dim, mlp_dim, rngs=rngs) for _ in range(depth)])
        self.ln = nnx.LayerNorm(dim, rngs=rngs)
        self.head = nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.pos[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x))


class ScannedTransformer(nnx.Module):
    """The same, with the blocks stacked by vmap and run by scan and remat."""

    def __init__(self, depth=2, dim=128, mlp_dim=256, vocab=32, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make_block(rngs):
            return Block(dim, mlp_dim, rngs=rngs)

        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.blocks = make_block(rngs)
        self.head = nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return self.head(run(self.embed(tokens), self.blocks))


class Mixer(nnx.Module):
    """LinearGeneral and Einsum in place of an attention layer."""

    def __init__(self, dim=32, heads=4, *, rngs: nnx.Rngs):
        head_dim = dim // heads
        self.q = nnx.LinearGeneral(dim, (heads, head_dim), rngs=rngs)
        self.v = nnx.Einsum(
            "bsd,dhk->bshk", (dim, heads, head_dim), (heads, head_dim), rngs=rngs
        )
        self.out = nnx.LinearGeneral((heads, head_dim), dim, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Einsum("bd,cd->bc", (5, dim), rngs=rngs)

    def __call__(self, x):
        y = self.out(nnx.softmax(self.q(x)) * self.v(x))
        return self.head(y.mean(axis=1))


class Autoencoder(nnx.Module):
    """Transposed and depthwise convolutions; `encode` and `decode` entry points."""

    def __init__(self, *, rngs: nnx.Rngs):
        conv = partial(nnx.Conv, rngs=rngs)
        self.encoder = nnx.Sequential(
            conv(3, 8, (3, 3), strides=2),
            nnx.relu,
            conv(8, 8, (3, 3), feature_group_count=8),
            conv(8, 16, (1, 1)),
        )
        self.decoder = nnx.Sequential(
            nnx.ConvTranspose(16, 8, (4, 4), strides=2, rngs=rngs),
            nnx.relu,
            conv(8, 3, (3, 3)),
        )

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


class TiedLM(nnx.Module):
    """A layer under two names, a kernel shared by two layers, one embedding."""

    def __init__(self, vocab=16, dim=32, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.first = nnx.Linear(dim, dim, rngs=rngs)
        self.second = self.first
        self.third = nnx.Linear(dim, dim, rngs=rngs)
        self.third.kernel = self.first.kernel

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in (self.first, self.second, self.third):
            x = x + jnp.tanh(layer(x))
        return self.embed.attend(x)
