"""GPU kernels for N:M sparse matrix products, usable without nmjax.

There is no kernel here yet: this package has no public name in this version.
"""
