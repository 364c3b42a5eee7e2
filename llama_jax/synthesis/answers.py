r"""Final answers: where they stand in a solution, and when two are the same.

`#### 18` (GSM8K), `A: 18` and `The answer is 18`, `\boxed{18}` (MATH), else the last number. Of
several marks the last one counts. Numbers are compared exactly, as fractions; what is no number by
its letters, after LaTeX's spacing and dressing is taken off. Units (`18 dollars`) count where both
have one. Two formulas of equal value that are written differently are not the same answer here:
there is no algebra in it.
"""

import dataclasses
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

from llama_jax.synthesis.prompts import Prompt, SynthesisError
from llama_jax.synthesis.verdicts import Verdict, reference_field

Form = Literal["hashes", "line", "phrase", "boxed", "number"]
FORMS: tuple[Form, ...] = ("hashes", "line", "phrase", "boxed", "number")

_MARKS: dict[Form, re.Pattern[str]] = {
    "hashes": re.compile(r"####[ \t]*([^\n]*)"),
    "line": re.compile(r"^[ \t*]*(?:A|Answer|Final answer)[ \t*]*:[ \t*]*([^\n]*)", re.M | re.I),
    "phrase": re.compile(
        r"\banswer is:?+[ \t]*(.+?)(?=[ \t]*(?:\.(?!\d)|[!;?](?:\s|$)|\n|$))", re.I
    ),
    "boxed": re.compile(r"\\(?:boxed|fbox)[ \t]*(?=\{)"),
}
# A minus is a sign where it touches the number and follows no letter, digit or closing bracket.
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![)\]}])[-−])?[$€£]?"
    r"(?:[0-9]+ (?=[0-9]+/[0-9]))?"
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:/[0-9]+)?"
)
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?")
_FRACTION = re.compile(r"([-+]?)\\frac\{([^{}]+)\}\{([^{}]+)\}")
# A whole number before a fraction: `2 1/2`, `2\frac{1}{2}`.
_MIXED = re.compile(r"(?<![\w.])([0-9]+)(?: +([0-9]+)/([0-9]+)|\\frac\{([0-9]+)\}\{([0-9]+)\})")
# Words alone, two letters or more: `2 x` is another number than 2, and so is `2 million`.
_UNIT = re.compile(
    r"(\S*[0-9])[ ]+(?!(?:hundred|thousand|million|billion|trillion|dozen)s?\b)"
    r"[A-Za-z]{2,}(?: [A-Za-z]{1,12}){0,2}",
    re.I,
)
_SHORT_FRACTION = re.compile(r"\\frac([0-9])([0-9])")
# Taken off wherever they stand: they say how an answer looks, not what it is.
_DRESSING = (
    *(r"\left", r"\right", r"\!", r"\,", r"\;", r"\:", r"\ ", r"\$", "$", "€", "£"),
    *(r"\(", r"\)", r"\%", "%", r"^\circ", r"^{\circ}", "°", "~", "*", "`", '"'),
)
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
# Longer ones aren't taken as numbers: reading them would cost more than the answer is worth.
_LONGEST_NUMBER = 64


def final_answer(text: str, forms: tuple[Form, ...] = FORMS) -> str | None:
    """The answer as it stands in `text`, or None.

    Args:
      text: a solution.
      forms: which marks count; `number`, the last number, only where none of the others is there.
    """
    found = [place for form in forms if form != "number" for place in _marked(text, form)]
    if found:
        return max(found)[1]
    numbers = _NUMBER.findall(text) if "number" in forms else []
    return numbers[-1] if numbers else None


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are equal: as numbers where both are, else by their letters.

    Where one alone is a number, the other may carry a unit in words, which is then left alone.
    """
    texts = normalised(one), normalised(other)
    values = [number_of(text) for text in texts]
    if values.count(None) == 1:
        values = [number_of(normalised(_without_unit(answer))) for answer in (one, other)]
    if None not in values:
        return values[0] == values[1]
    return texts[0] == texts[1] != ""


def normalised(answer: str) -> str:
    r"""Without spaces, LaTeX's dressing, units of money, percent signs, and a last full stop.

    `\dfrac{1}{2}` and `\frac12` become `1/2`, `2\frac12` and `2 1/2` become `5/2`, thousands lose
    their commas.
    """
    text = (
        answer.strip().replace("−", "-").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    )
    text = _TEXT.sub(r"\1", text)
    for dressing in _DRESSING:
        text = text.replace(dressing, "")
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _MIXED.sub(_improper, text)
    text = _FRACTION.sub(lambda m: f"{m[1]}{_bracketed(m[2])}/{_bracketed(m[3])}", text)
    text = re.sub(r"(?<![0-9,])([0-9]{1,3})((?:,[0-9]{3})+)(?![0-9,])", _joined, text)
    return re.sub(r"\s+", "", text).rstrip(".")


def number_of(answer: str) -> Fraction | None:
    """The value of a decimal or a fraction of two, such as `-3.50` or `7/2`; None of others."""
    if len(answer) > _LONGEST_NUMBER:
        return None
    above, slash, below = answer.partition("/")
    top, bottom = _decimal(above), _decimal(below) if slash else Fraction(1)
    return None if top is None or not bottom else top / bottom


@dataclasses.dataclass(frozen=True)
class ExactAnswer:
    """Passes a response whose final answer is that of the prompt's reference.

    Attributes:
      field: of the reference; a whole solution there (`... #### 18`) is read for its answer.
      forms: where the response may give it; ("hashes",) asks for GSM8K's own form.
    """

    kind: Literal["answer"] = "answer"
    field: str = "answer"
    forms: tuple[Form, ...] = FORMS
    name: str = "answer"

    def check(self, prompt: Prompt) -> None:
        """Raise `SynthesisError` where the reference has no answer."""
        self._wanted(prompt)

    def __call__(self, prompt: Prompt, response: str) -> Verdict:
        """Equal or not; the reason says both answers."""
        wanted, given = self._wanted(prompt), final_answer(response, self.forms)
        if given is None:
            return Verdict(False, "no final answer in it")
        same = same_answer(given, wanted)
        return Verdict(same, f"{_shown(given)} {'is' if same else 'is not'} {_shown(wanted)}")

    def _wanted(self, prompt: Prompt) -> str:
        value = reference_field(prompt, self.field, self.name)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise SynthesisError(
                f"prompt {prompt.number + 1}: '{self.field}' is neither a text nor a number"
            )
        text = str(value)
        if not text.strip():
            raise SynthesisError(f"prompt {prompt.number + 1}: '{self.field}' is empty")
        marked = final_answer(text, ("hashes", "line", "boxed"))
        return text.strip() if marked is None else marked


def _marked(text: str, form: Form) -> list[tuple[int, str]]:
    places = []
    for match in _MARKS[form].finditer(text):
        answer = _braced(text, match.end()) if form == "boxed" else match[1].strip()
        if answer:
            places.append((match.start(), answer))
    return places


def _braced(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and the one that closes it."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start + 1 : place].strip()
    return None


def _bracketed(part: str) -> str:
    return part if re.fullmatch(r"[-+]?[\w.]+", part.strip()) else f"({part})"


def _joined(match: re.Match[str]) -> str:
    return match[1] + match[2].replace(",", "")


def _improper(match: re.Match[str]) -> str:
    whole, above, below = (int(group) for group in match.groups() if group is not None)
    return f"{whole * below + above}/{below}"


def _without_unit(answer: str) -> str:
    text = _TEXT.sub(r" \1", answer).replace("*", "").replace("$", "").strip().rstrip(".")
    match = _UNIT.fullmatch(" ".join(text.split()))
    return match[1] if match else answer


def _decimal(text: str) -> Fraction | None:
    if not _DECIMAL.fullmatch(text):
        return None
    try:
        return Fraction(Decimal(text))
    except (InvalidOperation, ValueError):
        return None


def _shown(answer: str) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= 60 else line[:57] + "..."
