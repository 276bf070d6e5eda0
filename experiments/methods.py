"""The methods that `python -m experiments.imagenet compare` compares, and its options.

`METHODS` is the one table of them: plain data, one entry each. Nothing here imports
jax, so that help and most refusals come at once.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from experiments.presets import PRESETS, Options, Recipe


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to come to a network.

    Attributes:
      label: Its name in tables; the pattern follows.
      recipe: Function of `nmjax.recipes`.
      arguments: Its arguments besides the pattern, as text: what `--decay` and
        `--recipe-options` take.
      patterns: The only patterns that it is defined for; None = any; () = it has none.
      start: The method whose trained network it begins with; None = a random one.
      trains: Whether it is trained; if not, it is what the recipe makes of `start`.
      prune: Function of `nmjax.pruning` that prunes `start`, with training images to
        calibrate it; None = by magnitude.
      dense_share: Share of the epochs, from the first on, in which it trains dense.
      reestimate: Whether batch norm sees training images again before the test.
      options: Options of its training that differ from those of the comparison.
    """

    label: str
    recipe: Recipe
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    patterns: tuple[str, ...] | None = None
    start: str | None = None
    trains: bool = True
    prune: str | None = None
    dense_share: float = 0.0
    reestimate: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


DENSE = "dense"


def _after_training(
    label: str, prune: str | None = None, *, reestimate: bool = True
) -> Method:
    """A method that prunes the dense network and does not train it again."""
    return Method(
        label,
        "one_shot",
        start=DENSE,
        trains=False,
        prune=prune,
        reestimate=reestimate,
    )


# λ of the paper, for 600,000 steps: what `--decay` replaces.
_DECAY = 2e-4

# For methods that belong to Adam, at the better of two rates on training images that
# were held out.
_ADAM = {"opt": "adamw", "lr": 3e-3}

METHODS: dict[str, Method] = {
    DENSE: Method("dense", "dense", patterns=()),
    # With the paper's λ dropped weights decay with a time constant of
    # (1 − momentum) / (lr · λ) = 5,000 steps, 0.8 % of its run. In a run of 1,000
    # steps they hardly do. λ = 0.02, a time constant of 50 steps, did best of 0, 0.02,
    # 0.1 and 0.5 on held-out training images, though by less than seeds differ.
    "sr_ste": Method("SR-STE", "sr_ste", {"decay": _DECAY}),
    "sr_ste_scaled": Method("SR-STE, λ = 0.02", "sr_ste", {"decay": 0.02}),
    "sr_ste_dense_start": Method(
        "SR-STE, first third dense", "sr_ste", {"decay": _DECAY}, dense_share=1 / 3
    ),
    "ste": Method("STE", "ste"),
    "transposable": Method("transposable", "transposable"),
    # The paper's 40 steps between two choices of the mask belong to longer runs.
    "transposable_dense_start": Method(
        "transposable, first third dense, mask every step",
        "transposable",
        {"refresh": 1},
        dense_share=1 / 3,
    ),
    "bi_mask": Method("Bi-Mask", "bi_mask"),
    "fst": Method("FST", "fst"),
    "semi_sparse_weight": Method(
        "semi-sparse weight", "semi_sparse_weight", patterns=("2:4",)
    ),
    "semi_sparse_activation": Method(
        "semi-sparse activation", "semi_sparse_activation", patterns=("2:4",)
    ),
    "s_ste": Method("S-STE", "s_ste"),
    "two_by_four": Method(
        "2by4, last sixth dense", "two_by_four", {"decay": 6e-5}, ("2:4",)
    ),
    "learned": Method(
        "learned masks, weights of the dense network",
        "learned",
        start=DENSE,
        options={"opt": "adamw", "lr": 0.3},  # logits must move far: 0.1 is too little
    ),
    "dense_adam": Method("dense, AdamW", "dense", patterns=(), options=_ADAM),
    "step": Method("STEP", "step", options={**_ADAM, "opt": "step_adam"}),
    "one_shot": _after_training("one-shot, batch norm re-estimated"),
    "one_shot_as_is": _after_training("one-shot, as it is", reestimate=False),
    "ada_prune": _after_training("AdaPrune", "ada_prune"),
    "sparse_gpt": _after_training("SparseGPT", "sparse_gpt"),
    "asp": Method("one-shot, trained as long again (ASP)", "one_shot", start=DENSE),
    "dense_longer": Method(
        "dense, trained as long again", "dense", patterns=(), start=DENSE
    ),
}

# Differences that a comparison reports besides those to dense.
PAIRS = (
    ("sr_ste", "ste"),
    ("sr_ste_scaled", "ste"),
    ("asp", "dense_longer"),
    ("sr_ste", "asp"),
    ("step", "dense_adam"),
)

# What is compared when no recipes are named.
DEFAULT = "dense,sr_ste,one_shot,one_shot_as_is"


@dataclasses.dataclass(frozen=True)
class CompareOptions:
    """Options of the comparison, which is what runs without arguments."""

    # Methods, joined by commas, or all. dense, to which all are compared, is always
    # among them, and so is what one of them begins with.
    recipes: str = DEFAULT

    # N:M patterns, joined by commas. Methods that are defined for some patterns alone
    # appear with those.
    patterns: str = "2:4"

    # digits is in this repository; `python -m experiments.prepare fashion_mnist` makes
    # the other.
    dataset: Literal["digits", "fashion_mnist"] = "digits"

    # Folder that holds the dataset; None = where `experiments.prepare` puts it.
    data_path: str | None = None

    # Parts of a cross-validation over training and test images together; None = the
    # dataset's own split.
    folds: int | None = None

    # Networks of each method on each fold, from 2 on.
    seeds: int = 3

    # Passes over the training images; None = 15 for digits, 6 for fashion_mnist.
    epochs: int | None = None

    # Training images, a fixed part of them all; None = 20,000 of fashion_mnist and all
    # of digits.
    train_size: int | None = None

    # Test on training images that are left out, not on the test set: for the choice of
    # hyperparameters.
    validate: bool = False

    # λ of SR-STE in place of the paper's 2e-4. Methods with a λ of their own keep it.
    decay: float | None = None

    # Folder of the comparison: a run folder for each network, the table and the plots;
    # None = runs/DATASET. What it already holds is not trained again.
    output_dir: str | None = None


# The training of each dataset's networks, but for the method.
TRAINING: dict[str, Options] = {
    "digits": PRESETS["digits-resnet8-2to4"].options.replace(
        checkpoint_every=110,  # a run takes seconds: less often than each epoch
    ),
    "fashion_mnist": PRESETS["fashion-resnet8-2to4"].options.replace(
        epochs=6, train_size=20_000
    ),
}


@dataclasses.dataclass(frozen=True, order=True)
class Arm:
    """A method with a pattern: a row of the table.

    Attributes:
      name: Of the method.
      pattern: N:M, or "" for methods without.
    """

    name: str
    pattern: str

    @property
    def method(self) -> Method:
        """Its entry in the table of methods."""
        return METHODS[self.name]

    @property
    def label(self) -> str:
        """Its name in tables, such as "one-shot 2:4, as it is"."""
        first, comma, rest = self.method.label.partition(",")
        return f"{first} {self.pattern}".rstrip() + comma + rest

    @property
    def folder(self) -> str:
        """The first part of its run folders' names."""
        return f"{self.name}-{self.pattern.replace(':', 'to')}".rstrip("-")

    @property
    def start(self) -> "Arm | None":
        """The arm whose trained network it begins with."""
        name = self.method.start
        return None if name is None else Arm(name, self.pattern_of(name))

    def pattern_of(self, name: str) -> str:
        """The pattern with which another method is to be set beside this."""
        return "" if METHODS[name].patterns == () else self.pattern


def arms(options: CompareOptions) -> list[Arm]:
    """What is compared, in the order of the table; what others begin with comes first.

    Raises:
      ValueError: A name is no method, or a method has none of the patterns.
    """
    names = list(METHODS) if options.recipes == "all" else options.recipes.split(",")
    patterns = options.patterns.split(",")
    if not all(patterns):
        raise ValueError(
            f"--patterns {options.patterns!r}: expected patterns such as 2:4,1:8"
        )
    found: dict[Arm, None] = {Arm(DENSE, ""): None}

    def add(arm: Arm) -> None:
        if arm.start:
            add(arm.start)
        found.setdefault(arm)

    for name in names:
        if name not in METHODS:
            raise ValueError(
                f"--recipes: no method {name!r}; there are {', '.join(METHODS)}, or all"
            )
        own = METHODS[name].patterns
        chosen = [p for p in patterns if own is None or p in own] if own != () else [""]
        if not chosen and options.recipes != "all":
            raise ValueError(
                f"--recipes {name} is for {', '.join(own or ())} alone, and --patterns "
                f"is {options.patterns}"
            )
        for pattern in chosen:
            add(Arm(name, pattern))
    takers = [name for name, m in METHODS.items() if m.arguments.get("decay") == _DECAY]
    if options.decay is not None and not {arm.name for arm in found} & set(takers):
        raise ValueError(
            f"--decay {options.decay} is for {', '.join(takers)}; --recipes names none "
            "of them"
        )
    return list(found)


def options_of(arm: Arm, options: CompareOptions, fold: int, seed: int) -> Options:
    """The options of one network's training.

    Args:
      arm: The method and its pattern.
      options: Those of the comparison.
      fold: The fold, 0 without folds.
      seed: Of the initial parameters and the data order.
    """
    method, base = arm.method, TRAINING[options.dataset]
    arguments = dict(method.arguments)
    decay = arguments.pop("decay", None)
    if options.decay is not None and decay == _DECAY:
        decay = options.decay
    changes: dict[str, Any] = {
        "recipe": method.recipe,
        "pattern": arm.pattern or base.sparsity.pattern,
        "decay": decay,
        "recipe_options": tuple(f"{name}={x}" for name, x in arguments.items()),
        "data_path": options.data_path,
        "folds": options.folds,
        "fold": fold,
        "validate": options.validate,
        "seed": seed,
        "output_dir": run_folder(arm, options, fold, seed),
    }
    if arm.start is not None:
        changes["pretrained"] = run_folder(arm.start, options, fold, seed)
    if options.epochs is not None:
        warmup = min(base.optim.lr_warmup_epochs, options.epochs / 2)
        changes |= {"epochs": options.epochs, "lr_warmup_epochs": warmup}
    if options.train_size is not None:
        changes["train_size"] = options.train_size
    if method.dense_share:
        epochs = options.epochs or base.optim.epochs
        changes["dense_epochs"] = max(1, round(method.dense_share * epochs))
    return base.replace(**{**changes, **method.options})


def output_dir(options: CompareOptions) -> str:
    """The folder of the comparison."""
    return options.output_dir or f"runs/{options.dataset}"


def run_folder(arm: Arm, options: CompareOptions, fold: int, seed: int) -> str:
    """The run folder of one network."""
    part = f"-fold{fold}" if options.folds else ""
    return f"{output_dir(options)}/{arm.folder}{part}-seed{seed}"
