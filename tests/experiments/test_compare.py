"""The comparison: its statistics, its table, and the whole of it on the digits."""

import json

import pytest

from experiments import compare, imagenet
from experiments.compare import DENSE, METHODS, PRUNED, PRUNED_AS_IS, SPARSE, Record
from experiments.plots import plot_run, read_metrics
from experiments.presets import CompareOptions


def records(accuracies: dict[str, list[float]], seconds=None) -> list[Record]:
    return [
        Record(
            method,
            seed,
            top1,
            0 if method == DENSE else 8,
            (seconds or {}).get((method, seed)),
        )
        for method, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]


ACCURACIES = {
    DENSE: [99.0, 98.0, 100.0],
    SPARSE: [98.0, 98.5, 99.5],
    PRUNED: [97.0, 96.0, 98.0],
    PRUNED_AS_IS: [90.0, 80.0, 94.0],
}


class TestStatistics:
    def test_mean_deviation(self):
        # Deviations from 4 are -2, 0, 2: variance 8 / 2.
        assert compare.mean_deviation([2.0, 4.0, 6.0]) == (4.0, 2.0)

    def test_paired_gap(self):
        # Differences -1, 0.5, -0.5: mean -1/3; deviations -2/3, 5/6, -1/6 with squares
        # 16/36, 25/36, 1/36, so variance (42/36) / 2 = 7/12. t(2, 0.975) = 4.30.
        gap, deviation, half = compare.paired_gap(ACCURACIES[SPARSE], ACCURACIES[DENSE])
        assert gap == pytest.approx(-1 / 3)
        assert deviation == pytest.approx((7 / 12) ** 0.5)
        assert half == pytest.approx(4.30 * (7 / 36) ** 0.5)

    def test_a_common_shift_has_no_deviation(self):
        assert compare.paired_gap([1.0, 5.0, 9.0], [0.0, 4.0, 8.0]) == (1.0, 0.0, 0.0)

    def test_pairs_must_match(self):
        with pytest.raises(ValueError):
            compare.paired_gap([1.0, 2.0], [1.0, 2.0, 3.0])

    def test_step_ratio_is_the_median_over_pairs(self):
        seconds = {
            (DENSE, 0): 1.0,
            (DENSE, 1): 2.0,
            (DENSE, 2): 4.0,
            (SPARSE, 0): 1.5,
            (SPARSE, 1): 2.0,
            (SPARSE, 2): 8.0,
        }
        made = records(ACCURACIES, seconds)
        assert compare.step_ratio(made, SPARSE) == 1.5
        assert compare.step_ratio(made, DENSE) == 1.0
        assert compare.step_ratio(made, PRUNED) is None
        del seconds[DENSE, 0]
        assert compare.step_ratio(records(ACCURACIES, seconds), SPARSE) == 1.5


def test_table():
    head, rule, *rows = compare.table(records(ACCURACIES), "2:4").splitlines()
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0] == ["dense", "99.00 ± 1.00", "", "dense", "no training"]
    assert cells[1][:4] == [
        "SR-STE 2:4",
        "98.67 ± 0.76",
        "-0.33 ± 0.76",
        "yes, 8 layers",
    ]
    assert [row[0] for row in cells[2:]] == [
        "one-shot 2:4, batch norm re-estimated",
        "one-shot 2:4, as it is",
    ]


@pytest.mark.parametrize(
    ("gaps", "words"),
    [
        ([-1.0, -1.0, -1.1], "3 seeds are too few to rank"),
        ([-1.0, -1.0, -1.1, -1.0, -1.0], "5 seeds tell apart"),
        ([-1.0, 1.0, -1.1, 1.0, -1.0], "5 seeds are too few to rank"),
    ],
)
def test_verdict_ranks_only_what_it_can(gaps, words):
    dense = [99.0] * len(gaps)
    made = records({DENSE: dense, SPARSE: [99.0 + gap for gap in gaps]})
    assert words in " ".join(compare.verdict(made, 360).split())


def test_verdict_gives_the_interval():
    text = " ".join(compare.verdict(records(ACCURACIES), 360).split())
    assert "3 seeds are too few to rank dense and SR-STE" in text
    assert "-2.23 to +1.56" in text  # -1/3 ± 4.30 * sqrt(7/36)
    assert "0.28 points" in text


@pytest.mark.parametrize("seeds", [1, 11])
def test_number_of_seeds(seeds, tmp_path):
    options = CompareOptions(seeds=seeds, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="--seeds must be from 2 to 10"):
        compare.compare(options)


def test_folder_of_another_comparison(tmp_path):
    compare._write(tmp_path, CompareOptions(epochs=3), {})
    with pytest.raises(ValueError, match="other options"):
        compare.compare(CompareOptions(output_dir=str(tmp_path)))


def test_damaged_table(tmp_path):
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(ValueError, match="table.json is damaged"):
        compare.compare(CompareOptions(output_dir=str(tmp_path)))


def test_figures_from_metrics_with_empty_cells(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text(
        "step,phase,train_loss,flip_rate,test_top1\n"
        "5,dense,2.0,,\n10,sparse,1.0,0.5,0.75\n"
    )
    curves = read_metrics(tmp_path / "run" / "metrics.csv")
    assert curves["train_loss"] == ([5, 10], [2.0, 1.0])
    assert curves["flip_rate"] == ([10], [0.5])
    assert "phase" not in curves
    plot_run(tmp_path / "run")
    for figure in ("learning_curves", "flip_rate"):
        assert (tmp_path / "run" / "plots" / f"{figure}.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two, unless the machine is shared
def test_the_whole_comparison(tmp_path, capsys):
    folder = tmp_path / "digits"
    assert imagenet.main(["--output-dir", str(folder)]) == 0
    printed = capsys.readouterr().out

    saved = json.loads((folder / "table.json").read_text())["runs"]
    assert len(saved) == 3 * len(METHODS)
    top1 = {
        method: [run["top1"] for run in saved if run["method"] == method]
        for method in METHODS
    }
    mean = {method: sum(values) / 3 for method, values in top1.items()}
    assert mean[DENSE] >= 98
    assert abs(mean[SPARSE] - mean[DENSE]) <= 1.5
    assert mean[PRUNED_AS_IS] < mean[DENSE] - 1
    assert all((run["sparse_layers"] > 0) == (run["method"] != DENSE) for run in saved)

    assert (folder / "table.md").read_text().strip() in printed
    for figure in ("learning_curves", "flip_rate", "accuracy"):
        assert (folder / "plots" / f"{figure}.png").stat().st_size > 0
    for name in ("dense-seed0", "sr_ste-seed2"):
        for file in ("config.json", "plan.json", "metrics.csv", "options.json"):
            assert (folder / name / file).exists(), file

    # The pairs differ by method alone: until masks matter, nothing else may differ.
    dense, sparse = (
        read_metrics(folder / f"{name}-seed1" / "metrics.csv")
        for name in ("dense", "sr_ste")
    )
    assert dense["lr"] == sparse["lr"]

    assert imagenet.main(["--output-dir", str(folder)]) == 0
    assert capsys.readouterr().out.count("(already there)") == 6
