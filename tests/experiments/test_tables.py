"""The statistics of a comparison and its tables, with values by hand."""

import pytest

from experiments import tables
from experiments.methods import Arm
from experiments.records import Record
from experiments.tables import Comparison

DENSE, SPARSE, STE = Arm("dense", ""), Arm("sr_ste", "2:4"), Arm("ste", "2:4")
PRUNED = Arm("one_shot", "2:4")
ACCURACIES = {
    DENSE: [99.0, 98.0, 100.0],
    SPARSE: [98.0, 98.5, 99.5],
    PRUNED: [97.0, 96.0, 98.0],
}


def comparison(accuracies, seconds=None, folds=1):
    units = [(i % folds, i // folds) for i in range(len(accuracies[DENSE]))]
    records = [
        Record(
            arm.name,
            arm.pattern,
            *unit,
            top1=top1,
            sparse_layers=0 if arm == DENSE else 8,
            step_seconds=(seconds or {}).get((arm, unit[1])),
            flip_rate=0.01 if arm == SPARSE else None,
            retained_magnitude=None if arm == DENSE else 0.75,
        )
        for arm, values in accuracies.items()
        for unit, top1 in zip(units, values, strict=True)
    ]
    return Comparison(list(accuracies), units, records)


def words(text):
    return " ".join(text.split())


def test_mean_deviation():
    # Deviations from 4 are -2, 0, 2: variance 8 / 2.
    assert tables.mean_deviation([2.0, 4.0, 6.0]) == (4.0, 2.0)


def test_paired_gap():
    # Differences -1, 0.5, -0.5: mean -1/3; deviations -2/3, 5/6, -1/6 with squares
    # 16/36, 25/36, 1/36, so variance (42/36) / 2 = 7/12. t(2, 0.975) = 4.302653.
    gap, deviation, half = tables.paired_gap(ACCURACIES[SPARSE], ACCURACIES[DENSE])
    assert gap == pytest.approx(-1 / 3)
    assert deviation == pytest.approx((7 / 12) ** 0.5)
    assert half == pytest.approx(4.302653 * (7 / 36) ** 0.5)


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (5, 2.77645), (20, 2.09302)])
def test_interval_is_students(n, quantile):
    values = [1.0, -1.0, *([0.0] * (n - 2))]
    deviation = (2 / (n - 1)) ** 0.5
    half = tables.paired_gap(values, [0.0] * n)[2]
    assert half == pytest.approx(quantile * deviation / n**0.5, rel=1e-5)


def test_a_common_shift_has_no_deviation():
    assert tables.paired_gap([1.0, 5.0, 9.0], [0.0, 4.0, 8.0]) == (1.0, 0.0, 0.0)


def test_pairs_must_match():
    with pytest.raises(ValueError):
        tables.paired_gap([1.0, 2.0], [1.0, 2.0, 3.0])


def test_a_missing_record_is_an_error():
    with pytest.raises(KeyError):
        Comparison([DENSE], [(0, 0)], [])


def test_step_ratio_is_within_a_unit():
    seconds = dict.fromkeys([(DENSE, 0), (DENSE, 1)], 1.0) | {(DENSE, 2): 4.0}
    seconds |= {(SPARSE, 0): 1.5, (SPARSE, 1): 2.0, (SPARSE, 2): 8.0}
    assert comparison(ACCURACIES, seconds).step_ratio(SPARSE) == [1.5, 2.0, 2.0]
    assert comparison(ACCURACIES, seconds).step_ratio(PRUNED) == []
    del seconds[DENSE, 0]
    assert comparison(ACCURACIES, seconds).step_ratio(SPARSE) == [2.0, 2.0]


def test_table():
    head, rule, *rows = tables.table(comparison(ACCURACIES)).splitlines()
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert cells[0] == ["dense", "99.00 ± 1.00", *([""] * 5), "dense"]
    assert cells[1] == [
        "SR-STE 2:4",
        "98.67 ± 0.76",
        "-0.33 ± 0.76",
        "-2.23 to +1.56",  # -1/3 ± 4.302653 · sqrt(7/36)
        "1.000",
        "75.0",
        "",  # not timed
        "yes, 8 layers",
    ]
    assert cells[2][0] == "one-shot 2:4, batch norm re-estimated"
    assert (cells[2][4], cells[2][6]) == ("", "no training")


def test_pairs_table():
    assert tables.pairs_table(comparison(ACCURACIES)) == ""
    found = comparison({**ACCURACIES, STE: [97.0, 98.0, 99.0]})
    *_, row = tables.pairs_table(found).splitlines()
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    # Differences 1, 0.5, 0.5: deviation sqrt(1/12), half 4.302653 · sqrt(1/36).
    assert cells == ["SR-STE 2:4 minus STE 2:4", "+0.67 ± 0.29", "-0.05 to +1.38"]


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([-1.0, -1.0, -1.1], "3 seeds are too few to rank against dense: SR-STE 2:4"),
        ([-1.0, -1.0, -1.1, -1.0, -1.0], "5 seeds tell apart from dense: SR-STE 2:4"),
        ([-1.0, 1.0, -1.1, 1.0, -1.0], "5 seeds are too few to rank"),
    ],
)
def test_verdict_ranks_only_what_it_can(gaps, said):
    accuracies = {DENSE: [99.0] * len(gaps), SPARSE: [99.0 + gap for gap in gaps]}
    text = words(tables.verdict(comparison(accuracies), 360))
    assert said in text
    assert f"{len(gaps) - 1} degrees of freedom" in text
    assert "0.28 points" in text
    assert "folds" not in text


def test_verdict_of_folds_says_what_they_share():
    accuracies = {DENSE: [99.0] * 6, SPARSE: [98.0] * 6}
    text = words(tables.verdict(comparison(accuracies, folds=3), 360))
    assert "3 folds × 2 seeds tell apart" in text
    assert "folds share training images" in text
