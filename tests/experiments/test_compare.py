"""The comparison: its methods, its resumption, and the whole of it on the digits."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import get_args

import pytest

from experiments import compare, imagenet, single
from experiments.methods import (
    METHODS,
    PAIRS,
    TRAINING,
    Arm,
    CompareOptions,
    arms,
    options_of,
)
from experiments.plots import plot_run, read_metrics
from experiments.presets import Recipe
from experiments.records import Record, Records
from nmjax import recipes
from nmjax.training.steps import jit_train_step


class TestMethods:
    @pytest.mark.parametrize("name", METHODS)
    def test_every_entry_makes_its_recipe(self, name):
        method = METHODS[name]
        pattern = "" if method.patterns == () else (method.patterns or ("2:4",))[0]
        run = options_of(Arm(name, pattern), CompareOptions(), 0, 0)
        single.train_config(run)
        rules = single.sparsity_rules(run)
        if not pattern:
            assert rules == []
            return
        assert rules[-1].recipe.name == method.recipe
        assert str(rules[-1].recipe.pattern) == pattern
        for argument, value in method.arguments.items():
            assert getattr(rules[-1].recipe, argument) == value

    @pytest.mark.parametrize("epochs, dense", [(None, 5), (6, 2), (2, 1)])
    def test_a_third_of_the_epochs_is_dense(self, epochs, dense):
        options = CompareOptions(epochs=epochs)
        run = options_of(Arm("sr_ste_dense_start", "2:4"), options, 0, 0)
        assert single.train_config(run).dense_epochs == dense

    def test_recipes_are_those_of_the_library(self):
        made = {
            name
            for name, function in vars(recipes).items()
            if callable(function) and function.__module__ == recipes.__name__
        }
        named = {name for name in made if name[0].islower()} - {"as_recipe"}
        assert set(get_args(Recipe)) == named

    def test_starts_and_pairs_are_methods(self):
        named = {m.start for m in METHODS.values() if m.start}
        assert named | {name for pair in PAIRS for name in pair} <= set(METHODS)

    def test_what_others_need_comes_first_and_once(self):
        chosen = arms(CompareOptions(recipes="asp,ste", patterns="2:4,1:8"))
        assert chosen == [
            Arm("dense", ""),
            Arm("asp", "2:4"),
            Arm("asp", "1:8"),
            Arm("ste", "2:4"),
            Arm("ste", "1:8"),
        ]
        everything = arms(CompareOptions(recipes="all"))
        assert [arm.name for arm in everything] == list(METHODS)

    def test_a_method_of_one_pattern(self, monkeypatch):
        only = dataclasses.replace(METHODS["ste"], patterns=("2:4",))
        monkeypatch.setitem(METHODS, "ste", only)
        chosen = arms(CompareOptions(recipes="all", patterns="2:4,1:8"))
        assert Arm("ste", "2:4") in chosen
        assert Arm("ste", "1:8") not in chosen
        with pytest.raises(ValueError, match="--recipes ste is for 2:4 alone"):
            arms(CompareOptions(recipes="ste", patterns="1:8"))

    @pytest.mark.parametrize("patterns", ["", "2:4,"])
    def test_an_empty_pattern(self, patterns):
        """It would train 2:4, under a label without a pattern."""
        with pytest.raises(ValueError, match="expected patterns such as 2:4,1:8"):
            arms(CompareOptions(patterns=patterns))

    def test_unknown_method(self):
        with pytest.raises(ValueError, match="no method 'srste'; there are dense, "):
            arms(CompareOptions(recipes="dense,srste"))

    def test_options_of_a_network(self):
        options = CompareOptions(
            folds=5, epochs=2, decay=0.1, train_size=100, output_dir="x"
        )
        run = options_of(Arm("sr_ste", "1:8"), options, fold=3, seed=2).flat()
        assert (run["folds"], run["fold"], run["seed"]) == (5, 3, 2)
        assert (run["epochs"], run["decay"], run["train_size"]) == (2, 0.1, 100)
        assert run["output_dir"] == "x/sr_ste-1to8-fold3-seed2"
        assert run["pretrained"] is None
        asp = options_of(Arm("asp", "1:8"), options, fold=3, seed=2).flat()
        assert asp["pretrained"] == "x/dense-fold3-seed2"
        assert asp["decay"] is None

    def test_a_decay_is_for_methods_with_the_papers(self):
        options = CompareOptions(recipes="all", decay=0.1)
        runs = {arm.name: options_of(arm, options, 0, 0) for arm in arms(options)}
        decays = {name: run.sparsity.decay for name, run in runs.items()}
        assert decays["sr_ste"] == decays["sr_ste_dense_start"] == 0.1
        assert (decays["sr_ste_scaled"], decays["two_by_four"]) == (0.02, 6e-5)
        with pytest.raises(
            ValueError, match="--decay 0.1 is for sr_ste, sr_ste_dense_"
        ):
            arms(CompareOptions(recipes="two_by_four", decay=0.1))

    def test_labels(self):
        assert Arm("one_shot_as_is", "2:4").label == "one-shot 2:4, as it is"
        assert Arm("dense", "").label == "dense"
        assert Arm("sr_ste", "1:16").folder == "sr_ste-1to16"


class Killed(Exception):
    pass


@pytest.mark.slow
class TestResumption:
    """With networks that are not trained."""

    OPTIONS = CompareOptions(recipes="sr_ste", folds=2, seeds=2)

    @pytest.fixture
    def trained(self, monkeypatch):
        """The runs that were asked for; "kill" as the next stops there."""
        asked = []

        def train(run, data, folder, *, progress):
            if asked and asked[-1] == "kill":
                asked.pop()
                raise Killed
            asked.append(folder.name)
            folder.mkdir(parents=True, exist_ok=True)
            rates = "" if run.sparsity.recipe == "dense" else "0.5,0.75"
            (folder / "metrics.csv").write_text(
                "step,train_loss,flip_rate,retained_magnitude,test_top1\n"
                f"10,1.0,{rates or ','},\n40,0.5,{rates and '0.1,0.7' or ','},0.9\n"
            )
            layers = 0 if run.sparsity.recipe == "dense" else 8
            return single.Outcome(0.9 - layers / 100 + run.run.seed / 50, 1, layers, 1)

        monkeypatch.setattr(single, "train_network", train)
        return asked

    def test_a_killed_comparison_loses_nothing(self, trained, tmp_path, monkeypatch):
        options = dataclasses.replace(self.OPTIONS, output_dir=str(tmp_path))
        said = []
        compare.compare(options, lambda text: (said.append(text), None)[1])
        whole = (tmp_path / "table.json").read_text()
        names = list(trained)
        assert names == [
            f"{name}-fold{fold}-seed{seed}"
            for seed in range(2)
            for fold in range(2)
            for name in ("dense", "sr_ste-2to4")
        ]
        table = (tmp_path / "table.md").read_text()
        assert said[-3].strip() in table
        assert "compare --recipes sr_ste --folds 2 --seeds 2" in " ".join(table.split())
        for figure in ("accuracy", "gaps", "step_time", "learning_curves", "flip_rate"):
            assert (tmp_path / "plots" / f"{figure}.png").stat().st_size > 0
        record = Record(**json.loads(whole)["runs"][1])
        # Ten steps at 0.5 and thirty at 0.1.
        assert record.flip_rate == pytest.approx(0.2)
        assert (record.retained_magnitude, record.top1) == (0.7, pytest.approx(82))

        monkeypatch.setattr(compare, "plot_runs", lambda *_: None)
        monkeypatch.setattr(compare, "plot_comparison", lambda *_: None)
        for cut in (1, 4, 7):
            again = dataclasses.replace(options, output_dir=str(tmp_path / str(cut)))
            del trained[:]
            original = Records.add

            def add(records, record, original=original, cut=cut):
                original(records, record)
                if len(trained) == cut:
                    trained.append("kill")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Records, "add", add)
                with pytest.raises(Killed):
                    compare.compare(again, lambda _: None)
            compare.compare(again, lambda _: None)
            assert trained == names
            assert (tmp_path / str(cut) / "table.json").read_text() == whole

    def test_it_can_be_extended(self, trained, tmp_path, monkeypatch):
        monkeypatch.setattr(compare, "plot_runs", lambda *_: None)
        monkeypatch.setattr(compare, "plot_comparison", lambda *_: None)
        options = dataclasses.replace(self.OPTIONS, output_dir=str(tmp_path), seeds=1)
        compare.compare(options, lambda _: None)
        del trained[:]
        more = dataclasses.replace(options, recipes="sr_ste,ste", patterns="2:4,1:8")
        compare.compare(more, lambda _: None)
        assert trained == [
            f"{arm}-fold{fold}-seed0"
            for fold in range(2)
            for arm in ("sr_ste-1to8", "ste-2to4", "ste-1to8")
        ]

    def test_run_folders_can_be_deleted(self, trained, tmp_path, monkeypatch):
        drawn = []
        monkeypatch.setattr(compare, "plot_runs", lambda runs, _: drawn.append(runs))
        monkeypatch.setattr(compare, "plot_comparison", lambda *_: None)
        options = dataclasses.replace(self.OPTIONS, output_dir=str(tmp_path))
        compare.compare(options, lambda _: None)
        del trained[:]
        shutil.rmtree(tmp_path / "sr_ste-2to4-fold1-seed0")
        for run in tmp_path.glob("dense-*"):
            shutil.rmtree(run)
        compare.compare(options, lambda _: None)
        for run in tmp_path.glob("sr_ste-*"):
            shutil.rmtree(run)
        compare.compare(options, lambda _: None)
        assert trained == []
        assert [{name: len(runs) for name, runs in x.items()} for x in drawn] == [
            {"dense": 4, "SR-STE 2:4": 4},
            {"SR-STE 2:4": 3},
        ]

    def test_other_options(self, tmp_path):
        other = CompareOptions(epochs=3)
        Records(tmp_path, other).add(Record("dense", "", 0, 0, 9, 0, 1, None, None))
        with pytest.raises(ValueError, match="other options"):
            compare.compare(CompareOptions(output_dir=str(tmp_path)))

    def test_a_method_that_has_changed(self, tmp_path, monkeypatch):
        record = Record("sr_ste", "2:4", 0, 0, 9, 8, 1, 0.1, 0.7)
        Records(tmp_path, CompareOptions()).add(record)
        named = dataclasses.replace(METHODS["sr_ste"], label="SR")
        monkeypatch.setitem(METHODS, "sr_ste", named)
        assert Records(tmp_path, CompareOptions()).all() == [record]
        changed = dataclasses.replace(METHODS["sr_ste"], arguments={"decay": 0.5})
        monkeypatch.setitem(METHODS, "sr_ste", changed)
        with pytest.raises(ValueError, match="holds runs of sr_ste as it was before"):
            Records(tmp_path, CompareOptions())

    def test_a_training_that_has_changed(self, tmp_path, monkeypatch):
        record = Record("dense", "", 0, 0, 9, 0, 1, None, None)
        Records(tmp_path, CompareOptions()).add(record)
        changed = TRAINING["digits"].replace(batch_size=32)
        monkeypatch.setitem(TRAINING, "digits", changed)
        with pytest.raises(ValueError, match="other training, .*'batch_size': 64"):
            Records(tmp_path, CompareOptions())

    def test_damaged_table(self, tmp_path):
        (tmp_path / "table.json").write_text("{")
        with pytest.raises(ValueError, match="table.json is damaged"):
            compare.compare(CompareOptions(output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": 1}, "--seeds must be at least 2"),
        ({"folds": 1}, "--folds must be at least 2"),
        ({"folds": 2, "seeds": 0}, "--seeds must be at least 2"),
        ({"validate": True}, "--validate tests on what --train-size leaves out"),
        ({"patterns": "4:2"}, "--pattern: not an N:M pattern"),
        (
            {"patterns": "1:5"},
            "SR-STE 1:5: --recipe sr_ste --pattern 1:5 fits no layer of resnet8",
        ),
        ({"train_size": 10}, "--batch-size 64 is more than the 10 training images"),
    ],
)
def test_refused_before_training(changes, words, tmp_path):
    options = CompareOptions(output_dir=str(tmp_path / "runs"), **changes)
    with pytest.raises(ValueError, match=words):
        compare.compare(options, lambda _: None)
    assert not (tmp_path / "runs").exists()


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
@pytest.mark.timeout(1800)  # two or three minutes, unless the machine is shared
def test_the_whole_comparison(tmp_path, capsys):
    """The README's job; where NMJAX_COMPARISON names the folder of one, that one."""
    folder = Path(os.environ.get("NMJAX_COMPARISON", tmp_path / "digits"))
    command = ["--output-dir", str(folder)]
    if "NMJAX_COMPARISON" not in os.environ:
        jit_train_step.cache_clear()  # of the tests that ran before in this process
        assert imagenet.main(command) == 0
        # One compilation for each method, not for each seed.
        assert jit_train_step.cache_info().currsize <= 2
        capsys.readouterr()
    assert imagenet.main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("(already there)") == 12

    saved = json.loads((folder / "table.json").read_text())["runs"]
    methods = ("dense", "sr_ste", "one_shot", "one_shot_as_is")
    assert len(saved) == 3 * len(methods)
    top1 = {m: [run["top1"] for run in saved if run["method"] == m] for m in methods}
    mean = {method: sum(values) / 3 for method, values in top1.items()}
    assert mean["dense"] >= 98
    assert abs(mean["sr_ste"] - mean["dense"]) <= 1.5
    assert mean["one_shot_as_is"] < mean["dense"] - 1
    assert all(
        (run["sparse_layers"] > 0) == (run["method"] != "dense") for run in saved
    )

    table = (folder / "table.md").read_text()
    assert table.rpartition("`python")[0].strip() in printed
    for figure in ("learning_curves", "flip_rate", "accuracy", "gaps"):
        assert (folder / "plots" / f"{figure}.png").stat().st_size > 0
    for name in ("dense-seed0", "sr_ste-2to4-seed1"):
        for file in ("config.json", "plan.json", "metrics.csv", "options.json"):
            assert (folder / name / file).exists(), file

    # The pairs differ by method alone: until masks matter, nothing else may differ.
    dense, sparse = (
        read_metrics(folder / f"{name}-seed1" / "metrics.csv")
        for name in ("dense", "sr_ste-2to4")
    )
    assert dense["lr"] == sparse["lr"]
