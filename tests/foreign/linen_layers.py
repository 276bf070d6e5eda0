"""Small linen networks, each around one layer or habit that is a special case."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Encoder(nn.Module):
    latents: int

    def setup(self):
        self.hidden = nn.Dense(32)
        self.mean = nn.Dense(self.latents)
        self.logvar = nn.Dense(self.latents)

    def __call__(self, x):
        x = nn.relu(self.hidden(x))
        return self.mean(x), self.logvar(x)


class VAE(nn.Module):
    """In setup style, with entry points besides `__call__`."""

    latents: int = 8
    features: int = 64

    def setup(self):
        self.encoder = Encoder(self.latents)
        self.decoder = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(self.features)])

    def __call__(self, x, train: bool = False):
        mean, logvar = self.encode(x)
        z = mean
        if train:
            noise = jax.random.normal(self.make_rng("noise"), mean.shape)
            z = mean + jnp.exp(0.5 * logvar) * noise
        return self.decode(z), mean, logvar

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return nn.sigmoid(self.decoder(z))


class Projection(nn.Module):
    """A linear map that owns its weight."""

    features: int

    @nn.compact
    def __call__(self, x):
        w = self.param(
            "w", nn.initializers.xavier_uniform(), (x.shape[-1], self.features)
        )
        return jnp.einsum("...i,ij->...j", x, w)


class GatedMlp(nn.Module):
    """Parameters used by hand at the root and in a child, next to a Dense."""

    hidden: int = 32

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(batch_axis=0)
        gates = self.param("gates", init, (2, x.shape[-1], self.hidden))
        gate, value = jnp.einsum("bi,gij->gbj", x, gates)
        h = Projection(self.hidden)(nn.silu(gate) * value)
        return nn.Dense(5)(h)


class MobileNet(nn.Module):
    """Depthwise, pointwise and grouped convolutions, with group norm."""

    num_classes: int = 5

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="stem")(x))
        x = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x)
        x = nn.relu(nn.GroupNorm(num_groups=4)(x))
        x = nn.Conv(32, (1, 1), name="pointwise")(x)
        x = nn.relu(nn.GroupNorm(num_groups=4)(x))
        x = nn.Conv(32, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.Conv(64, (3, 3), strides=2, feature_group_count=32, name="multiplier")(x)
        x = nn.relu(x).mean(axis=(1, 2))
        return nn.Dense(self.num_classes, name="classifier")(x)


class ImageDecoder(nn.Module):
    """From a latent vector to an image through transposed convolutions."""

    @nn.compact
    def __call__(self, z):
        x = nn.relu(nn.Dense(4 * 4 * 16)(z)).reshape(-1, 4, 4, 16)
        x = nn.relu(nn.ConvTranspose(8, (4, 4), strides=(2, 2))(x))
        x = nn.relu(
            nn.ConvTranspose(12, (3, 3), strides=(2, 2), transpose_kernel=True)(x)
        )
        return nn.Conv(3, (3, 3))(x)


class EinsumMixer(nn.Module):
    """Projections written as equations, as in attention code."""

    heads: int = 4

    @nn.compact
    def __call__(self, x):
        dim = x.shape[-1]
        head_dim = dim // self.heads
        split = (dim, self.heads, head_dim)
        q = nn.Einsum(split, "bsd,dhk->bshk", name="q")(x)
        v = nn.Einsum(split, "bsd,dhk->bshk", use_bias=False, name="v")(x)
        join = (self.heads, head_dim, dim)
        y = nn.Einsum(join, "bshk,hkd->bsd", name="out")(nn.softmax(q) * v)
        # The output features come first in the kernel, as in PyTorch.
        return nn.Einsum((5, dim), name="head")(y.mean(axis=1), "bd,cd->bc")


class PartitionedMlp(nn.Module):
    """Parameters annotated with mesh axis names, as for tensor parallelism."""

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(
            32,
            kernel_init=nn.with_partitioning(init, (None, "model")),
            bias_init=nn.with_partitioning(nn.initializers.zeros, ("model",)),
            name="wi",
        )(x)
        return nn.Dense(
            16, kernel_init=nn.with_partitioning(init, ("model", None)), name="wo"
        )(nn.relu(x))


class TiedLM(nn.Module):
    """One embedding for both ends, and one Dense applied twice."""

    vocab_size: int = 16
    dim: int = 32

    def setup(self):
        self.embed = nn.Embed(self.vocab_size, self.dim)
        self.shared = nn.Dense(self.dim)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for _ in range(2):
            x = x + nn.tanh(self.shared(x))
        return self.embed.attend(x)


class TextCNN(nn.Module):
    """Convolutions over a sequence, one of them causal and dilated."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 16)(tokens)
        x = nn.relu(nn.Conv(24, kernel_size=(3,))(x))
        x = nn.relu(nn.Conv(24, (3,), kernel_dilation=2, padding="CAUSAL")(x))
        return nn.Dense(5)(x.max(axis=1))


class Tagger(nn.Module):
    """Recurrent cells: one of Dense layers, one that joins its kernels by itself."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(32, 16)(tokens)
        x = nn.RNN(nn.GRUCell(24), name="gru")(x)
        x = nn.RNN(nn.OptimizedLSTMCell(16), name="lstm")(x)
        return nn.Dense(5)(x)
