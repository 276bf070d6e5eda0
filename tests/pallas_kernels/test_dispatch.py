"""What runs where the caller names no implementation, and what `explain` says."""

import dataclasses
import json
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nmjax
from pallas_kernels import (
    compress,
    decompress,
    devices,
    dispatch,
    implementations,
    matmul,
    measurements,
    nm_matmul,
    reference,
)
from pallas_kernels.config import SM80Config, SM90Config
from pallas_kernels.devices import DATA_SHEETS, Device
from pallas_kernels.measurements import Measured, Measurement
from pallas_kernels.reference import Form

pytestmark = pytest.mark.usefixtures("strict_promotion")

H200 = Device("NVIDIA H200", (9, 0))
CONFIG = SM90Config(256, 128, 64, 6, a_from="registers")


def entry(n, ratio, m=4096, k=4096, **others):
    low, median, high = 0.98 * ratio, ratio, 1.02 * ratio
    fields = {
        "architecture": "sm90",
        "dtype": "bfloat16",
        "b_is_kn": False,
        "out_is_nm": True,
        "dense_us": 100.0,
        "sparse_us": 100.0 / ratio,
        "ratio": (low, median, high),
        "compressing": None,
        "config": CONFIG,
    }
    return Measurement(m=m, n=n, k=k, **(fields | others))


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes measurements of an H200 into a folder of this test."""
    monkeypatch.setattr(measurements, "TUNED", tmp_path)
    measurements.load.cache_clear()
    yield lambda *entries: measurements.save(
        Measured(H200.name, {"date": "2000-01-01"}, entries)
    )
    measurements.load.cache_clear()


def judge(m=4096, n=4096, k=4096, dtype="bfloat16", form=None, device=H200):
    return dispatch.judge(m, n, k, dtype=dtype, form=form or Form(), device=device)


def test_nothing_is_committed_that_was_not_measured():
    # The first measurement comes with its machine; till then no kernel is ever chosen.
    for path in measurements.TUNED.glob("*.json"):
        measured = measurements.load(json.loads(path.read_text())["device"])
        assert measured.entries and measured.machine["driver"], path
        assert measurements.path_of(measured.device) == path


def test_without_a_measurement_it_is_dense(tuned):
    choice = judge()
    assert choice.name == "reference"
    assert "no measurement for NVIDIA H200 yet: run `python -m" in choice.reason
    assert "bench --tune`" in choice.reason


def test_the_crossover_in_tokens_is_where_it_was_measured(tuned):
    tuned(entry(512, 0.7), entry(2048, 1.1), entry(8192, 1.4))
    names = [judge(n=n).name for n in (200, 512, 1000, 1025, 2048, 9000, 16384, 16385)]
    dense = "reference"
    # 1000 is nearer to 2048 than 512 is, but one measurement near says slower; beyond
    # twice the largest nothing is known.
    assert names == [dense, dense, dense, "sm90", "sm90", "sm90", "sm90", dense]
    assert judge(n=9000).config == CONFIG
    assert "no measurement near m, n, k = 4096, 200, 4096" in judge(n=200).reason
    assert "0.70x the dense product's speed (0.69 to 0.71)" in judge(n=512).reason


def test_a_layer_counts_its_compression(tuned, monkeypatch):
    """Where A is compressed at every call, a faster product can be a slower layer."""

    def in_layer(n):
        form, device = Form(), H200
        return dispatch.judge(
            4096, n, 4096, dtype="bfloat16", form=form, device=device, compressing=True
        )

    tuned(
        entry(512, 1.3),
        entry(2048, 1.4, compressing=(0.9, 0.95, 1.0)),
        entry(8192, 1.5, compressing=(1.2, 1.25, 1.3)),
    )
    assert [judge(n=n).name for n in (512, 2048, 8192)] == ["sm90"] * 3
    assert "no kernel of compression is proven on NVIDIA H200" in in_layer(8192).reason
    monkeypatch.setattr(implementations, "PROVEN_ON", {H200.name})
    unknown, slower, faster = (in_layer(n) for n in (512, 3000, 8192))
    assert (unknown.name, slower.name, faster.name) == (
        "reference",
        "reference",
        "sm90",
    )
    assert "no kernel compressed near m, n, k = 4096, 512, 4096" in unknown.reason
    assert (
        "0.95x the dense product's speed (0.90 to 1.00, compressing)" in slower.reason
    )
    assert "at 1.25x" in faster.reason
    asked = {"device": "NVIDIA H200"}
    assert "sm90; " in dispatch.explain(4096, 2048, 4096, **asked)
    said = dispatch.explain(4096, 2048, 4096, **asked, compressing=True)
    assert "reference; " in said and "compressing" in said


def test_a_kernel_has_to_be_faster_beyond_the_spread(tuned):
    tuned(entry(4096, 1.01))  # quartiles 0.99 to 1.03
    assert judge().name == "reference"


def test_of_several_near_ones_the_least_decides_and_the_nearest_gives_the_config(tuned):
    other = dataclasses.replace(CONFIG, cluster_m=2)
    tuned(entry(4096, 1.2), entry(6000, 1.5, config=other))
    choice = judge(n=5900)
    assert choice.config == other and "1.20x" in choice.reason
    tuned(entry(4096, 0.9), entry(6000, 1.5, config=other))
    assert judge(n=5900).name == "reference"


@pytest.mark.parametrize(
    "others",
    [
        {"dtype": "float16"},
        {"form": Form(b_is_kn=True)},
        {"form": Form(out_is_nm=False)},
        {"m": 1024},
        {"k": 16384},
        {"device": Device("NVIDIA H100 80GB HBM3", (9, 0))},
        {"device": Device("NVIDIA T4", (7, 5))},
        {"device": None},
        {"n": 0},
    ],
)
def test_what_was_not_measured_is_dense(tuned, others):
    tuned(entry(4096, 1.5))
    assert judge().name == "sm90"
    assert judge(**others).name == "reference"


@pytest.mark.slow
def test_nm_matmul_runs_the_measured_kernel_with_its_config(tuned, monkeypatch, caplog):
    tuned(entry(16, 1.5, m=32, k=64))
    ran = []

    def gemm(a, b, bias, form, config):
        ran.append(config)
        return reference.gemm(a, b, bias, form)

    fake = types.SimpleNamespace(gemm=gemm, unavailable=lambda *_: None)
    for module, name in ((dispatch, "kernel"), (matmul, "_kernel")):
        monkeypatch.setattr(module, name, lambda name: fake)
    monkeypatch.setattr(dispatch, "this_device", lambda: H200)
    matmul._say_once.cache_clear()
    rng = np.random.default_rng(0)
    x, w = (
        jnp.asarray(rng.standard_normal(s), "bfloat16") for s in ((16, 64), (64, 32))
    )
    w24 = compress(w, nmjax.magnitude_mask(w, "2:4"))
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        out = jax.jit(nm_matmul)(x, w24)
        jax.grad(lambda x: nm_matmul(x, w24).astype("float32").sum())(x)
    assert len(ran) == 2 and set(ran) == {CONFIG}
    assert len(caplog.records) == 1 and "sm90 was measured at 1.50x" in caplog.text
    expected = x.astype("float32") @ decompress(w24).astype("float32")
    np.testing.assert_allclose(out.astype("float32"), expected, atol=0.1)
    # What the kernel itself cannot do is dense, with its reason.
    fake.unavailable = lambda *_: "needs a newer jax"
    choice = dispatch.choose(w24.T, x, Form())
    assert choice.name == "reference" and "needs a newer jax" in choice.reason
    # Patterns without an instruction never get that far.
    other = compress(w, nmjax.magnitude_mask(w, "1:4"), "1:4")
    assert "multiplies 2:4 alone" in dispatch.choose(other.T, x, Form()).reason


def test_explain(tuned):
    tuned(entry(4096, 1.5))
    said = dispatch.explain(4096, 4096, 4096, device="h200")
    assert said.startswith("NVIDIA H200: sm90; sm90 was measured at 1.50x")
    assert dispatch.explain(4096, 4096, 4096, device="NVIDIA H200") == said
    assert "no measurement for NVIDIA B200 yet" in dispatch.explain(
        4096, 4096, 4096, device="b200"
    )
    # What no instruction takes, no measurement would change.
    for option in ({"dtype": "float32"}, {"form": Form(out_dtype=jnp.int8)}):
        said = dispatch.explain(4096, 4096, 4096, device="h200", **option)
        assert "NVIDIA H200: reference; " in said and "measure" not in said
    with pytest.raises(ValueError, match="'h300'.*this device's name, or one of"):
        dispatch.explain(1, 1, 4, device="h300")
    with pytest.raises(ValueError, match="m, n, k = 1, 1, 6: expected sizes, k a mul"):
        dispatch.explain(1, 1, 6)
    if jax.default_backend() == "cpu":
        assert dispatch.explain(1, 1, 4).startswith(
            "cpu: reference; no kernel for this"
        )


def test_data_sheets_are_found_by_either_name():
    for short, sheet in DATA_SHEETS.items():
        assert devices.data_sheet(short.upper()) == devices.data_sheet(sheet.name)
        assert sheet.kernel in ("sm80", "sm90", "sm100")
    assert devices.data_sheet("NVIDIA T4") is None


def test_measurements_survive_a_file(tuned):
    entries = entry(4096, 1.5, compressing=(1.1, 1.2, 1.3)), entry(512, 0.7)
    path = tuned(*entries)
    assert path.name == "NVIDIA_H200.json"
    assert measurements.load(H200.name).entries == entries
    assert measurements.load("NVIDIA B200") is None


def test_a_new_measurement_replaces_the_old_one_of_its_product():
    old = entry(4096, 1.5), entry(512, 0.7)
    merged = measurements.merged(old, [entry(4096, 1.6), entry(4096, 1.1, k=1024)])
    assert merged == (entry(4096, 1.1, k=1024), entry(512, 0.7), entry(4096, 1.6))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(format=0), "has format 0, this version reads 2"),
        (lambda r: r.update(device="other"), "is of 'other', expected 'NVIDIA H200'"),
        (lambda r: r.pop("machine"), "lacks \\['machine'\\]"),
        (lambda r: r["entries"][0].update(ratio=[2, 1, 3]), "entry 0: .*in order"),
        (lambda r: r["entries"][0].update(compressing=[0, 1, 3]), "entry 0: .*0, 1, 3"),
        (lambda r: r["entries"][0].update(sparse_us=0), "entry 0: times"),
        (lambda r: r["entries"][0].update(architecture="sm75"), "entry 0: 'sm75'"),
        (lambda r: r["entries"][0].update(n=0), "entry 0: m, n, k = 4096, 0, 4096"),
        (lambda r: r["entries"][0].update(dtype="bf17"), "entry 0: .*bf17"),
        (lambda r: r["entries"][0].update(surprise=0), "entry 0: .*surprise"),
        (lambda r: r["entries"][0]["config"].update(block_m=1), "entry 0: .*block_m"),
        (lambda r: r["entries"][0]["config"].pop("stages"), "entry 0: .*stages"),
    ],
)
def test_a_file_that_cannot_be_is_refused(tuned, change, message):
    path = tuned(entry(4096, 1.5))
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"NVIDIA_H200.json.*{message}"):
        measurements.load(H200.name)


def test_a_measurement_belongs_to_its_kernel():
    with pytest.raises(ValueError, match="is no Config of sm90"):
        entry(4096, 1.5, config=SM80Config(128, 64, 64, 2))
