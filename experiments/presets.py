"""The options of `python -m experiments.imagenet`, their presets, and what is refused.

The comment above each field is its text in `--help`. Nothing here imports jax, so that
help and most refusals come at once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

Dataset = Literal["digits", "fashion_mnist", "imagenet2012", "image_folder"]
Recipe = Literal[
    "dense",
    "ste",
    "sr_ste",
    "transposable",
    "bi_mask",
    "fst",
    "semi_sparse_weight",
    "semi_sparse_activation",
    "two_by_four",
    "s_ste",
    "step",
    "learned",
    "one_shot",
    "frozen",
]
Model = Literal["resnet8", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What the network is trained on. Nothing is ever downloaded."""

    # digits is in this repository; `python -m experiments.prepare --help` tells how the
    # others are made.
    dataset: Dataset = "imagenet2012"

    # Folder that holds the dataset; None = where `experiments.prepare` puts it.
    data_path: str | None = None

    # Height and width of the images in pixels; None = the dataset's own, which is 8 for
    # digits, 28 for fashion_mnist, 224 for the others.
    image_size: int | None = None

    # Of training images: shift (digits, fashion_mnist) by up to an eighth of the side;
    # crop_flip (the others): a random crop of 8 to 100 % of the area, mirrored in one
    # case of two; None = crop_flip where it applies, otherwise none.
    augment: Literal["none", "shift", "crop_flip"] | None = None

    # Training images, a fixed part of them all; None = all. For digits and
    # fashion_mnist, as the next three are.
    train_size: int | None = None

    # Test on the training images that --train-size leaves out, not on the test set: for
    # the choice of hyperparameters.
    validate: bool = False

    # Parts of a cross-validation over training and test images together; None = the
    # dataset's own split.
    folds: int | None = None

    # The part that is the test set, from 0.
    fold: int = 0


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The network."""

    # Architecture; parameter counts equal torchvision's.
    model: Model = "resnet50"

    # Compute dtype. Parameters and masks are float32 either way. bfloat16 is for
    # accelerators: on CPUs it is not faster.
    dtype: Literal["float32", "bfloat16"] = "float32"

    # Run folder, or one checkpoint in it, whose parameters and batch statistics the
    # network starts from; None = random.
    pretrained: str | None = None


@dataclasses.dataclass(frozen=True)
class SparsityOptions:
    """What is N:M sparse, and how."""

    # Function of nmjax.recipes, where each is explained. sr_ste: magnitude mask at
    # every step and the decay below (arXiv:2102.04010); ste: without the decay;
    # transposable: one mask along both axes; one_shot: the mask is chosen once and
    # dropped weights get no gradient; frozen: the same, and dropped weights get one.
    recipe: Recipe = "sr_ste"

    # N:M: n weights kept of every m consecutive ones along the contracted axis.
    pattern: str = "2:4"

    # λ of SR-STE, added to the gradient of each dropped weight as λ·weight, for recipes
    # that have one; None = the recipe's own.
    decay: float | None = None

    # Other arguments of the recipe, NAME=VALUE, such as refresh=40.
    recipe_options: tuple[str, ...] = ()

    # Regular expressions of layer paths that stay dense; each must match a whole path.
    # `--dense` alone = none.
    dense: tuple[str, ...] = ("(.*/)?head",)

    # A layer that cannot be sparse, such as a stem with 3 input channels: leave it
    # dense and say so, or stop.
    ineligible: Literal["dense", "error"] = "dense"

    # Epochs at the start in which all layers are dense.
    dense_epochs: int = 0

    # Epochs at the end in which the mask no longer changes.
    freeze_epochs: int = 0


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """How it is trained. The defaults are SR-STE's published ImageNet recipe."""

    # Passes over the training set.
    epochs: int = 120

    # Images per optimizer step, over all devices and micro-batches.
    batch_size: int = 256

    # Micro-batches that one optimizer step is computed in; fewer images in memory.
    gradient_accumulation: int = 1

    # Optimizer. step_adam: adamw whose second moment stays as it is after the dense
    # start (STEP, arXiv:2302.01172).
    opt: Literal["sgd", "adamw", "step_adam"] = "sgd"

    # Peak learning rate. It is not scaled with the batch size.
    lr: float = 0.1

    # Momentum of sgd.
    momentum: float = 0.9

    # Nesterov momentum, for sgd.
    nesterov: bool = False

    # Weight decay on all parameters, the dropped weights included.
    weight_decay: float = 5e-5

    # cosine: to 0 over all steps; step: times --lr-gamma at each of --lr-steps.
    lr_scheduler: Literal["cosine", "step"] = "cosine"

    # Epochs at which the learning rate falls, for --lr-scheduler step.
    lr_steps: tuple[int, ...] = (30, 60, 80)

    # Factor by which it falls, for --lr-scheduler step.
    lr_gamma: float = 0.1

    # Epochs of linear warm-up from 0.
    lr_warmup_epochs: float = 5

    # Share of the target that is spread over all classes.
    label_smoothing: float = 0.0

    # Largest global norm of the gradient, after the decay is added; None = no limit.
    clip_grad_norm: float | None = None


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Where things go."""

    # Run folder; None = runs/PRESET, or runs/DATASET-MODEL-RECIPE. A run that it
    # already holds is continued from its last checkpoint.
    output_dir: str | None = None

    # Run folder to continue, or with --test-only to evaluate; its options are the
    # defaults of this command.
    resume: str | None = None

    # Evaluate the run of --resume on the test set and stop.
    test_only: bool = False

    # Seed of the initial parameters and of the data order.
    seed: int = 0

    # Optimizer steps between checkpoints; None = one epoch.
    checkpoint_every: int | None = None

    # Optimizer steps between rows of metrics.csv and points of the plots.
    print_freq: int = 50


@dataclasses.dataclass(frozen=True)
class Options:
    """All options, in the groups of `--help`."""

    sparsity: SparsityOptions = SparsityOptions()
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    optim: OptimOptions = OptimOptions()
    run: RunOptions = RunOptions()

    def flat(self) -> dict[str, Any]:
        """Every option by its name on the command line, with underscores."""
        groups = dataclasses.asdict(self).values()
        return {name: value for group in groups for name, value in group.items()}

    def replace(self, **changes: Any) -> "Options":
        """The options with some replaced, named as in `flat`.

        Raises:
          ValueError: No option has that name.
        """
        unknown = set(changes) - set(self.flat())
        if unknown:
            raise ValueError(f"no options named {sorted(unknown)}")
        groups = {}
        for field in dataclasses.fields(self):
            group = getattr(self, field.name)
            names = {f.name for f in dataclasses.fields(group)} & set(changes)
            groups[field.name] = dataclasses.replace(
                group, **{name: changes[name] for name in names}
            )
        return Options(**groups)

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> "Options":
        """Reads what `flat` gave, also after a trip through JSON.

        Raises:
          ValueError: An option is unknown: written by another version.
        """
        return cls().replace(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )


@dataclasses.dataclass(frozen=True)
class Preset:
    """Options under a name.

    Attributes:
      options: The options.
      about: What it is, on which device, what to expect, and who measured that.
    """

    options: Options
    about: str


_IMAGENET = Options().replace(dtype="bfloat16")
_NOT_RUN = "Not run by us. Meant for GPUs; on a CPU it would take months."
_DIGITS = Options().replace(
    dataset="digits",
    model="resnet8",
    epochs=15,
    batch_size=64,
    lr=0.1,
    lr_warmup_epochs=1,
    weight_decay=1e-4,
    print_freq=11,
)

PRESETS = {
    "digits-resnet8-2to4": Preset(
        _DIGITS,
        "ResNet-8 (78 thousand parameters) on the bundled 8x8 handwritten digits. "
        "Two CPU cores: under a minute. Top-1 about 99.3 (measured by us).",
    ),
    "digits-resnet8-dense": Preset(
        _DIGITS.replace(recipe="dense"),
        "The dense twin of digits-resnet8-2to4. Top-1 about 99.4 (measured by us).",
    ),
    "fashion-resnet8-2to4": Preset(
        # Of batches of 128, 64 and 32, 32 trained the best dense network on held-out
        # images (89.9, 90.9, 91.4 after 6 epochs of 20,000; 16: 91.5), and fastest.
        _DIGITS.replace(dataset="fashion_mnist", batch_size=32, epochs=10),
        "ResNet-8 on Fashion-MNIST, after `python -m experiments.prepare "
        "fashion_mnist`. One CPU core: about 1.2 minutes an epoch at the 860 images "
        "a second that we measured. Top-1: not run to the end by us.",
    ),
    "resnet18-2to4": Preset(
        _IMAGENET.replace(model="resnet18"),
        "ResNet-18 on ImageNet with SR-STE's recipe. Published top-1 71.2 "
        "(NM-sparsity's README); an outsider reports 70.5 (its issue 4). There, the "
        "stem is sparse too; here, its 3 channels keep it dense. " + _NOT_RUN,
    ),
    "resnet50-2to4": Preset(
        _IMAGENET,
        "ResNet-50 on ImageNet with SR-STE's recipe (arXiv:2102.04010): SGD 0.9, lr "
        "0.1 at batch 256, cosine, 5 epochs of warm-up, weight decay 5e-5, 120 epochs, "
        "decay 2e-4. Published top-1 77.0 (NM-sparsity's README); an outsider reports "
        "75.8 (its issue 4). There, the stem is sparse too; here, its 3 channels keep "
        "it dense. " + _NOT_RUN,
    ),
    "resnet50-4to8": Preset(
        _IMAGENET.replace(pattern="4:8"),
        "As resnet50-2to4 with 4:8. Published top-1 77.4 (NM-sparsity's README). "
        + _NOT_RUN,
    ),
    "resnet50-1to4": Preset(
        _IMAGENET.replace(pattern="1:4"),
        "As resnet50-2to4 with 1:4. Published top-1 75.9 (NM-sparsity's README). "
        + _NOT_RUN,
    ),
    "resnet50-dense": Preset(
        _IMAGENET.replace(recipe="dense"),
        "The dense twin of resnet50-2to4. Outsiders report top-1 77.3 to 77.7 for "
        "NM-sparsity's dense configuration (its issue 7). " + _NOT_RUN,
    ),
}


def refuse(options: Options, given: set[str]) -> None:
    """Refuses options that cannot be meant together, before anything is loaded.

    The limits of single values are those of `TrainConfig` and `nmjax.recipes`.

    Args:
      options: What the command line says.
      given: Names of the options that the user wrote, as in `Options.flat`.

    Raises:
      ValueError: An option has no effect beside the others, or lacks another; the
        message names both and the way out.
    """
    _refuse_idle(options, given)
    if options.run.test_only and options.run.resume is None:
        raise ValueError("--test-only needs --resume RUN: the run folder to evaluate")
    sparsity = options.sparsity
    if sparsity.recipe == "one_shot" and not (
        options.model.pretrained or sparsity.dense_epochs
    ):
        raise ValueError(
            "--recipe one_shot would prune random weights: give --pretrained RUN, or "
            "train dense first with --dense-epochs K"
        )


def _refuse_idle(options: Options, given: set[str]) -> None:
    """Refuses written options without effect; a preset's own may idle."""
    s, o, run = options.sparsity, options.optim, options.run
    idle: dict[str, str] = {}
    if run.test_only:
        heard = {
            "test_only",
            "resume",
            "data_path",
            "image_size",
            "batch_size",
            "dtype",
        }
        idle |= {name: "--test-only" for name in options.flat() if name not in heard}
    if s.recipe == "dense":
        sparsity = {field.name for field in dataclasses.fields(s)} - {"recipe"}
        idle |= {name: "--recipe dense" for name in sparsity}
    if s.recipe in ("one_shot", "frozen"):
        idle |= {"freeze_epochs": f"--recipe {s.recipe}: its mask never changes"}
    if options.data.train_size is None:
        idle |= {"validate": "all training images: give --train-size too"}
    if options.data.folds is None:
        idle |= {"fold": "the dataset's own split: give --folds too"}
    if o.opt != "sgd":
        idle |= {name: f"--opt {o.opt}" for name in ("momentum", "nesterov")}
    if o.lr_scheduler != "step":
        idle |= {
            name: f"--lr-scheduler {o.lr_scheduler}"
            for name in ("lr_steps", "lr_gamma")
        }
    if run.resume is not None:
        idle |= {"output_dir": "--resume, which goes on in the folder that it names"}
    for name in sorted(given & set(idle)):
        raise ValueError(f"{flag(name)} has no effect with {idle[name]}: leave it out")


def read_options(folder: Path) -> Options | None:
    """The options that a run folder was trained with; None if it says nothing.

    Raises:
      ValueError: The file is damaged.
    """
    path = folder / "options.json"
    if not path.is_file():
        return None
    try:
        return Options.from_flat(json.loads(path.read_text()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def flag(name: str) -> str:
    """The spelling of an option on the command line."""
    return "--" + name.replace("_", "-")
