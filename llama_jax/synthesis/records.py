"""The lines that training reads: conversations with their best answer, and preferences.

The forms are those of `data.conversations` and `data.preferences`. Each line carries under
`provenance` how it came about; training leaves that alone.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.config.data import Strength

# How much better a response is by the chance that the reward gives it, sigmoid of the difference
# (Bradley-Terry). Our own cuts: Llama 3 asked people.
_STRENGTHS: tuple[tuple[float, Strength], ...] = (
    (0.95, "significantly"),
    (0.8, "better"),
    (0.65, "slightly"),
)


@dataclasses.dataclass(frozen=True)
class Ranked:
    """One response of a preference record: its message, and which model made it."""

    message: Mapping[str, Any]
    model: str


def conversation_record(
    asked: Mapping[str, Any], message: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """What was asked and its answer, as SFT reads it.

    Args:
      asked: a samples' record, of which `messages` and `tools` are taken.
      message: the assistant's.
      provenance: where it comes from.
    """
    record: dict[str, Any] = {"messages": [*asked["messages"], dict(message)]}
    if asked.get("tools"):
        record["tools"] = list(asked["tools"])
    return {**record, "provenance": dict(provenance)}


def preference_record(
    asked: Mapping[str, Any],
    chosen: Ranked,
    rejected: Ranked,
    strength: Strength,
    provenance: Mapping[str, Any],
    *,
    edited: Ranked | None = None,
) -> dict[str, Any]:
    """A pair, or with an edit three responses: edited over chosen over rejected."""
    record: dict[str, Any] = {
        "prompt": list(asked["messages"]),
        "responses": [_response(chosen), _response(rejected)],
        "ranking": [0, 1],
        "strength": strength,
    }
    if edited is not None:
        record["edited"] = _response(edited)
    if asked.get("tools"):
        record["tools"] = list(asked["tools"])
    return {**record, "provenance": dict(provenance)}


def strength_of(difference: float) -> Strength:
    """By the difference of two rewards, at least 0."""
    chance = 1 / (1 + math.exp(-min(difference, 700.0)))
    for least, name in _STRENGTHS:
        if chance >= least:
            return name
    return "marginally"


def same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two messages say the same, but for space around it."""
    return _said(one) == _said(other)


def says_nothing(message: Mapping[str, Any]) -> bool:
    """Neither text nor a call."""
    return not message["content"].strip() and not message.get("tool_calls")


def _said(message: Mapping[str, Any]) -> Sequence[Any]:
    return [message["content"].strip(), message.get("tool_calls")]


def _response(ranked: Ranked) -> dict[str, Any]:
    said = {key: value for key, value in ranked.message.items() if key != "role"}
    return {**said, "model": ranked.model}
