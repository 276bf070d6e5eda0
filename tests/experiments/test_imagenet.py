"""The command line of experiments.imagenet: what it reads, refuses and trains."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import nmjax
from experiments import imagenet, presets, single
from experiments.methods import CompareOptions
from experiments.presets import PRESETS, Options
from nmjax import models
from nmjax.training import TrainConfig


def refusal(*arguments: str) -> str:
    """The message with which `parse` and the checks after it refuse a command line."""
    with pytest.raises(ValueError) as error:
        options = imagenet.parse(arguments)
        assert isinstance(options, Options)
        single.train_config(options)
        single.sparsity_rules(options)
    return str(error.value)


class TestParse:
    def test_nothing_is_the_comparison(self):
        assert imagenet.parse([]) == CompareOptions()

    def test_comparison_takes_its_own_options(self):
        options = imagenet.parse(["--seeds", "4", "--output-dir", "x"])
        assert options == CompareOptions(seeds=4, output_dir="x")
        assert imagenet.parse(["compare", "--epochs", "2"]) == CompareOptions(epochs=2)
        words = "compare --dataset fashion_mnist --recipes all --patterns 2:4,1:8"
        assert imagenet.parse(words.split()) == CompareOptions(
            recipes="all", patterns="2:4,1:8", dataset="fashion_mnist"
        )

    def test_preset_gives_the_defaults(self):
        options = imagenet.parse(["resnet50-1to4", "--data-path", "D", "--lr=0.2"])
        expected = PRESETS["resnet50-1to4"].options.replace(
            data_path="D", lr=0.2, output_dir="runs/resnet50-1to4"
        )
        assert options == expected

    def test_model_without_a_preset(self):
        command = "--model resnet18 --recipe sr_ste --pattern 1:4 --decay 2e-4 --dense"
        options = imagenet.parse([*command.split(), "(.*/)?head", "stem"])
        assert isinstance(options, Options)
        assert options.model.model == "resnet18"
        assert options.sparsity.pattern == "1:4"
        assert options.sparsity.dense == ("(.*/)?head", "stem")
        assert options.run.output_dir == "runs/imagenet2012-resnet18-sr_ste"

    @pytest.mark.parametrize(
        "arguments",
        [["--help"], ["-h"], ["compare", "--help"], ["resnet18-2to4", "-h"]],
    )
    def test_help(self, arguments, capsys):
        with pytest.raises(SystemExit) as stop:
            imagenet.parse(arguments)
        assert not stop.value.code
        assert "usage: python -m experiments.imagenet" in capsys.readouterr().out

    def test_help_names_every_option_and_preset(self, capsys):
        with pytest.raises(SystemExit):
            imagenet.parse(["--help"])
        text = capsys.readouterr().out
        for name in [*map(presets.flag, Options().flat()), *PRESETS]:
            assert name in text

    def test_help_does_not_import_jax(self):
        code = (
            "import sys\nfrom experiments import imagenet\n"
            "try:\n  imagenet.main(['--help'])\nexcept SystemExit:\n  pass\n"
            "print('imported jax:', 'jax' in sys.modules)"
        )
        root = Path(__file__).parents[2]
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
        )
        assert result.stdout.endswith("imported jax: False\n"), result.stderr


class TestRefuse:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (
                "resnet50-2to5",
                "no preset 'resnet50-2to5' (did you mean resnet50-2to4?)",
            ),
            ("nothing", "There are: digits-resnet8-2to4, "),
            ("--model resnet9", "Expected one of ('resnet8', 'resnet18'"),
            ("--model resnet8 --recipe srste", "'srste'"),
            ("--model resnet8 --lr fast", "--lr: could not convert string to float"),
            ("--model resnet8 --lrate 1", "--lrate"),
            ("--lr 0.1", "--model"),
            ("--model resnet8 --lr -1", "--lr is -1.0, expected a number > 0"),
            ("--model resnet8 --lr nan", "--lr is nan"),
            ("--model resnet8 --epochs 0", "--epochs is 0, expected an integer >= 1"),
            ("--model resnet8 --pattern 4:2", "--pattern: not an N:M pattern: '4:2'"),
            ("--model resnet8 --decay -1", "--decay: decay must be finite"),
            ("--model resnet8 --dense (", "--dense: Rule path '(' is not a regular"),
            ("--model resnet8 --dense a --dense b", "--dense is given twice"),
            (
                "--model resnet8 --batch-size 10 --gradient-accumulation 3",
                "--batch-size 10 is not a multiple of --gradient-accumulation 3",
            ),
            (
                "resnet18-2to4 --lr-warmup-epochs 200",
                "--lr-warmup-epochs is 200.0, expected a number >= 0 and < 120",
            ),
            ("resnet50-dense --pattern 2:4", "--pattern has no effect with --recipe"),
            ("resnet18-2to4 --recipe ste --decay 0", "--decay has no effect with"),
            ("resnet18-2to4 --opt adamw --nesterov", "--nesterov has no effect with"),
            ("resnet18-2to4 --lr-gamma 0.2", "--lr-gamma has no effect with"),
            ("resnet18-2to4 --recipe one_shot", "--pretrained"),
            (
                "resnet18-2to4 --recipe ste --recipe-options refresh=0",
                "--recipe-options: refresh must be a number of steps",
            ),
            (
                "resnet18-2to4 --recipe-options interval=40",
                "--recipe-options interval=40: expected NAME=VALUE, and the names of "
                "--recipe sr_ste are: ",
            ),
            ("resnet18-2to4 --recipe-options refresh", "expected NAME=VALUE"),
            ("digits-resnet8-2to4 --validate", "give --train-size too"),
            ("digits-resnet8-2to4 --fold 1", "give --folds too"),
            ("--test-only", "--test-only needs --resume RUN"),
            ("resnet18-2to4 --resume runs/x", "leave resnet18-2to4 out"),
            ("--resume /nonexistent/run", "no options.json"),
        ],
    )
    def test_message(self, arguments, words):
        assert words in refusal(*arguments.split())

    def test_arguments_of_the_recipe(self):
        words = "resnet18-2to4 --recipe ste --recipe-options refresh=40"
        *_, rule = single.sparsity_rules(imagenet.parse(words.split()))
        assert rule.recipe == nmjax.recipes.ste("2:4", refresh=40)

    def test_a_presets_own_value_may_idle(self):
        arguments = ["resnet18-2to4", "--recipe", "dense"]
        assert single.sparsity_rules(imagenet.parse(arguments)) == []

    def test_one_line_and_exit_code(self, capsys):
        assert imagenet.main(["resnet18-2to4", "--lr", "x"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_valid(self, name):
        options = imagenet.parse([name])
        assert isinstance(single.train_config(options), TrainConfig)
        hash(options)
        assert PRESETS[name].about

    @pytest.mark.parametrize("name", PRESETS)
    def test_through_json(self, name):
        options = PRESETS[name].options
        assert Options.from_flat(json.loads(json.dumps(options.flat()))) == options

    def test_names_say_what_they_are(self):
        for name, preset in PRESETS.items():
            options = preset.options
            assert options.model.model in name
            end = (
                "dense"
                if options.sparsity.recipe == "dense"
                else options.sparsity.pattern.replace(":", "to")
            )
            assert name.endswith(end)

    def test_option_names_are_unique_over_the_groups(self):
        groups = [
            getattr(Options(), field.name) for field in dataclasses.fields(Options)
        ]
        names = [field.name for group in groups for field in dataclasses.fields(group)]
        assert len(names) == len(set(names))

    def test_models_are_those_of_the_registry(self):
        assert get_args(presets.Model) == models.NAMES

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="lrate"):
            Options().replace(lrate=1)

    def test_every_field_of_the_trainer_has_an_option(self):
        fields = {field.name for field in dataclasses.fields(TrainConfig)}
        assert set(single._CONFIG) == fields - {"loss_scale", "keep"}


class TestBeforeTraining:
    """What only the data, the model or the disk can tell, through `main`."""

    @pytest.fixture
    def error(self, capsys, monkeypatch):
        def train(*args, **kwargs):
            raise AssertionError("training began")

        monkeypatch.setattr(single.training, "train", train)

        def run(*arguments: str) -> str:
            assert imagenet.main(arguments) == 2
            message = capsys.readouterr().err
            assert message.startswith("error: ")
            return message

        return run

    def test_dataset_missing(self, error, tmp_path):
        place = ["--data-path", str(tmp_path), "--output-dir", str(tmp_path / "run")]
        message = error("resnet18-2to4", *place)
        assert "python -m experiments.prepare imagenet2012" in message
        assert not (tmp_path / "run").exists()

    def test_output_below_a_file(self, error, tmp_path):
        (tmp_path / "file").write_text("")
        folder = str(tmp_path / "file" / "run")
        message = error("digits-resnet8-2to4", "--output-dir", folder)
        assert f"{tmp_path / 'file'} is a file, not a folder" in message

    def test_batch_larger_than_the_set(self, error, tmp_path):
        arguments = ["--batch-size", "2000", "--output-dir", str(tmp_path)]
        assert "1437 training images" in error("digits-resnet8-2to4", *arguments)

    def test_dense_that_matches_nothing(self, error, tmp_path):
        arguments = ["--dense", "haed", "--output-dir", str(tmp_path)]
        message = error("digits-resnet8-2to4", *arguments)
        assert "'haed' matches no layer" in message
        assert "stage1_block1/conv1" in message

    def test_ineligible_layer(self, error, tmp_path):
        arguments = ["--ineligible", "error", "--output-dir", str(tmp_path)]
        message = error("digits-resnet8-2to4", *arguments)
        assert "stem" in message
        assert "--ineligible" in message

    def test_folder_of_a_run_with_other_options(self, error, tmp_path):
        (tmp_path / "checkpoints" / "5").mkdir(parents=True)
        options = PRESETS["digits-resnet8-2to4"].options.replace(lr=0.5)
        (tmp_path / "options.json").write_text(json.dumps(options.flat()))
        message = error("digits-resnet8-2to4", "--output-dir", str(tmp_path))
        assert "--lr 0.5, not 0.1" in message
        # Without a checkpoint there is nothing to continue.
        (tmp_path / "checkpoints" / "5").rmdir()
        options = imagenet.parse(["digits-resnet8-2to4", "--output-dir", str(tmp_path)])
        assert single.run_folder(options) == tmp_path

    def test_a_pattern_that_fits_no_layer(self, error, tmp_path):
        place = ["--output-dir", str(tmp_path / "run")]
        message = error("digits-resnet8-2to4", "--pattern", "2:5", *place)
        assert "--recipe sr_ste --pattern 2:5 fits no layer of resnet8" in message
        assert "stem/kernel: axis -2 has size 1, not a multiple of 5" in message
        assert not (tmp_path / "run").exists()

    def test_an_empty_output_dir(self, error):
        message = error("digits-resnet8-2to4", "--output-dir", "")
        assert "--output-dir is empty" in message

    def test_steps_of_the_rate_beyond_the_end(self, error):
        message = error("digits-resnet8-2to4", "--lr-scheduler", "step")
        assert "--lr-steps (30, 60, 80) is below --epochs 15" in message

    def test_damaged_options(self, error, tmp_path):
        (tmp_path / "options.json").write_text("{")
        assert "options.json is damaged" in error("--resume", str(tmp_path))

    def test_pretrained_that_is_no_run(self, error, tmp_path):
        place = ["--pretrained", str(tmp_path), "--output-dir", str(tmp_path / "run")]
        assert str(tmp_path) in error("digits-resnet8-2to4", *place)


@pytest.mark.slow
def test_train_continue_and_evaluate(tmp_path, capsys):
    folder = str(tmp_path / "run")
    short = "--batch-size 256 --epochs 1 --lr-warmup-epochs 0".split()
    assert imagenet.main(["digits-resnet8-2to4", *short, "--output-dir", folder]) == 0
    printed = capsys.readouterr().out
    assert "8 of 10 weights sparse" in printed
    assert "77,754 parameters" in printed
    assert "N:M check: passed, 8 layers" in printed
    top1 = printed.split("Test set: ")[1].split(",")[0]
    for figure in ("learning_curves", "flip_rate"):
        assert (tmp_path / "run" / "plots" / f"{figure}.png").stat().st_size > 0

    assert imagenet.main(["--test-only", "--resume", f"{folder}/best"]) == 0
    assert f"360 test images of digits: {top1}" in capsys.readouterr().out

    assert imagenet.main(["--resume", folder, "--epochs", "2"]) == 0
    assert presets.read_options(tmp_path / "run").optim.epochs == 2
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == [5, 10]

    start = ["--pretrained", folder, "--output-dir", str(tmp_path / "pruned")]
    one_shot = ["--recipe", "one_shot", *short]
    assert imagenet.main(["digits-resnet8-2to4", *one_shot, *start]) == 0
    assert "N:M check: passed, 8 layers" in capsys.readouterr().out
    Path(folder).rename(tmp_path / "moved")  # what it began with is needed no more
    pruned = str(tmp_path / "pruned")
    assert imagenet.main(["--resume", pruned, "--epochs", "2"]) == 0
    larger_than_training = ["--batch-size", "1500"]
    evaluate = ["--test-only", "--resume", pruned, *larger_than_training]
    assert imagenet.main(evaluate) == 0
    assert "360 test images" in capsys.readouterr().out

    folder = str(tmp_path / "learned")  # its masks are those of logits
    learned = ["--recipe", "learned", *short, "--output-dir", folder]
    assert imagenet.main(["digits-resnet8-2to4", *learned]) == 0
    top1 = capsys.readouterr().out.split("Test set: ")[1].split(",")[0]
    assert imagenet.main(["--test-only", "--resume", folder]) == 0
    assert f"360 test images of digits: {top1}" in capsys.readouterr().out
