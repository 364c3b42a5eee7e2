"""Where text is cut before merging: the Llama 3 pattern, and two ways with very long text.

The pattern's lookahead backtracks once a character of a run of white space and runs out of stack
after some hundred thousand. The reference avoids that by cutting the text first, which changes
ids at the cuts; `set_apart_white_space` cuts only where the pattern itself would.
"""

import functools
import re
from collections.abc import Iterator

# Alternatives in order: contraction; a letter run with at most one other character before it; up
# to three digits; punctuation with an optional space before and line ends after; white space that
# ends a line; white space up to the last one before a word; other white space.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

# Llama 3's reference encoder cuts text to these sizes, whatever the pattern says.
_MAX_PIECE_CHARS = 400_000
_MAX_RUN_CHARS = 25_000

# Unicode White_Space, which `\s` means in the pattern. Python's `str.isspace` takes four control
# characters more (U+001C to U+001F).
_WHITE_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_SAFE_RUN_CHARS = 10_000


@functools.cache
def _long_white_space() -> re.Pattern[str]:
    return re.compile(f"[{_WHITE_SPACE}]{{{_SAFE_RUN_CHARS},}}")


def cut_like_reference(text: str) -> Iterator[str]:
    """Pieces of at most 400,000 characters whose runs are at most 25,000 characters long.

    A run is a stretch of characters that all are, or all are not, `str.isspace`.
    """
    for start in range(0, len(text), _MAX_PIECE_CHARS):
        yield from _cut_runs(text[start : start + _MAX_PIECE_CHARS])


def _cut_runs(text: str) -> Iterator[str]:
    if len(text) <= _MAX_RUN_CHARS:
        yield text
        return
    start = 0
    for run_start, run_end in _runs(text):
        # Cuts fall inside the run, every 25,000 characters from its first one.
        for cut in range(run_start + _MAX_RUN_CHARS, run_end, _MAX_RUN_CHARS):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _runs(text: str) -> Iterator[tuple[int, int]]:
    # `str.isspace` is also true of U+001C to U+001F, as is `\s` of the re module for strings.
    for match in re.finditer(r"\s+|\S+", text):
        yield match.span()


def set_apart_white_space(text: str) -> Iterator[tuple[str, bool]]:
    """Cut around very long white space so that the pattern splits the same pieces.

    Yields:
      (text, whole): `whole` text is one piece of the pattern; the rest is for the pattern to split.

        before the run | run through its last line end | run but its last character | rest
    """
    start = 0
    for match in _long_white_space().finditer(text):
        run_start, run_end = match.span()
        run_start = _after_punctuation(text, run_start, run_end)
        line_end = 1 + max(
            text.rfind("\n", run_start, run_end), text.rfind("\r", run_start, run_end)
        )
        line_end = max(line_end, run_start)
        # White space gives its last character to the word that follows.
        spaces_end = run_end if run_end == len(text) else max(run_end - 1, line_end)
        yield text[start:run_start], False
        yield text[run_start:line_end], True
        yield text[line_end:spaces_end], True
        start = spaces_end
    yield text[start:], False


def _after_punctuation(text: str, start: int, end: int) -> int:
    """Where the run starts that the white-space alternatives see: punctuation takes line ends."""
    if start == 0 or text[start - 1].isalpha() or text[start - 1].isnumeric():
        return start
    while start < end and text[start] in "\r\n":
        start += 1
    return start
