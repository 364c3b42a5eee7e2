"""What to sample: one request's settings, checked. How it is done is `sampler.py`'s."""

import dataclasses
from typing import Annotated

from llama_jax.config.loading import ConfigError, NotNegative, Positive, Range, check_ranges


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when to stop.

    The order of what is done to the logits: repetition penalty, presence penalty, temperature,
    top-k, top-p, min-p. None, 1.0 and 0.0 switch a part off where that is its default.
    """

    max_new_tokens: Annotated[int, Positive]
    # 0 takes the likeliest token, the lowest id among equals; top_k, top_p, min_p then do nothing
    # and are refused.
    temperature: Annotated[float, NotNegative] = 1.0
    top_k: Annotated[int, Positive] | None = None
    top_p: Annotated[float, Range(above=0.0, at_most=1.0)] | None = None
    # Share of the likeliest token's probability that a token needs.
    min_p: Annotated[float, Range(at_least=0.0, at_most=1.0)] | None = None
    # Over prompt and completion: logits above 0 are divided by it, those below multiplied
    # (CTRL, arXiv 1909.05858, as transformers has it).
    repetition_penalty: Annotated[float, Positive] = 1.0
    # Taken off the logit of each token that the completion has already (OpenAI's).
    presence_penalty: Annotated[float, Range(at_least=-2.0, at_most=2.0)] = 0.0
    seed: Annotated[int, Range(at_least=0, at_most=2**32 - 1)] = 0
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    # Of each token: its log-probability in the model's own distribution, before penalties and
    # temperature.
    logprobs: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        object.__setattr__(self, "stop_ids", frozenset(self.stop_ids))
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        if "" in self.stop_strings:
            raise ConfigError("an empty string would stop at once", key="stop_strings")
        if self.temperature == 0.0:
            for name in ("top_k", "top_p", "min_p"):
                if getattr(self, name) is not None:
                    raise ConfigError("has no effect at temperature 0, which is greedy", key=name)
