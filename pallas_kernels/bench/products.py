"""Which products are timed: layers of models by name, in the five uses of training."""

import dataclasses
from collections.abc import Callable, Sequence

from pallas_kernels.reference import Form


@dataclasses.dataclass(frozen=True)
class Use:
    """One of the GEMMs of a layer `y = x · W` with t tokens, i features in, o out.

    Attributes:
      name: With the compressed side marked 24.
      sizes: `(m, n, k)` of D = A24 · B from (t, i, o).
      b_is_kn: Whether B, as it lies in memory, is `(K, N)`.
      out_is_nm: Whether D is written as `(N, M)`.
      a_is_km: Whether A, before it is compressed, lies in memory as `(K, M)`.
    """

    name: str
    sizes: Callable[[int, int, int], tuple[int, int, int]]
    b_is_kn: bool
    out_is_nm: bool
    a_is_km: bool


FPROP = Use("fprop W24", lambda t, i, o: (o, t, i), False, True, a_is_km=True)
USES = (
    FPROP,
    Use("dgrad W24ᵀ", lambda t, i, o: (i, t, o), False, True, a_is_km=False),
    Use("fprop x24", lambda t, i, o: (t, o, i), True, False, a_is_km=False),
    Use("wgrad x24ᵀ dy", lambda t, i, o: (i, o, t), True, False, a_is_km=True),
    Use("wgrad dy24ᵀ x", lambda t, i, o: (o, i, t), True, True, a_is_km=True),
)


@dataclasses.dataclass(frozen=True)
class Product:
    """D = A24 · B, A (m, k), B (k, n)."""

    layer: str
    use: Use
    m: int
    n: int
    k: int
    tokens: int

    @property
    def flops(self) -> int:
        """Of the dense product."""
        return 2 * self.m * self.n * self.k

    def dense_bytes(self) -> int:
        """What the dense product reads and writes at least, in 16 bits."""
        return 2 * (self.m * self.k + self.k * self.n + self.m * self.n)

    def sparse_bytes(self) -> int:
        """The same with half the values of A, and two bits for each of them."""
        half = self.m * self.k // 2
        return 2 * (half + self.k * self.n + self.m * self.n) + half // 4

    def form(self, dtype) -> Form:
        """The layouts of B and D, for operands and result of this dtype."""
        return Form(
            b_is_kn=self.use.b_is_kn, out_is_nm=self.use.out_is_nm, out_dtype=dtype
        )


# Features in and out. A convolution contracts height · width · channels of its window
# (im2col); its tokens are the pixels of a batch.
LAYERS: dict[str, dict[str, tuple[int, int]]] = {
    "resnet50": {
        "stage 1 3x3": (9 * 64, 64),
        "stage 1 1x1 up": (64, 256),
        "stage 2 3x3": (9 * 128, 128),
        "stage 3 3x3": (9 * 256, 256),
        "stage 3 1x1 up": (256, 1024),
        "stage 4 3x3": (9 * 512, 512),
        "stage 4 1x1 down": (2048, 512),
        "stage 4 1x1 up": (512, 2048),
    },
    "vit_b": {
        "qkv": (768, 2304),
        "proj": (768, 768),
        "fc1": (768, 3072),
        "fc2": (3072, 768),
    },
    "vit_l": {
        "qkv": (1024, 3072),
        "proj": (1024, 1024),
        "fc1": (1024, 4096),
        "fc2": (4096, 1024),
    },
    "llama3_8b": {
        "q, o": (4096, 4096),
        "k, v": (4096, 1024),
        "gate, up": (4096, 14336),
        "down": (14336, 4096),
    },
}
TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
SQUARES = (4096, 8192, 16384)

# For ViT-L's MLP at this size xFormers and torchao report their figures.
VIT_L_TOKENS = 44160

SUITES = (*LAYERS, "squares", "uses")


def select(suites: Sequence[str], tokens: Sequence[int]) -> list[Product]:
    """The products of suites: `LAYERS`, "squares" and "uses".

    "uses" are the five uses of the two layers of ViT-L's MLP, at 44,160 tokens.
    """
    found = []
    for suite in suites:
        if suite == "squares":
            found += [
                Product("square", FPROP, size, size, size, size) for size in SQUARES
            ]
        elif suite == "uses":
            found += [
                _product("vit_l", layer, use, VIT_L_TOKENS)
                for layer in ("fc1", "fc2")
                for use in USES
            ]
        else:
            found += [
                _product(suite, layer, FPROP, count)
                for layer in LAYERS[suite]
                for count in tokens
            ]
    return found


def _product(model: str, layer: str, use: Use, tokens: int) -> Product:
    features_in, features_out = LAYERS[model][layer]
    sizes = use.sizes(tokens, features_in, features_out)
    return Product(f"{model} {layer}", use, *sizes, tokens)
