"""The tables that only post-training stages have. What each builds is its package's business."""

import dataclasses
import itertools
import math
from typing import Annotated, Literal, get_args

from llama_jax.config.loading import ConfigError, NotNegative, Positive, Range, check_ranges

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """The weights that a run starts from: any checkpoint that `convert` reads.

    `run:NAME` is the model of the run NAME in `runs/`, which `train` makes first if need be.
    """

    path: str
    # An adapter to go on with in place of a fresh one: a PEFT folder, or a run that trained one;
    # rank, alpha, targets and kind must be those of the run's `adapter`.
    adapter: str | None = None
    # Rows of embedding and head that were never trained, those of special tokens most often, are
    # told; `mean` starts them at the mean of the others.
    special_rows: Literal["keep", "mean"] = "keep"
    # Which of the checkpoint's layers, from 0, are the model's, in order; None takes all. A model
    # of fewer layers so begins as Llama 3.2's small ones did, before they were distilled.
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        layers = self.layers
        if layers is None:
            return
        if not layers or layers[0] < 0 or any(a >= b for a, b in itertools.pairwise(layers)):
            raise ConfigError("numbers of layers from 0, each larger than the last", key="layers")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters beside frozen matrices: LoRA (arXiv 2106.09685) or DoRA (2402.09353).

    A projection `x W` becomes `x W + scale (x A) B`. Defaults are QLoRA's (arXiv 2305.14314,
    appendix B): every projection of every layer, rank 64, alpha 16.
    """

    rank: Annotated[int, Positive] = 64
    alpha: Annotated[float, Positive] = 16.0
    targets: tuple[Projection, ...] = PROJECTIONS
    # What the product is multiplied by: alpha / rank, or alpha / sqrt(rank), whose size doesn't
    # fall with the rank (rsLoRA, arXiv 2312.03732).
    scaling: Literal["lora", "rslora"] = "lora"
    # Learn each output's magnitude apart from its direction.
    dora: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.targets:
            raise ConfigError("at least one projection is needed", key="targets")
        twice = sorted({name for name in self.targets if self.targets.count(name) > 1})
        if twice:
            raise ConfigError(f"'{twice[0]}' is named twice", key="targets")

    @property
    def scale(self) -> float:
        """What `(x A) B` is multiplied by."""
        return self.alpha / (self.rank if self.scaling == "lora" else math.sqrt(self.rank))


PreferenceLoss = Literal["sigmoid", "ipo", "hinge", "length_normalised", "simpo", "kto"]


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Learning from preferences without a reward model; see `llama_jax.losses.preference`.

    Defaults are Llama 3's DPO (arXiv 2407.21783, section 4.1.4). That it masks formatting tokens in
    both responses is the data's table (`mask_formatting`), as is which strengths it takes.
    """

    kind: Literal["dpo"] = "dpo"
    # sigmoid: DPO. ipo, hinge (SLiC) and length_normalised: the same pairs, other losses; ipo and
    # length_normalised of means a token. simpo: means a token, no reference. kto: single responses,
    # desirable or not, against the mean of mismatched ones in the (micro)batch.
    loss: PreferenceLoss = "sigmoid"
    beta: Annotated[float, Positive] = 0.1
    # Of the chosen response's mean negative log-likelihood a token, formatting included.
    nll_weight: Annotated[float, NotNegative] = 0.2
    # Conservative DPO: the share of pairs whose order is taken to be wrong.
    label_smoothing: Annotated[float, Range(at_least=0.0, at_most=0.5)] = 0.0
    # Log-probabilities under the model that the run starts from: computed once and stored, or by
    # that model, held beside the trained one (or under its adapters) in each step. None is cached.
    reference: Literal["cached", "live"] | None = None
    # What simpo asks of the scaled margin.
    gamma: Annotated[float, NotNegative] | None = None
    # Weights of kto's two kinds of response; None is 1.
    desirable_weight: Annotated[float, NotNegative] | None = None
    undesirable_weight: Annotated[float, NotNegative] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        meant_for: dict[str, tuple[PreferenceLoss, ...]] = {
            "label_smoothing": ("sigmoid", "length_normalised", "simpo"),
            "reference": ("sigmoid", "ipo", "hinge", "length_normalised", "kto"),
            "gamma": ("simpo",),
            "desirable_weight": ("kto",),
            "undesirable_weight": ("kto",),
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for key, losses in meant_for.items():
            if getattr(self, key) != defaults[key] and self.loss not in losses:
                raise ConfigError(
                    f"has no meaning for loss '{self.loss}', only for {', '.join(losses)}", key=key
                )
        if self.loss == "simpo" and self.gamma is None:
            raise ConfigError("missing key; loss 'simpo' has no usual value of it", key="gamma")

    @property
    def reference_source(self) -> Literal["cached", "live"] | None:
        """Where the reference's log-probabilities come from; None where none is needed."""
        return None if self.loss == "simpo" else self.reference or "cached"


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """A reward model learned from pairs (Bradley-Terry); see `llama_jax.losses.reward`.

    Defaults are Llama 3's (arXiv 2407.21783, section 4.1.2): no margins.
    """

    kind: Literal["reward"] = "reward"
    # What the better response must lead by, by strength; small and large are Llama 2's
    # (arXiv 2307.09288, table 27).
    margins: Literal["none", "small", "large"] = "none"
    # Of the squared mean reward of a pair, against drift (section 7.5.4 of Llama 3's paper).
    mean_reward_penalty: Annotated[float, NotNegative] = 0.0
    # Bins of equal width of the calibration error that is reported.
    calibration_bins: Annotated[int, Positive] = 10

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """A student drawn to a teacher's distribution of each token; see `llama_jax.losses.divergence`.

    Llama 3's paper has none; Llama 3.2's small models took their teachers' logits as targets, which
    is the defaults' forward KL.
    """

    # The teacher: as `init.path`, of the student's tokenizer.
    path: str
    kind: Literal["distill"] = "distill"
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    # The teacher's share of jsd's mixture; None is a half.
    beta: Annotated[float, Range(above=0.0, at_most=1.0)] | None = None
    # Divides both models' logits; the loss is times its square.
    temperature: Annotated[float, Positive] = 1.0
    # A model held beside the student, or its most likely tokens, stored with the data.
    teacher: Literal["live", "stored"] = "live"
    # Tokens that are stored of each distribution; None is 64.
    top_k: Annotated[int, Positive] | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.top_k is not None and self.teacher == "live":
            raise ConfigError("has no meaning for a live teacher", key="top_k")
        if self.beta is not None and self.divergence != "jsd":
            raise ConfigError(
                f"has no meaning for divergence '{self.divergence}', only for jsd", key="beta"
            )
        if self.beta == 1.0:
            raise ConfigError("must be below 1; the limit is divergence 'reverse_kl'", key="beta")

    @property
    def stored_tokens(self) -> int:
        """C; 0 with a live teacher."""
        return 0 if self.teacher == "live" else self.top_k or 64
