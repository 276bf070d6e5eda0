"""Times a training step with SR-STE against the same model's dense step.

    python benchmarks/sr_ste_step.py

Each round runs one dense and one sparse step of each model, in turn, so a change of
the machine's speed meets both; the ratio is taken within the round. The GEMMs are
dense on this machine: the ratio is the price of choosing masks, not a speed-up.
"""

import functools
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from report import write

import nmjax
from nmjax import models

ROUNDS = 21


class Mlp(nn.Module):
    """Two layers, 1024 to 4096 to 1024."""

    @nn.compact
    def __call__(self, x, train=False):
        """Maps `(batch, 1024)` to `(batch, 1024)`."""
        del train
        return nn.Dense(1024)(nn.relu(nn.Dense(4096)(x)))


CASES = {
    "MLP 1024-4096-1024, batch 256": (Mlp(), (256, 1024), [nmjax.Rule(".*", "2:4")]),
    "ResNet-18, 32x32 images, batch 16": (
        models.create("resnet18", num_classes=10, stem="small"),
        (16, 32, 32, 3),
        [nmjax.Rule("stem|head", None), nmjax.Rule(".*", "2:4")],
    ),
}


def make_step(model, variables, x):
    """A compiled SGD-momentum step and its first arguments."""
    tx = optax.sgd(1e-3, momentum=0.9)
    params = variables["params"]
    rest = {name: v for name, v in variables.items() if name != "params"}

    def loss(params, x):
        outputs, _ = model.apply(
            {**rest, "params": params}, x, train=True, mutable=list(rest)
        )
        return jnp.mean(outputs**2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x):
        updates, opt_state = tx.update(jax.grad(loss)(params, x), opt_state)
        return optax.apply_updates(params, updates), opt_state

    copied = jax.tree.map(jnp.array, params)
    return step, [copied, tx.init(params), x]


def time_step(step, arguments):
    """Runs one step in place; returns its seconds."""
    start = time.perf_counter()
    arguments[:2] = jax.block_until_ready(step(*arguments))
    return time.perf_counter() - start


def measure(model, shape, rules):
    """Seconds of every round: dense and sparse."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), x
    )
    steps = [
        make_step(each, variables, x) for each in (model, nmjax.sparsify(model, rules))
    ]
    for step in steps:
        time_step(*step)
    return [[time_step(*step) for step in steps] for _ in range(ROUNDS)]


def main():
    """Measures every case and writes the table."""
    rows = []
    for name, case in CASES.items():
        dense, sparse = np.transpose(measure(*case))
        low, ratio, high = np.percentile(sparse / dense, [25, 50, 75])
        rows.append(
            {
                "model": name,
                "dense ms": round(1e3 * float(np.median(dense)), 1),
                "SR-STE 2:4 ms": round(1e3 * float(np.median(sparse)), 1),
                "ratio": round(float(ratio), 3),
                "quartiles": [round(float(low), 3), round(float(high), 3)],
                "ratio of minima": round(float(sparse.min() / dense.min()), 3),
            }
        )
        print(rows[-1], flush=True)
    write("sr_ste_step", "SR-STE step over the dense step", rows)


if __name__ == "__main__":
    main()
