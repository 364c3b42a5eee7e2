"""Whether code passes its tests: the code of a response, then the tests, run apart."""

import dataclasses
import re
from typing import Any, Literal, NoReturn

from llama_jax.synthesis.isolation import Execution, Limits, run_apart
from llama_jax.synthesis.prompts import Prompt, SynthesisError
from llama_jax.synthesis.verdicts import Verdict, reference_field

_FENCED = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")


def code_of(response: str) -> str:
    """The Python of a response: its fenced blocks joined, or all of it where there are none."""
    blocks = [body for language, body in _FENCED.findall(response) if language.lower() in _PYTHON]
    return "\n".join(blocks) if blocks else response


@dataclasses.dataclass(frozen=True)
class CodeTests:
    """Passes a response whose code runs through the prompt's tests without an error.

    The program is the reference's `before` (such as the head of the function that is completed),
    the response's code, and the tests. The first and the last are Python: a text, or a list of
    statements (MBPP). What is isolated and what isn't is said by `isolation`.

    Attributes:
      field: of the reference, where the tests are.
      before: of the reference, put before the code where it is there.
      limits: of each run.
    """

    kind: Literal["tests"] = "tests"
    field: str = "tests"
    before: str = "before"
    limits: Limits = Limits()
    name: str = "tests"

    def check(self, prompt: Prompt) -> None:
        """Raise `SynthesisError` where the reference has no tests, or a `before` that is none."""
        self._tests(prompt)
        self._before(prompt)

    def __call__(self, prompt: Prompt, response: str) -> Verdict:
        """Run it; the reason is the error, or that all passed."""
        parts = [self._before(prompt), code_of(response), self._tests(prompt), ""]
        return _verdict(run_apart("\n".join(parts), self.limits))

    def _tests(self, prompt: Prompt) -> str:
        tests = _code(reference_field(prompt, self.field, self.name), prompt, self.field)
        return tests if tests.strip() else _refuse(prompt, self.field)

    def _before(self, prompt: Prompt) -> str:
        before = prompt.reference.get(self.before)
        return "" if before is None else _code(before, prompt, self.before)


def _code(value: Any, prompt: Prompt, field: str) -> str:
    """A text as it is, a list of statements as lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    return value if isinstance(value, str) else _refuse(prompt, field)


def _refuse(prompt: Prompt, field: str) -> NoReturn:
    raise SynthesisError(
        f"prompt {prompt.number + 1}: '{field}' is neither a text nor a list of texts"
    )


def _verdict(execution: Execution) -> Verdict:
    if execution.ending == "finished":
        return Verdict(True, "its tests pass")
    if execution.ending == "ended_early":
        return Verdict(False, f"ended before its tests did: {execution.detail}")
    return Verdict(False, execution.detail)
