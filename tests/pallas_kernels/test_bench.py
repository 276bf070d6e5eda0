"""The benchmark: its arithmetic, its judge, and the whole pipeline on this machine."""

import dataclasses
import json
import re
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    compress,
    devices,
    dispatch,
    implementations,
    measurements,
    reference,
)
from pallas_kernels.bench import __main__ as bench_main
from pallas_kernels.bench import (
    contenders,
    passes,
    products,
    report,
    roofline,
    timing,
    tuning,
)
from pallas_kernels.bench.__main__ import main
from pallas_kernels.bench.contenders import Race
from pallas_kernels.bench.options import parse
from pallas_kernels.bench.products import FPROP, LAYERS, USES, Product
from pallas_kernels.bench.report import CompressionRow, Row
from pallas_kernels.bench.search import search_space
from pallas_kernels.bench.timing import Contender, quartiles, race
from pallas_kernels.compression import compress_magnitude, compress_transposable
from pallas_kernels.config import CONFIGS, SM90Config, shared_memory_limit
from pallas_kernels.devices import DATA_SHEETS, Device

H200 = Device("NVIDIA H200", (9, 0))
SMALL = Product("vit_x fc1", FPROP, m=32, n=48, k=64, tokens=48)


def test_sizes_of_the_five_uses():
    tokens, features_in, features_out = 10, 20, 30
    sizes = {use.name: use.sizes(tokens, features_in, features_out) for use in USES}
    assert sizes == {  # (m, n, k), k the contracted one
        "fprop W24": (30, 10, 20),
        "dgrad W24ᵀ": (20, 10, 30),
        "fprop x24": (10, 30, 20),
        "wgrad x24ᵀ dy": (20, 30, 10),
        "wgrad dy24ᵀ x": (30, 20, 10),
    }


def test_the_suites_hold_what_they_promise():
    found = products.select(["llama3_8b", "squares", "uses"], [512, 65536])
    assert len(found) == 4 * 2 + 3 + 2 * 5
    assert (found[4].layer, found[4].m, found[4].n, found[4].k) == (
        *("llama3_8b gate, up", 14336, 512, 4096),
    )
    assert found[8].m == found[8].n == found[8].k == 4096
    assert {p.use.name for p in found[-5:]} == {use.name for use in USES}
    assert all(i % 4 == 0 for layers in LAYERS.values() for i, _ in layers.values())


def test_bounds_by_hand():
    sheet = dataclasses.replace(DATA_SHEETS["h200"], tflops=1000, gb_per_s=4000)
    # 2 · 4096³ FLOP are 137.4 µs at 1000 TFLOP/s; bytes are 25 µs.
    large = roofline.bound(Product("", FPROP, 4096, 4096, 4096, 0), sheet)
    assert large.dense_us == pytest.approx(137.44, abs=0.01)
    assert large.ratio == 2 and large.limit == "arithmetic"
    # A (64, 64) of 8 KB, sparse 4.5 KB; B and D of 128 B each a column.
    narrow = roofline.bound(Product("", FPROP, 64, 10**6, 64, 0), sheet)
    assert narrow.dense_us == pytest.approx((8192 + 256e6) / 4e6 * 1e3 / 1e3)
    assert narrow.sparse_us == pytest.approx((4608 + 256e6) / 4e6 * 1e3 / 1e3)
    assert narrow.limit == "memory"


def test_a_race_is_interleaved_and_counts_single_products(monkeypatch):
    order, clock = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def contender(name, seconds, count):
        def run():
            order.append(name)
            clock[0] += seconds

        return Contender(name, run, count, wait=lambda _: None)

    times = race(
        [contender("slow", 0.02, 2), contender("fast", 0.002, 1)],
        rounds=3,
        seconds=0,
        warm_up=0.04,
    )
    # Two runs each to warm up, one to count calls, then rounds in alternating
    # direction; the first does not count.
    assert order == ["slow", "fast"] * 3 + ["fast", "slow", "slow", "fast"] * 2
    assert len(times["slow"]) == len(times["fast"]) == 3
    np.testing.assert_allclose(times["slow"], 0.01)  # of two products
    np.testing.assert_allclose(times["fast"], 0.002)
    assert quartiles(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == (2, 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
def test_the_reference_passes_the_judge_in_every_use(use):
    product = Product("", use, *use.sizes(48, 64, 32), tokens=48)
    entrants = Race(product, "bfloat16", sets=2)
    (dense, other) = entrants.dense.run()
    assert dense.shape == {
        "fprop W24": (48, 32),
        "dgrad W24ᵀ": (48, 64),
        "fprop x24": (48, 32),
        "wgrad x24ᵀ dy": (64, 32),
        "wgrad dy24ᵀ x": (64, 32),
    }.get(use.name)
    assert (dense != other).any()  # the sets differ
    sparse = entrants.sparse("reference")
    np.testing.assert_allclose(
        *(np.asarray(x[0], np.float32) for x in (sparse.run(), [dense])), atol=0.1
    )


def test_sets_outgrow_any_l2():
    sets = Race(SMALL, "bfloat16").dense.products
    assert sets == 16  # as many as are compiled, for so small a product
    large = Product("", FPROP, 4096, 4096, 4096, 0)
    assert timing.sets_for(large.dense_bytes()) == 6


class FakeTensor:
    """As much of torch's tensors as the race touches, on a jax array."""

    def __init__(self, array):
        self.array = array

    def t(self):
        return FakeTensor(self.array.T)

    def contiguous(self):
        return self

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def fake_torch(scale=1):
    def product(packed, b, *, alg_id, transpose_result):
        assert alg_id == 7
        out = scale * jnp.dot(packed.array, b.array)
        return FakeTensor(out.T if transpose_result else out)

    return types.SimpleNamespace(
        from_dlpack=FakeTensor,
        _cslt_compress=lambda a: a,
        _cslt_sparse_mm_search=lambda packed, b, transpose_result: 7,
        _cslt_sparse_mm=product,
        cuda=types.SimpleNamespace(synchronize=lambda: None),
    )


@pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
def test_cusparselt_gets_each_operand_as_it_should(use, monkeypatch):
    monkeypatch.setattr(contenders, "_torch_with_cusparselt", fake_torch)
    product = Product("", use, *use.sizes(48, 64, 32), tokens=48)
    assert Race(product, "bfloat16", sets=2).cusparselt().products == 2


def test_a_wrong_rival_is_a_note(monkeypatch):
    monkeypatch.setattr(
        contenders, "_torch_with_cusparselt", lambda: fake_torch(scale=2)
    )
    monkeypatch.setattr(contenders, "missing_cusparselt", lambda: None)
    options = {"rounds": 1, "seconds": 0, "sets": 2}
    row = contenders.measure(SMALL, "reference", "bfloat16", **options)
    assert row.status == "ok" and not row.rivals_us
    assert "cuSPARSELt is off by" in row.notes[0]
    monkeypatch.setattr(contenders, "_torch_with_cusparselt", fake_torch)
    row = contenders.measure(SMALL, "reference", "bfloat16", **options)
    assert row.rivals_us["cuSPARSELt"] > 0 and not row.notes
    assert len(row.rivals_ratio["cuSPARSELt"]) == 3


@pytest.fixture
def compression(monkeypatch):
    """Compression by plain jnp; the (axis, shape) of what it was asked for."""
    compressed = []

    def compress_magnitude(a, **options):
        compressed.append((options["axis"], a.shape))
        return compress_here(a, **options)

    compress_here = contenders.compress_magnitude
    monkeypatch.setattr(implementations, "available", lambda part: "reference")
    monkeypatch.setattr(contenders, "compress_magnitude", compress_magnitude)
    return compressed


@pytest.mark.slow
@pytest.mark.parametrize("use", USES, ids=lambda use: use.name)
def test_a_layer_compresses_what_the_dense_product_takes(use, compression):
    product = Product("", use, *use.sizes(48, 64, 32), tokens=48)
    entrants = Race(product, "bfloat16", sets=2)
    entrants.compressing("reference")  # judged within
    entrants.compressing("reference", other_layout=True)
    layouts = [(-2, (product.k, product.m)), (-1, (product.m, product.k))]
    own, other = layouts if use.a_is_km else layouts[::-1]
    assert compression == [own, own, other, other]


def test_a_row_has_the_ratio_with_compression(compression, monkeypatch):
    options = {"rounds": 1, "seconds": 0, "sets": 2}
    row = contenders.measure(SMALL, "reference", "bfloat16", **options)
    assert len(compression) == 2 and min(row.compressing) > 0
    assert f"| {row.compressing[1]:.2f}x |" in report.product_table([row], None)
    lossy = lambda a, **options: compress(a, jnp.zeros(a.shape, bool), axis=-2)  # noqa: E731
    monkeypatch.setattr(contenders, "compress_magnitude", lossy)
    row = contenders.measure(SMALL, "reference", "bfloat16", **options)
    (note,) = row.notes
    assert note.startswith("WRONG with compression, vit_x fc1, n = 48: reference comp")
    assert row.bad and row.status == "ok" and row.ratio[1] > 0 and not row.compressing

    def refuses(a, **options):
        raise ValueError("lowering failed")

    monkeypatch.setattr(contenders, "compress_magnitude", refuses)
    row = contenders.measure(SMALL, "reference", "bfloat16", **options)
    assert row.bad and row.ratio[1] > 0
    assert "FAILED with compression, vit_x fc1, n = 48: ValueError: low" in row.notes[0]


def test_what_launches_may_set_the_time_of_is_marked(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    options = {"rounds": 1, "seconds": 0, "sets": 2}
    for limit, notes in ((0, 0), (float("inf"), 1)):
        monkeypatch.setattr(contenders, "_LAUNCH", limit)
        row = contenders.measure(SMALL, "reference", "bfloat16", **options)
        assert row.status == "ok" and len(row.notes) == notes


def broken_kernel(monkeypatch, gemm):
    fake = types.SimpleNamespace(gemm=gemm, unavailable=lambda *_: None)
    monkeypatch.setattr(dispatch, "kernel", lambda name: fake)


def swapped_halves(a, b, bias, form, config=None):
    words = (a.metadata << 16) | ((a.metadata >> 16) & 0xFFFF)
    return reference.gemm(dataclasses.replace(a, metadata=words), b, bias, form)


def one_nan(a, b, bias, form, config=None):
    return reference.gemm(a, b, bias, form).at[0, 0].set(jnp.nan)


def refused(a, b, bias, form, config=None):
    raise jax.errors.JaxRuntimeError("ptxas\nfatal")


@pytest.mark.parametrize(
    "gemm, message",
    [
        (refused, "FAILED: ptxas"),
        (swapped_halves, "WRONG: sm90 is off by"),
        (one_nan, "off by nan"),
        (
            lambda a, b, *_: reference.gemm(a, b, *_)[:-1],
            r"gives bfloat16\(47, 32\), expected",
        ),
    ],
)
def test_a_wrong_or_missing_result_never_races(monkeypatch, gemm, message):
    broken_kernel(monkeypatch, gemm)
    row = contenders.measure(SMALL, "sm90", "bfloat16", rounds=1, seconds=0, sets=2)
    assert row.bad and re.search(message, row.status)
    assert row.dense_us == row.sparse_us == 0


def test_a_kernel_that_cannot_run_is_a_row_with_its_reason():
    if jax.default_backend() == "gpu":
        pytest.skip("here it may run")
    row = contenders.measure(SMALL, "sm80", "bfloat16", rounds=1, seconds=0, sets=2)
    assert row.status.startswith("cannot run: needs")


def test_random_masks_are_2to4_and_use_all_six_patterns():
    mask = np.asarray(contenders.random_mask(jax.random.key(0), 64, 64))
    groups = mask.reshape(-1, 4)
    assert (groups.sum(1) == 2).all() and len(np.unique(groups, axis=0)) == 6
    compress(jnp.ones((64, 64)), jnp.asarray(mask), axis=-1)


def test_tolerance_is_the_one_of_the_tests(gemm_atol):
    for dtype, base in contenders.TOLERANCE.items():
        assert base * 64**0.5 == gemm_atol(dtype, 64)


def test_tables_by_hand():
    # 2 · 32 · 48 · 64 FLOP in 2 µs; 2,048 + 256 + 6,144 + 3,072 bytes.
    row = Row(SMALL, "bfloat16", "sm90", "ok", 4.0, 2.0, (1.9, 2.0, 2.1))
    layer = dataclasses.replace(row, compressing=(1.5, 1.6, 1.7))
    assert row.tflops == pytest.approx(2 * 32 * 48 * 64 / 2e6)
    rival = dataclasses.replace(
        row, rivals_us={"cuSPARSELt": 3.0}, rivals_ratio={"cuSPARSELt": (1, 1.5, 2)}
    )
    wrong = dataclasses.replace(row, status="WRONG: off by 3")
    sheet = dataclasses.replace(DATA_SHEETS["h200"], tflops=1, gb_per_s=10)
    lines = report.product_table([layer, rival, wrong], sheet).splitlines()
    shared = "| vit_x fc1 | fprop W24 | 32 | 48 | 64 | 4.0 | 2.0 | 0.0983 | 10% | 58% "
    assert lines[2] == shared + "| 2.00x | 1.90–2.10 | 1.60x |  |  |"
    assert lines[3] == shared + "| 2.00x | 1.90–2.10 |  | 3.0 | 1.50x |"
    assert "WRONG: off by 3" in lines[4] and "2.00x" not in lines[4]
    assert len({line.count("|") for line in lines}) == 1
    passed = CompressionRow("W", (4, 4), "float32", "ok", 82, 1.0, 2.0, (2, 2, 2))
    cannot = CompressionRow("W", (4, 4), "float32", "cannot run: no GPU")
    lines = report.compression_table([passed, cannot], None).splitlines()
    assert lines[2] == "| W | 4x4 | float32 | 1.0 | 2.0 | 0.041 | 2.00x | 2.00–2.00 |"
    assert "cannot run: no GPU" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def only(name, part):
    (found,) = (one for one in passes.passes() if one.name == f"{part}, {name}")
    return found


@pytest.mark.parametrize("part, moved", [("W", 5.125), ("W and Wᵀ", 6.25)])
def test_passes_against_a_copy(part, moved):
    one = only("reference", part)
    row = passes.measure(one, (64, 32), "float32", rounds=2, seconds=0, sets=2)
    assert row.status == "ok" and row.us > 0 and row.copy_us > 0
    assert row.moved == moved * 64 * 32


def keep_the_first_two(w):
    mask = jnp.broadcast_to(jnp.arange(64)[:, None] % 4 < 2, w.shape)
    return compress(w, mask, dtype=jnp.bfloat16)


def two_masks(w):
    return compress_magnitude(w), compress_magnitude(w.T)


def another_tile(w):
    """2:4 along both axes, and not the best."""
    row, column = jnp.arange(64)[:, None], jnp.arange(32)
    mask = (row % 4 < 2) == (column % 4 < 2)
    return compress(w, mask, dtype=jnp.bfloat16), compress(
        w.T, mask.T, dtype=jnp.bfloat16
    )


@pytest.mark.parametrize(
    "part, run, message",
    [
        ("W", keep_the_first_two, "of 2048 entries differ"),
        ("W", lambda w: compress_magnitude(2 * w), "of 2048 entries differ"),
        ("W and Wᵀ", two_masks, "W and its transpose have different masks"),
        ("W and Wᵀ", another_tile, "of 128 tiles are not optimal"),
        (
            "W and Wᵀ",
            lambda w: compress_transposable(2 * w),
            "a kept entry has another value",
        ),
    ],
)
def test_a_wrong_compression_never_races(part, run, message):
    one = dataclasses.replace(only("reference", part), run=run)
    row = passes.measure(one, (64, 32), "float32", rounds=1, seconds=0, sets=2)
    assert row.bad and message in row.status and row.us == 0


def test_a_compression_that_cannot_run_is_a_row_with_its_reason():
    if jax.default_backend() == "gpu":
        pytest.skip("here it may run")
    one = only("mosaic", "W")
    row = passes.measure(one, (64, 32), "float32", rounds=1, seconds=0, sets=2)
    assert row.status.startswith("cannot run: ") and "needs" in row.status


def test_the_state_of_the_gpu_is_recorded(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\n"
        'test "$1" = --query-gpu=driver_version,clocks.sm,clocks.max.sm,clocks.mem,'
        "power.draw,power.limit,temperature.gpu || exit 2\n"
        "echo 580.1, 1980 MHz, 1980 MHz, 3201 MHz, 121.5 W, 700.00 W, 31\n"
        "echo of another GPU\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    gpu = types.SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    found = report.machine()
    assert found["driver"] == "580.1" and found["power.limit"] == "700.00 W"
    assert found["device"] == "NVIDIA H200" and found["temperature.gpu"] == "31"
    smi.write_text("#!/bin/sh\nexit 6\n")
    assert "driver" not in report.machine()


SHAPES = ["--shape", "64,128,64", "--shape", "32,48,64", "--rounds", "2"]


def test_the_pipeline_without_a_gpu(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "bench"
    arguments = [*SHAPES, "--implementation", "reference", "--output-dir", str(folder)]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.startswith("# No GPU measurement: ") or jax.default_backend() == "gpu"
    assert (folder / "bench.md").read_text() == out
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "bench.json").read_text())
    first, second = record["products"]
    assert (first["m"], first["n"], first["k"], first["use"]) == (
        *(64, 128, 64, "fprop W24"),
    )
    assert first["status"] == second["status"] == "ok" and first["dense_us"] > 0
    assert first["ratio"] == sorted(first["ratio"])
    assert record["machine"]["jax"] == jax.__version__
    assert "[2/2]" in err and "s left" in err


def test_a_run_that_ends_early_keeps_its_rows(tmp_path, monkeypatch):
    rows = iter([Row(SMALL, "bfloat16", "reference", status="cannot run: a reason")])

    def interrupted(*_, **__):
        for row in rows:
            return row
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_main, "measure", interrupted)
    arguments = [*SHAPES, "--implementation", "reference", "--output-dir"]
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, str(tmp_path)])
    (row,) = json.loads((tmp_path / "bench.json").read_text())["products"]
    assert row["status"] == "cannot run: a reason"
    assert "cannot run: a reason" in (tmp_path / "bench.md").read_text()


def test_a_quick_run_compresses_by_kernels_alone():
    """XLA takes a minute for the passes of plain jnp, at 16 matrices each."""
    suite = ["--suite", "compression"]
    everything = bench_main._passes(parse(suite))
    quick = bench_main._passes(parse([*suite, "--quick"]))
    assert {name.split(",")[1] for _, name in everything} > {" reference"}
    assert {name.split(",")[1] for _, name in quick} == {" mosaic", " triton"}


@pytest.mark.slow
def test_a_wrong_result_is_an_exit_status(tmp_path, monkeypatch, capsys):
    broken_kernel(monkeypatch, swapped_halves)
    monkeypatch.setattr(devices, "this_device", lambda: H200)
    assert main([*SHAPES, "--output-dir", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.count("WRONG: sm90 is off by") == 2
    assert "2 of 2 are WRONG or FAILED" in err


def test_a_folder_below_a_file_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    place = ["--output-dir", str(tmp_path / "file/bench")]
    assert main([*SHAPES, "--implementation", "reference", *place]) == 2
    assert "Not a directory" in capsys.readouterr().err


def test_without_a_gpu_it_explains_itself(capsys):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    assert main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert "there is no NVIDIA GPU" in out and "NVIDIA H200 data sheet" in out
    assert "| square | fprop W24 | 8192 | 8192 | 8192 | 1111.3 | 555.6 | 2.00x" in out
    assert main(["--device", "rtx4090", "--suite", "vit_l"]) == 0
    out = capsys.readouterr().out
    assert "Bounds for NVIDIA GeForce RTX 4090: 165.2 TFLOP/s" in out
    assert "shared memory" not in out  # of Hopper
    # What was asked for by name could not be done.
    for asked in (["--tune"], ["--implementation", "sm90", "--shape", "64,64,64"]):
        assert main([*asked, "--quick"]) == 1
        assert "nothing could run: there is no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "64,64"], "expected M,N,K"),
        (["--shape", "64,64,0"], "expected M,N,K"),
        (["--shape", "64,64,66"], "K = 66 is no multiple of 4"),
        (["--shape", "64,64,64", "--tokens", "512"], "--shape replaces"),
        (["--use", "fprop x24"], "--use goes with --shape"),
        (["--device", "h200", "--suite", "compression"], "--device has bounds of"),
        (["--device", "h300"], "'h300': expected one of a100"),
        (["--rounds", "0"], "expected a positive number"),
        (["--tune", "--implementation", "reference"], "--tune needs a kernel"),
        (["--suite", "vit_h"], "invalid choice: 'vit_h'"),
    ],
)
def test_bad_options_end_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "--tune --suite llama3_8b" in out and "exit status" in out
    assert max(map(len, out.splitlines())) <= 88


@pytest.fixture
def tunable(monkeypatch, tmp_path):
    """An H200 whose kernel is the reference, and wrong or broken in some Configs."""

    def gemm(a, b, bias, form, config):
        if config.cluster_m == 4:
            raise RuntimeError("ptxas fatal")
        if config.a_from == "registers":
            return swapped_halves(a, b, bias, form)
        return reference.gemm(a, b, bias, form)

    broken_kernel(monkeypatch, gemm)
    monkeypatch.setattr(devices, "this_device", lambda: H200)
    monkeypatch.setattr(dispatch, "this_device", lambda: H200)
    monkeypatch.setattr(measurements, "TUNED", tmp_path)
    configs = [
        SM90Config(128, 128, 64, 2),
        SM90Config(128, 256, 64, 2),
        SM90Config(128, 128, 64, 2, cluster_m=4),
        SM90Config(128, 128, 64, 2, a_from="registers"),
    ]
    monkeypatch.setattr(tuning, "search_space", lambda *_: configs)
    measurements.load.cache_clear()
    yield tmp_path
    measurements.load.cache_clear()


@pytest.mark.slow
def test_tuning_times_the_compression_of_both_layouts(tunable, compression, capsys):
    options = ["--rounds", "2", "--milliseconds", "1"]
    assert main(["--tune", "--shape", "32,48,64", *options]) == 1  # a Config is wrong
    assert {*compression} == {(-2, (64, 32)), (-1, (32, 64))}
    (entry,) = measurements.load(H200.name).entries
    low, median, high = entry.compressing
    assert f"with compression {median:.2f}x" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [None, -1])
def test_the_slower_layout_counts_and_none_alone(
    tunable, compression, monkeypatch, broken
):
    def compress_magnitude(a, *, axis, **options):
        if axis == broken:
            raise ValueError("lowering failed")
        return compress_here(a, axis=axis, **options)

    def race_of(racing, **options):  # the dense product takes 8, from (k, m) 4
        seconds = {"dense": 8, "sm90": 2, "sm90 compressing (k, m)": 4}
        return {c.name: np.full(3, seconds.get(c.name, 5)) for c in racing}

    compress_here = contenders.compress_magnitude
    monkeypatch.setattr(contenders, "compress_magnitude", compress_magnitude)
    monkeypatch.setattr(tuning, "race", race_of)
    options = {"rounds": 1, "seconds": 1e-3, "said": print, "sets": 1}
    tuned = tuning.tune(
        SMALL,
        tuning.search_space()[:1],
        kernel="sm90",
        dtype="bfloat16",
        **options,
    )
    assert tuned.measurement.ratio == (4, 4, 4)
    assert tuned.measurement.compressing == (None if broken else (1.6, 1.6, 1.6))
    assert tuned.failed == (
        ("compressing: ValueError: lowering failed",) if broken else ()
    )


@pytest.mark.slow
def test_tuning_writes_what_dispatch_reads(tunable, capsys):
    shape = ["--shape", "32,48,64", "--rounds", "2", "--milliseconds", "1"]
    assert main(["--tune", *shape]) == 1  # some Config was wrong, and none hides it
    out, err = capsys.readouterr()
    assert "a_from='registers'" in err and "off by" in err
    assert "cluster_m=4" in err and "ptxas fatal" in err
    measured = measurements.load(H200.name)
    (entry,) = measured.entries
    assert (entry.m, entry.n, entry.k, entry.architecture) == (32, 48, 64, "sm90")
    assert entry.config in tuning.search_space()[:2]
    assert measured.machine["jax"] == jax.__version__
    assert entry.compressing is None  # no kernel of compression runs here
    # Decompressing costs time, so on this machine the "kernel" loses, and says so.
    assert "the dense product's speed" in out and "for m, n, k = 32, 48, 64" in out
    # A second run keeps what it does not measure again.
    assert main(["--tune", *shape, "--shape", "32,64,64", "--use", "fprop x24"]) == 1
    assert len(measurements.load(H200.name).entries) == 3


def test_a_dense_product_that_is_wrong_ends_no_tuning_run(monkeypatch):
    monkeypatch.setattr(contenders, "TOLERANCE", {"bfloat16": -1.0})
    options = {"rounds": 1, "seconds": 1e-3, "said": print, "sets": 1}
    tuned = tuning.tune(SMALL, [], kernel="sm90", dtype="bfloat16", **options)
    assert tuned.measurement is None
    assert "jnp.dot is off by" in tuned.wrong[0]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_search_space_has_valid_configs_once(architecture):
    configs = search_space(architecture)
    assert len(configs) == len(set(configs)) >= 5
    for config in configs:
        assert dataclasses.replace(config) == config  # checks itself again
    limit = shared_memory_limit((8, 9))
    assert all(c.shared_memory <= limit for c in search_space(architecture, limit))


def test_search_space_of_an_unknown_architecture():
    with pytest.raises(ValueError, match=r"'sm75': expected one of \['sm80'"):
        search_space("sm75")


def test_configs_of_a_tuning_run():
    every = tuning.configs_for(H200)
    assert every == search_space("sm90")
    few = tuning.configs_for(H200, most=12)
    assert len(few) == len(set(few)) == 12 and set(few) <= set(every)
    left = set(every) - set(few)
    assert min(c.speed_bound for c in few) >= max(c.speed_bound for c in left)
    with pytest.raises(ValueError, match="NVIDIA T4 has no kernel to tune"):
        tuning.configs_for(Device("NVIDIA T4", (7, 5)))


@pytest.mark.gpu
def test_the_clock_on_a_gpu(tmp_path):
    arguments = [
        "--implementation",
        "reference",
        *SHAPES,
        "--output-dir",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    assert all(row["status"] == "ok" for row in record["products"])
