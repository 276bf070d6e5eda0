"""Channel permutations: they keep more, never less, and change no function."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nmjax.masks import permutation
from nmjax.masks.permutation import Link, permute_chain, search_permutation
from nmjax.pattern import NMPattern
from tests import oracle
from tests.foreign import MODELS, draw


def share(w, pattern, axis=-2):
    """What the mask keeps of Σ|w|, by the definition."""
    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    a = np.abs(np.asarray(w, np.float64))
    return (a * oracle.magnitude_mask(w, n, m, axis)).sum() / a.sum()


def assert_keeps_what_it_says(w, found, pattern, axis=-2):
    assert sorted(found.order) == list(range(w.shape[axis]))
    permuted = np.take(w, found.order, axis)
    np.testing.assert_allclose(found.before, share(w, pattern, axis), rtol=1e-6)
    np.testing.assert_allclose(found.after, share(permuted, pattern, axis), rtol=1e-6)
    assert share(permuted, pattern, axis) >= share(w, pattern, axis)


def test_known_answer():
    w = np.array([[9.0], [8], [7], [6], [1], [1], [1], [1]])
    found = search_permutation(w, "2:4", axis=0)
    assert found.before == pytest.approx((9 + 8 + 1 + 1) / 34)
    assert found.after == pytest.approx((9 + 8 + 7 + 6) / 34)
    assert found.finished


def test_finds_the_best_of_all_partitions(rng):
    for _ in range(10):
        w = rng.standard_t(3, size=(8, 6))
        best = max(
            share(np.take(w, [*first, *(set(range(8)) - set(first))], 0), "2:4", 0)
            for first in itertools.combinations(range(8), 4)
        )
        found = search_permutation(w, "2:4", axis=0)
        np.testing.assert_allclose(found.after, best, rtol=1e-6)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "1:4", "4:8", "4:4"])
@pytest.mark.parametrize("kind", ["normal", "heavy", "ties", "constant", "zero"])
def test_never_keeps_less(rng, pattern, kind):
    w = {
        "normal": rng.normal(size=(3, 16, 5)),
        "heavy": rng.standard_t(2, size=(3, 16, 5)) * rng.exponential(size=(16, 1)),
        "ties": rng.integers(-2, 3, size=(3, 16, 5)) + 0.0,
        "constant": np.ones((3, 16, 5)),
        "zero": np.zeros((3, 16, 5)),
    }[kind].astype(np.float32)
    found = search_permutation(w, pattern)
    if kind == "zero":
        assert found.before == found.after == 1.0
    else:
        assert_keeps_what_it_says(w, found, pattern)
    if kind in ("normal", "heavy") and pattern != "4:4":
        assert found.after > found.before


@pytest.mark.parametrize("shape, axis", [((3, 3, 16, 8), -2), ((8, 16), -1)])
def test_any_axis_and_bfloat16(rng, shape, axis):
    w = np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16))
    assert_keeps_what_it_says(w, search_permutation(w, "2:4", axis=axis), "2:4", axis)


def test_the_order_depends_on_weight_and_seed_alone(rng):
    w = rng.normal(size=(32, 8))
    one, two = (search_permutation(w, "2:4", seed=3) for _ in range(2))
    np.testing.assert_array_equal(one.order, two.order)


def test_progress_rises_and_escapes_do_not_lose(rng):
    w, seen = rng.normal(size=(64, 16)), []
    plain = search_permutation(w, "2:4", escapes=0)
    found = search_permutation(w, "2:4", escapes=8, on_progress=seen.append)
    assert [p.after for p in seen] == sorted(p.after for p in seen)
    assert not any(p.finished for p in seen)
    assert found.after >= plain.after > plain.before


def test_a_time_limit_gives_the_best_so_far(rng):
    w = rng.normal(size=(64, 16))
    found = search_permutation(w, "2:4", max_seconds=0)
    assert not found.finished and found.after > found.before
    assert_keeps_what_it_says(w, found, "2:4")


def test_a_time_limit_is_kept_where_no_swap_gains(monkeypatch):
    monkeypatch.setattr(permutation, "_WORK_PER_ROUND", 16 * 16 * 16)
    seen = []
    found = search_permutation(
        np.ones((64, 16)), "2:4", max_seconds=0, on_progress=seen.append
    )
    assert len(seen) == 1 and not found.finished


def test_a_weight_too_large_for_one_round(rng, monkeypatch):
    w = rng.normal(size=(64, 16))
    whole = search_permutation(w, "2:4", escapes=0)
    monkeypatch.setattr(permutation, "_WORK_PER_ROUND", 16 * 16 * 16)  # 4 of 16 groups
    found = search_permutation(w, "2:4", escapes=0)
    assert_keeps_what_it_says(w, found, "2:4")
    assert found.after - found.before > 0.7 * (whole.after - whole.before)


@pytest.mark.parametrize(
    "w, options, message",
    [
        (np.ones((6, 4)), {}, "size 6, not a multiple of m = 4"),
        (np.ones(8), {}, "axis -2 is out of range"),
        (np.full((8, 4), np.nan), {}, "NaN or infinity"),
        (np.ones((8, 4)), {"escapes": -1}, "escapes=-1"),
        (np.ones((8, 4)), {"max_seconds": float("nan")}, "max_seconds=nan"),
    ],
)
def test_bad_arguments(w, options, message):
    with pytest.raises(ValueError, match=message):
        search_permutation(w, "2:4", **options)


class Mlp(nn.Module):
    residual: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="a")(x)
        y = nn.Dense(16, name="b")(nn.relu(x))
        y = nn.relu(y) + (x if self.residual else 0)
        return nn.Dense(3, name="c")(y), nn.Dense(2, name="d")(y)


MLP_LINKS = [
    Link(["a/kernel", "a/bias"], "b/kernel"),
    Link(["b/kernel", "b/bias"], ["c/kernel", "d/kernel"]),
]


def mlp(residual=False):
    model = Mlp(residual)
    x = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    params = draw(jax.eval_shape(model.init, jax.random.key(0), x), 0)["params"]
    return params, lambda params: model.apply({"params": params}, x)


def assert_same_outputs(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        actual,
        expected,
    )


def test_an_mlp_keeps_its_function_and_more_of_its_weights():
    params, run = mlp()
    permuted, found = permute_chain(params, MLP_LINKS, "2:4", verify=run)
    assert_same_outputs(run(permuted), run(params))
    assert list(found) == MLP_LINKS
    assert all(p.after > p.before for p in found.values())
    assert share(permuted["b"]["kernel"], "2:4") > share(params["b"]["kernel"], "2:4")
    # Two consumers share one order.
    both = [
        np.concatenate([p[name]["kernel"] for name in "cd"], axis=1)
        for p in (permuted, params)
    ]
    assert share(both[0], "2:4") > share(both[1], "2:4")


class ConvChain(nn.Module):
    """Everything that may sit between two convolutions of a chain."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), name="conv1")(x)
        x = nn.relu(nn.BatchNorm(True, name="norm1")(x))
        x = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(x)
        x = nn.Conv(8, (3, 3), strides=2, use_bias=False, name="conv2")(x)
        x = nn.relu(nn.BatchNorm(True, name="norm2")(x)).mean((1, 2))
        return nn.Dense(3, name="head")(x)


def test_a_conv_chain_with_batch_norm_keeps_its_function():
    model = ConvChain()
    x = np.random.default_rng(1).normal(size=(2, 6, 6, 3)).astype(np.float32)
    variables = draw(jax.eval_shape(model.init, jax.random.key(0), x), 0)
    norm = [("params", "scale"), ("params", "bias"), ("batch_stats", "mean")]
    norm = [*norm, ("batch_stats", "var")]
    links = [
        Link(
            [
                *("params/conv1/kernel", "params/conv1/bias"),
                *(f"{collection}/norm1/{name}" for collection, name in norm),
                *("params/depthwise/kernel", "params/depthwise/bias"),
            ],
            "params/conv2/kernel",
        ),
        Link(
            [
                "params/conv2/kernel",
                *(f"{collection}/norm2/{name}" for collection, name in norm),
            ],
            "params/head/kernel",
        ),
    ]
    run = lambda variables: model.apply(variables, x)  # noqa: E731
    permuted, found = permute_chain(variables, links, "2:4")
    assert_same_outputs(run(permuted), run(variables))
    assert all(p.after > p.before for p in found.values())
    for path in ("conv2", "head"):
        new, old = permuted["params"][path], variables["params"][path]
        assert share(new["kernel"], "2:4") > share(old["kernel"], "2:4")


def test_inside_a_residual_block_but_not_across():
    foreign = MODELS["linen_resnet"]
    model, variables = foreign.build(), foreign.variables()
    inside = Link(
        [
            "params/PlainBlock_0/Conv_0/kernel",
            *(f"params/PlainBlock_0/BatchNorm_0/{name}" for name in ("scale", "bias")),
            *(f"batch_stats/PlainBlock_0/BatchNorm_0/{n}" for n in ("mean", "var")),
        ],
        "params/PlainBlock_0/Conv_1/kernel",
    )
    across = Link(
        [
            "params/conv_init/kernel",
            *(f"params/bn_init/{name}" for name in ("scale", "bias")),
            *(f"batch_stats/bn_init/{name}" for name in ("mean", "var")),
        ],
        "params/PlainBlock_0/Conv_0/kernel",
    )
    run = jax.jit(lambda v: model.apply(v, *foreign.inputs(), **foreign.kwargs))
    permuted, _ = permute_chain(variables, [inside], "2:4", verify=run)
    np.testing.assert_allclose(run(permuted), run(variables), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="another function.*conv_init") as error:
        permute_chain(variables, [inside, across], "2:4", verify=run)
    assert "PlainBlock_0/Conv_1/kernel" not in str(error.value)


def test_verify_finds_a_residual_connection_and_names_the_link():
    params, run = mlp(residual=True)
    with pytest.raises(ValueError, match="another function.*'a/kernel'"):
        permute_chain(params, MLP_LINKS, "2:4", verify=run)


def test_progress_names_the_link():
    params, _ = mlp()
    seen = []
    permute_chain(
        params, MLP_LINKS, "2:4", on_progress=lambda link, best: seen.append(link)
    )
    assert set(seen) == set(MLP_LINKS)


@pytest.mark.parametrize(
    "links, message",
    [
        ([Link("a/kernel", "b/kernel")], "'a/bias' belongs to the layer"),
        ([Link(["a/kernel", "a/bias"], "x/kernel")], "no 'x/kernel' in the tree"),
        ([Link(["c/kernel", "c/bias"], "b/kernel")], "same channels.*'c/kernel': 3"),
        ([Link("a/kernel", "b/kernel", axis=0)], "no axis 0.*counts from the end"),
        (
            [Link("a/kernel", "b/kernel"), Link("a/bias", "b/kernel")],
            "'b/kernel' is named twice among the consumers",
        ),
        (
            [Link("b/kernel", "c/kernel"), Link("b/kernel", "d/kernel")],
            "'b/kernel' is named twice among the producers.*belong in one link",
        ),
    ],
)
def test_links_that_cannot_be_meant(links, message):
    params, _ = mlp()
    with pytest.raises(ValueError, match=message):
        permute_chain(params, links, "2:4")


def test_arrays_at_the_root_are_no_layer(rng):
    # Beside one another, and with as many channels, but nobody's bias.
    params = {"w1": rng.normal(size=(8, 16)), "w2": rng.normal(size=(16, 16))}
    permuted, _ = permute_chain(params, [Link("w1", "w2")], "2:4")
    np.testing.assert_allclose(
        permuted["w1"] @ permuted["w2"], params["w1"] @ params["w2"], atol=1e-4
    )


def test_groups_must_fit_the_channels():
    params, _ = mlp()
    with pytest.raises(ValueError, match=r"'b/kernel'.*contract 16 channels.*m = 3"):
        permute_chain(params, MLP_LINKS, "2:3")


def test_a_link_needs_both_ends():
    with pytest.raises(ValueError, match="a link needs producers"):
        Link([], "b/kernel")
