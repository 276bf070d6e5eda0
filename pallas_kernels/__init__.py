"""Matrix products with one 2:4 compressed side, for sparse tensor cores.

    w24 = compress_magnitude(w)      # values and metadata of a Flax kernel (k, n)
    y = nm_matmul(x, w24)            # (t, k) · (k, n)

Usable without nmjax: needs jax and numpy (and absl, which Mosaic imports).
"""

from pallas_kernels.compression import compress_magnitude as compress_magnitude
from pallas_kernels.compression import compress_transposable as compress_transposable
from pallas_kernels.dispatch import explain as explain
from pallas_kernels.format import NMCompressed as NMCompressed
from pallas_kernels.format import compress as compress
from pallas_kernels.format import decompress as decompress
from pallas_kernels.matmul import nm_matmul as nm_matmul
