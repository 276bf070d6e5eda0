"""The published methods, each a value of `nmjax.Recipe`.

Each function gives the equation, the source and its defaults; together they are the
only place that knows methods by name. What the words of a recipe mean is said in
`nmjax.recipe`.
"""

from nmjax.masks.learned import Temperature
from nmjax.pattern import NMPattern
from nmjax.recipe import DecayIn, Recipe, transposes
from nmjax.schedule import Schedule

Pattern = str | NMPattern
_ALWAYS = Schedule()
_LAST_SIXTH_DENSE = Schedule(dense_from=5 / 6)
_CONSTANT = Temperature()


def dense() -> Recipe:
    """No sparsity: the plain layer."""
    return Recipe("dense")


def ste(
    pattern: Pattern,
    *,
    refresh: int = 1,
    multipliers: tuple[float, float] = (1.0, 1.0),
    schedule: Schedule = _ALWAYS,
) -> Recipe:
    """Magnitude masks with the straight-through gradient (arXiv:2102.04010).

        y = x · (E ⊙ W)        dW = a E ⊙ G + b (1 − E) ⊙ G,   G = xᵀ · dy

    Args:
      pattern: n kept of every m.
      refresh: Optimizer steps between two choices of the mask.
      multipliers: (a, b), of kept and dropped weights; (1, 1) is plain. xformers'
        `sparsify24_ste` has them in the other order, (bw_mul0, bw_mul1) = (b, a).
      schedule: When the recipe acts.
    """
    return Recipe(
        "ste",
        NMPattern(pattern),
        fprop="weight",
        mask="magnitude",
        refresh=refresh,
        multipliers=multipliers,
        schedule=schedule,
    )


def sr_ste(
    pattern: Pattern,
    *,
    decay: float = 2e-4,
    decay_in: DecayIn = "op",
    refresh: int = 1,
    schedule: Schedule = _ALWAYS,
) -> Recipe:
    """Straight-through gradient plus λ(1 − E)W (SR-STE, arXiv:2102.04010).

        y = x · (E ⊙ W)        dW = xᵀ · dy + λ (1 − E) ⊙ W

    Args:
      pattern: n kept of every m.
      decay: λ; the paper uses 2e-4 for ImageNet. With 0 this is `ste`.
      decay_in: "op" adds the term once for each use of the weight, as the paper
        does; "optimizer" leaves the layer plain STE, and `nmjax.add_decay(plan)`
        adds the same term once for each optimizer step, whatever the number of
        devices and micro-batches and whatever the loss scale.
      refresh: Optimizer steps between two choices of the mask; above 1 the masks
        live in the state, and the training loop calls `nmjax.refresh`.
      schedule: When the recipe acts.
    """
    return Recipe(
        "sr_ste",
        NMPattern(pattern),
        fprop="weight",
        mask="magnitude",
        refresh=refresh,
        decay=decay,
        decay_in=decay_in,
        schedule=schedule,
    )


def transposable(
    pattern: Pattern,
    *,
    decay: float = 0.0,
    decay_in: DecayIn = "op",
    refresh: int = 40,
    schedule: Schedule = _ALWAYS,
) -> Recipe:
    """One mask that is N:M along both axes of W (arXiv:2102.08124).

        y = x · (E ⊙ W)        dx = dy · (E ⊙ W)ᵀ        E = argmax Σ E ⊙ |W|

    over all masks that keep n of every m in each row and column of each m × m tile,
    so that fprop and dgrad both have an N:M operand.

    Args:
      pattern: n kept of every m, along both axes.
      decay: λ as in `sr_ste`; the paper has none (straight-through).
      decay_in: As in `sr_ste`.
      refresh: Optimizer steps between two choices of the mask; the paper's 40.
      schedule: When the recipe acts.
    """
    return Recipe(
        "transposable",
        NMPattern(pattern),
        fprop="weight",
        dgrad="weight",
        mask="transposable",
        refresh=refresh,
        decay=decay,
        decay_in=decay_in,
        schedule=schedule,
    )


def bi_mask(
    pattern: Pattern,
    *,
    decay: float = 2e-4,
    decay_in: DecayIn = "op",
    refresh: int = 1,
    reorder: int | None = 100,
    schedule: Schedule = _ALWAYS,
) -> Recipe:
    """A second mask for dgrad (Bi-Mask, arXiv:2302.06058).

        y = x · (E ⊙ W)      dx = dy · (E' ⊙ E ⊙ W)ᵀ      dW = xᵀ · dy + λ (1 − E) ⊙ W

    E keeps the n largest magnitudes of every m of W along the input axis, E' those of
    E ⊙ W along the output axis. dgrad sums over the outputs, so that their groups may
    be formed in any order: the one in which E' drops least, of the order in force and
    100 random ones.

    Args:
      pattern: n kept of every m.
      decay: λ as in `sr_ste`, which is part of the authors' code.
      decay_in: As in `sr_ste`.
      refresh: Optimizer steps between two choices of the masks.
      reorder: Optimizer steps between two searches for the order, a multiple of
        `refresh`; the order lives in the state, and the training loop calls
        `nmjax.refresh`. None = groups of outputs as they are stored, no state.
      schedule: When the recipe acts.
    """
    return Recipe(
        "bi_mask",
        NMPattern(pattern),
        fprop="weight",
        dgrad="weight-masked-twice",
        mask="magnitude",
        refresh=refresh,
        reorder=reorder,
        decay=decay,
        decay_in=decay_in,
        schedule=schedule,
    )


def fst(
    pattern: Pattern = "2:4", *, refresh: int = 1, schedule: Schedule = _ALWAYS
) -> Recipe:
    """All three GEMMs with an N:M operand (FST, AAAI 2022).

        y = x · (E ⊙ W)        dx = dy · (E' ⊙ W)ᵀ        dW = Σ_k x_kᵀ · Σ_{t → k} dy_t

    E' keeps the largest magnitudes of W along the output axis, chosen apart from E.
    In wgrad n of every m tokens are kept at fixed
    places, and the dy of a token t that is left out joins that of the kept one k
    before it, to which spatial neighbours are similar (information restoration). Where
    the x of such tokens are equal dW is exact. This GEMM contracts half the tokens for
    2:4, without a sparse tensor core. The authors' code is not public: the
    restoration follows their description.

    Args:
      pattern: n kept of every m; the paper's is 2:4.
      refresh: Optimizer steps between two choices of the masks.
      schedule: When the recipe acts.
    """
    return Recipe(
        "fst",
        NMPattern(pattern),
        fprop="weight",
        dgrad="weight-own-mask",
        wgrad="activation-fixed",
        mask="magnitude",
        refresh=refresh,
        schedule=schedule,
    )


def semi_sparse_weight(
    *,
    algorithm: str = "largest_abs_values_greedy",
    multipliers: tuple[float, float] = (1.0, 1.0),
    refresh: int = 1,
    schedule: Schedule = _ALWAYS,
) -> Recipe:
    """2:4 weights by 4×4 tiles, as torchao's SemiSparseLinear.

        y = x · (E ⊙ W)        dx = dy · (E ⊙ W)ᵀ        dW = xᵀ · dy

    E keeps at most 2 of 4 along both axes of each tile of W, greedily from the
    heaviest weight on.

    Args:
      algorithm: Of `nmjax.masks.tile_mask`, applied to W as torchao has it, (out, in).
        torchao's own default, "largest_values_greedy", ranks by signed value, which
        keeps 54 % of the magnitude of normal weights, against 69 %. Those of one
        dimension leave dgrad without an N:M operand.
      multipliers: As in `ste`; (1, 0) lets the gradient reach kept weights only.
      refresh: Optimizer steps between two choices of the mask.
      schedule: When the recipe acts; torchao's recipe is dense from 0.7 on:
        `Schedule(dense_from=0.7)`.
    """
    return Recipe(
        "semi_sparse_weight",
        NMPattern(2, 4),
        fprop="weight",
        dgrad="weight" if transposes(algorithm) else None,
        mask="tile",
        tile=algorithm,
        refresh=refresh,
        multipliers=multipliers,
        schedule=schedule,
    )


def semi_sparse_activation(
    *,
    algorithm: str = "largest_values_greedy",
    schedule: Schedule = _ALWAYS,
) -> Recipe:
    """2:4 activations by 4×4 tiles, as torchao's SemiSparseActivationLinear.

        y = (E ⊙ x) · W        dx = dy · Wᵀ        dW = (E ⊙ x)ᵀ · dy

    E keeps at most 2 of 4 along both axes of each tile of the (tokens, features)
    matrix x; the gradient passes straight through it. W is dense. Made for inputs
    that are sparse by themselves, such as those after a squared ReLU
    (arXiv:2503.16672). Where the number of tokens is not a multiple of 4 the last tile
    is filled with zeros.

    Args:
      algorithm: Of `nmjax.masks.tile_mask`; torchao's default ranks by signed value.
        "largest_abs_values_exact" keeps most, and x is masked and compressed for both
        GEMMs in one pass where they run on a sparse tensor core.
      schedule: When the recipe acts.
    """
    return Recipe(
        "semi_sparse_activation",
        NMPattern(2, 4),
        fprop="activation",
        wgrad="activation" if transposes(algorithm) else None,
        tile=algorithm,
        schedule=schedule,
    )


def two_by_four(
    *,
    decay: float = 6e-5,
    refresh: int = 40,
    schedule: Schedule = _LAST_SIXTH_DENSE,
) -> Recipe:
    """2:4 in all three GEMMs for Transformers (arXiv:2404.01847).

        y = x · (E ⊙ W)        dx = dy · (E ⊙ W)ᵀ        dW = xᵀ · MVUE(dy)

    E is transposable; MVUE keeps 2 of every 4 tokens of dy, unbiased and with the
    least variance, which needs a key (`rngs={"nm": key}`; for nnx
    `nmjax.nnx.set_key`). Masked decay α(1 − E)W is added to the gradient before Adam,
    by `nmjax.add_decay(plan)`: `nmjax.choose_decay` picks α from flip rates in warm-up.

    Args:
      decay: α; the authors use 6e-5 and 2e-4 for GPT-2, 1e-3 for DeiT-base.
      refresh: Optimizer steps between two choices of the mask; theirs is 40.
      schedule: When the recipe acts; theirs trains the last sixth dense.
    """
    return Recipe(
        "two_by_four",
        NMPattern(2, 4),
        fprop="weight",
        dgrad="weight",
        wgrad="gradient",
        mask="transposable",
        refresh=refresh,
        decay=decay,
        decay_in="optimizer",
        schedule=schedule,
    )


def s_ste(pattern: Pattern = "2:4", *, schedule: Schedule = _ALWAYS) -> Recipe:
    """Continuous pruning by a soft threshold (S-STE, arXiv:2409.09099).

        y = x · β S(W)        S(a) = sign(a) · max(|a| − t, 0)        dW = xᵀ · dy

    t is the (m − n)-th smallest magnitude of a group, so that S is continuous where
    the order of two weights changes. β = ⟨W, S(W)⟩ / ‖S(W)‖² brings S(W) closest to W;
    `nmjax.init_state` computes it once for each weight and it stays. The gradient
    passes as through the identity.

    Args:
      pattern: n kept of every m.
      schedule: When the recipe acts.
    """
    return Recipe(
        "s_ste",
        NMPattern(pattern),
        fprop="weight",
        mask="soft-threshold",
        schedule=schedule,
    )


def step(
    pattern: Pattern,
    *,
    decay: float = 0.0,
    dense_until: float = 0.1,
) -> Recipe:
    """The sparse half of STEP (arXiv:2302.01172): dense, then straight-through.

        y = x · (E ⊙ W)        dW = xᵀ · dy + λ (1 − E) ⊙ W

    STEP trains dense until Adam's second moment is reliable, then keeps that moment
    as a fixed preconditioner and trains with masks. The optimizer is
    `nmjax.two_phase_adam`, which finds the moment of the change by itself or takes it
    as a number; this recipe is dense before `dense_until`. Give both the same one;
    `nmjax.training` does, with `TrainConfig(optimizer="step_adam")`.

    Args:
      pattern: n kept of every m.
      decay: λ as in `sr_ste`, added by `nmjax.add_decay`; 0 = straight-through.
      dense_until: The share of the run that is dense; the paper searches between 0.1
        and 0.5.
    """
    return Recipe(
        "step",
        NMPattern(pattern),
        fprop="weight",
        mask="magnitude",
        decay=decay,
        decay_in="optimizer" if decay else "op",
        schedule=Schedule(dense_until=dense_until),
    )


def learned(
    pattern: Pattern = "2:4",
    *,
    temperature: Temperature = _CONSTANT,
    train_weights: bool = False,
    schedule: Schedule = _ALWAYS,
) -> Recipe:
    """Masks learned by Gumbel-softmax, weights as they are (arXiv:2411.00288).

        E = P[argmax(ℓ + g)]        ∂E/∂ℓ as of P · softmax((ℓ + g) / τ)

    Each group has a logit ℓ for each of its C(m, n) patterns P and Gumbel noise g.
    The logits, from `nmjax.init_logits`, are what trains: collection "nm_logits" in
    linen, `nmjax.nnx.NMLogits` (an `nnx.Param`) in nnx. Training needs a key; without
    one, as in evaluation, g is 0.

    Args:
      pattern: n kept of every m.
      temperature: τ by step, set by `nmjax.refresh`; the paper's is 1.
      train_weights: Whether kept weights receive their gradient. False: weights
        receive exactly zero (an optimizer may still move them by weight decay).
      schedule: When the recipe acts.
    """
    return Recipe(
        "learned",
        NMPattern(pattern),
        fprop="weight",
        mask="learned",
        gradient="masked" if train_weights else "none",
        temperature=temperature,
        schedule=schedule,
    )


def one_shot(pattern: Pattern, *, schedule: Schedule = _ALWAYS) -> Recipe:
    """Prunes once by magnitude; dropped weights stay zero in the forward pass.

        y = x · (E ⊙ W)        dW = E ⊙ (xᵀ · dy)

    The mask is chosen from the parameters given to `nmjax.init_state` and kept;
    the gradient reaches kept weights only, as in NVIDIA's ASP.

    Args:
      pattern: n kept of every m.
      schedule: When the recipe acts.
    """
    return Recipe(
        "one_shot",
        NMPattern(pattern),
        fprop="weight",
        mask="magnitude",
        refresh=None,
        gradient="masked",
        schedule=schedule,
    )


def frozen(pattern: Pattern, *, decay: float = 0.0, decay_in: DecayIn = "op") -> Recipe:
    """A mask that `nmjax.init_state` chooses once, with SR-STE's gradient.

        y = x · (E ⊙ W)        dW = xᵀ · dy + λ (1 − E) ⊙ W

    The last phase of a training run: the mask no longer moves, dropped weights go on
    receiving the straight-through gradient, plus λ(1 − E)W where `decay` is set.

    Args:
      pattern: n kept of every m.
      decay: λ as in `sr_ste`.
      decay_in: As in `sr_ste`.
    """
    return Recipe(
        "frozen",
        NMPattern(pattern),
        fprop="weight",
        mask="magnitude",
        refresh=None,
        decay=decay,
        decay_in=decay_in,
    )


def as_recipe(recipe: "Recipe | Pattern | None") -> Recipe:
    """A recipe as users may write it: None = dense, "2:4" = SR-STE of that pattern."""
    match recipe:
        case None:
            return dense()
        case Recipe():
            return recipe
        case str() | NMPattern():
            return sr_ste(recipe)
    raise ValueError(
        f"expected a recipe, a pattern such as '2:4', or None, got {recipe!r}; "
        "recipes are made by nmjax.recipes, for example nmjax.recipes.sr_ste('2:4')"
    )
