"""Whether an answer is right, and why: the verdict of a verifier, and verifiers of any function."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.synthesis.prompts import Prompt, SynthesisError


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one verifier on one response; the reason is one line, for passing ones too."""

    passed: bool
    reason: str

    def to_json(self) -> dict[str, Any]:
        """As records hold it."""
        return {"passed": self.passed, "reason": self.reason}


class Verifier(Protocol):
    """Holds a response against its prompt's reference."""

    @property
    def name(self) -> str:
        """By which records keep its verdicts."""
        ...

    def check(self, prompt: Prompt) -> None:
        """Raise `SynthesisError` where the prompt lacks what a verdict needs."""
        ...

    def __call__(self, prompt: Prompt, response: str) -> Verdict:
        """The verdict; a response at fault is no error."""
        ...


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Passes what a regular expression finds a match in (Python's `re`, `.` matches newlines).

    Patterns are trusted: one that backtracks without end isn't stopped.
    """

    pattern: str
    kind: Literal["pattern"] = "pattern"
    absent: bool = False  # pass what has no match instead
    name: str = "pattern"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(f"{self.pattern!r}: {error}", key="pattern") from None

    def check(self, prompt: Prompt) -> None:
        """Nothing of the prompt is read."""

    def __call__(self, prompt: Prompt, response: str) -> Verdict:
        """Whether there is a match, or none."""
        found = re.search(self.pattern, response, re.DOTALL)
        if found is None:
            return Verdict(self.absent, f"no match of {self.pattern!r}")
        shown = _shortened(found.group())
        return Verdict(not self.absent, f"{self.pattern!r} matches {shown!r}")


@dataclasses.dataclass(frozen=True)
class Function:
    """Any function of (prompt, response) as a verifier; one that gives a bool has no reason.

    Journals know it by its name: what was judged under that name isn't judged again.
    """

    # Its own repr has its address, which is another one in each process.
    function: Callable[[Prompt, str], "bool | Verdict"] = dataclasses.field(repr=False)
    name: str

    def check(self, prompt: Prompt) -> None:
        """What the function reads isn't known."""

    def __call__(self, prompt: Prompt, response: str) -> Verdict:
        """The function's."""
        result = self.function(prompt, response)
        if isinstance(result, Verdict):
            return result
        return Verdict(bool(result), f"{self.name} says {'yes' if result else 'no'}")


def verify(verifiers: Sequence[Verifier], prompt: Prompt, response: str) -> dict[str, Verdict]:
    """Every verifier's verdict, by name."""
    return {verifier.name: verifier(prompt, response) for verifier in verifiers}


def check_verifiers(verifiers: Sequence[Verifier], prompts: Sequence[Prompt]) -> None:
    """Raise `SynthesisError` for two of one name, or a prompt that one of them can't judge."""
    names = [verifier.name for verifier in verifiers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SynthesisError(f"two verifiers are called '{twice[0]}'")
    for verifier in verifiers:
        for prompt in prompts:
            verifier.check(prompt)


def reference_field(prompt: Prompt, field: str, verifier: str) -> Any:
    """A field of the prompt's reference.

    Raises:
      SynthesisError: it isn't there, with the nearest that is.
    """
    if field not in prompt.reference:
        hint = nearest(field, list(map(str, prompt.reference)))
        raise SynthesisError(
            f"prompt {prompt.number + 1} has no '{field}', which verifier '{verifier}' reads{hint}"
        )
    return prompt.reference[field]


def all_passed(verdicts: Mapping[str, Verdict]) -> bool | None:
    """Whether every verdict passed; None where there is none."""
    return all(verdict.passed for verdict in verdicts.values()) if verdicts else None


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
