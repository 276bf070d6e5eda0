"""Times a pass through ViT-L's MLP, forward and backward, sparse against dense.

    python benchmarks/sparse_step.py --tuned DIR

All that training pays for is in the time: masks chosen or read, operands compressed,
the three GEMMs of both layers, those that stay dense as well. DIR holds what `python -m
pallas_kernels.bench --tune --output-dir DIR` measured on this device; by default it is
the package's own folder. The kernels of compression count as proven here, so that a
device can be judged before it is added to `implementations.PROVEN_ON`. Without a GPU
that was measured, no GEMM is sparse, and the table says so.
"""

import argparse
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from report import RESULTS, write

import nmjax
from nmjax import recipes
from pallas_kernels import implementations, measurements
from pallas_kernels.bench.timing import Contender, quartiles, race
from pallas_kernels.devices import this_device

RECIPES = {
    "sr_ste": recipes.sr_ste("2:4"),
    "transposable": recipes.transposable("2:4"),
    "semi_sparse_activation, exact": recipes.semi_sparse_activation(
        algorithm="largest_abs_values_exact"
    ),
    "two_by_four": recipes.two_by_four(),
    "semi_sparse_weight": recipes.semi_sparse_weight(),
    "semi_sparse_activation": recipes.semi_sparse_activation(),
}


class Mlp(nn.Module):
    """Two layers; parameters are float32, products bfloat16."""

    features: tuple[int, int]

    @nn.compact
    def __call__(self, x):
        """Maps `(tokens, features[0])` to the same shape."""
        inner, hidden = self.features
        x = nn.Dense(hidden, dtype=jnp.bfloat16)(x)
        return nn.Dense(inner, dtype=jnp.bfloat16)(nn.gelu(x))


def main():
    """Races each recipe against the dense model, and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tuned", type=pathlib.Path, default=measurements.TUNED)
    parser.add_argument("--tokens", type=int, default=44160)
    parser.add_argument("--features", type=int, nargs=2, default=(1024, 4096))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output-dir", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    measurements.TUNED = options.tuned
    device = this_device()
    if device is None or measurements.load(device.name) is None:
        print(f"nothing was measured of {jax.devices()[0].device_kind}: all is dense")
    else:
        implementations.PROVEN_ON |= {device.name}

    model = Mlp(tuple(options.features))
    x = jax.random.normal(
        jax.random.key(0), (options.tokens, options.features[0]), jnp.bfloat16
    )
    params = jax.jit(model.init)(jax.random.key(1), x)["params"]
    title = (
        f"Forward and backward pass of an MLP {'-'.join(map(str, options.features))}, "
        f"{options.tokens} tokens, bfloat16"
    )
    dense, _ = contender("dense", model, {}, params, x)
    rows = []
    for name, recipe in RECIPES.items():
        rules = [nmjax.Rule(".*", recipe)]
        state = nmjax.init_state(params, nmjax.plan(model, rules, x))
        sparse, count = contender(name, nmjax.sparsify(model, rules), state, params, x)
        times = race([dense, sparse], rounds=options.rounds, seconds=0.05)
        low, median, high = quartiles(times["dense"] / times[name])
        rows.append(
            {
                "recipe": name,
                "sparse GEMMs of 6": count,
                "dense ms": round(1e3 * float(np.median(times["dense"])), 3),
                "ms": round(1e3 * float(np.median(times[name])), 3),
                "speed over dense": round(median, 3),
                "quartiles": [round(low, 3), round(high, 3)],
            }
        )
        # After each: whoever is stopped has those before.
        write("sparse_step", title, rows, options.output_dir)


def contender(name, model, state, params, x):
    """The gradients by parameters and x, run once; how many GEMMs are sparse."""

    def loss(params, x, state):
        variables = {"params": params, "nm": state} if state else {"params": params}
        y = model.apply(variables, x, rngs={"nm": jax.random.key(2)})
        return jnp.mean(y.astype(jnp.float32) ** 2)

    step = jax.jit(jax.grad(loss, (0, 1))).lower(params, x, state).compile()
    jax.block_until_ready(step(params, x, state))
    calls = [line for line in step.as_text().splitlines() if "custom-call(" in line]
    count = sum("nm_matmul" in call for call in calls)
    return Contender(name, lambda: step(params, x, state)), count


if __name__ == "__main__":
    main()
