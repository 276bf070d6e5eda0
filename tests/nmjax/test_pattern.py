"""What an N:M pattern accepts, refuses and guarantees as a value."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax.pattern import NMPattern


def test_every_spelling_gives_the_same_pattern():
    pattern = NMPattern("2:4")
    assert (pattern.n, pattern.m) == (2, 4)
    assert pattern == NMPattern(2, 4) == NMPattern(n=2, m=4) == NMPattern(pattern)
    assert len({pattern, NMPattern(2, 4), NMPattern(pattern)}) == 1
    assert pattern != NMPattern("4:8") and pattern != NMPattern("1:4")


def test_density_is_the_fraction_kept():
    assert NMPattern("1:4").density == 0.25
    assert NMPattern("16:32").density == 0.5


@pytest.mark.parametrize("text", ["1:1", "1:2", "2:4", "3:7", "16:32", "100:1000"])
def test_text_and_repr_lead_back(text):
    pattern = NMPattern(text)
    assert str(pattern) == f"{pattern}" == text
    assert NMPattern(str(pattern)) == pattern
    assert eval(repr(pattern)) == pattern


def test_n_equal_to_m_is_dense_and_legal():
    assert NMPattern("4:4").density == 1.0


def test_numpy_and_jax_integers_become_python_integers():
    for integer in (np.int64, np.uint8, jnp.int32):
        pattern = NMPattern(integer(2), integer(4))
        assert pattern == NMPattern("2:4")
        assert type(pattern.n) is int and type(pattern.m) is int


def test_a_pattern_is_a_frozen_value():
    pattern = NMPattern("2:4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        pattern.n = 3
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert copy.deepcopy(pattern) == pattern
    assert dataclasses.replace(pattern, n=1) == NMPattern("1:4")


def test_equal_patterns_share_one_trace():
    traces = []

    def double(x, pattern):
        traces.append(pattern)
        return 2 * x

    double = jax.jit(double, static_argnums=1)
    double(jnp.ones(4), NMPattern("2:4"))
    double(jnp.ones(4), NMPattern(2, 4))
    assert len(traces) == 1


BAD_STRINGS = [
    *("", " ", "2", "2:", ":4", "2:4:8", "2;4", "2/4", "2-4", "2of4", "two:four"),
    *(
        "2.0:4",
        "-2:4",
        "2:-4",
        "+2:4",
        " 2:4",
        "2:4\n",
        "2: 4",
        "0x2:4",
        "٢:٤",
        "1e1:20",
    ),
    *("0:4", "0:0", "4:2", "5:4", "1" * 5000 + ":4"),
]


@pytest.mark.parametrize("text", BAD_STRINGS, ids=lambda text: repr(text)[:12])
def test_a_bad_string_is_named_beside_an_example(text):
    with pytest.raises(ValueError) as error:
        NMPattern(text)
    assert repr(text) in str(error.value)
    assert '"2:4", which keeps 2 of every 4' in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        (2,),
        (None,),
        ((2, 4),),
        (b"2:4",),
        (2.0, 4),
        (2, 4.0),
        (True, 4),
        (1, True),
        (np.True_, 4),
        (np.float32(2), 4),
        ("2", "4"),
        ("2:4", 4),
        (NMPattern("2:4"), 8),
        (0, 4),
        (-2, 4),
        (2, 0),
        (-4, -2),
        (5, 4),
    ],
    ids=repr,
)
def test_what_is_no_pair_of_integers_is_refused(arguments):
    with pytest.raises(ValueError) as error:
        NMPattern(*arguments)
    for argument in arguments:
        assert repr(argument) in str(error.value)
    assert '"2:4", which keeps 2 of every 4' in str(error.value)
