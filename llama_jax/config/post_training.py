"""The tables that only post-training stages have. What each builds is its package's business."""

import dataclasses
import math
from typing import Annotated, Literal, get_args

from llama_jax.config.loading import ConfigError, Positive, check_ranges

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)


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
