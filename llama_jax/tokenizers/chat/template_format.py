"""The chat format of a model's own jinja template.

The template writes text, in which special tokens are spelled. Those that come from people's
messages must not count: a private-use character that occurs nowhere else is put inside each before
rendering, and taken out of the ordinary text after the real ones are found.
"""

import datetime
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.tokenizers.chat.encoding import Piece, encode_pieces, special_name
from llama_jax.tokenizers.chat.llama3 import DEFAULT_DATE, date_text
from llama_jax.tokenizers.chat.message import ChatError, Encoded, Message, message_to_json
from llama_jax.tokenizers.chat.templates import MARKS_VARIABLE, Template
from llama_jax.tokenizers.chat.tools import Tool
from llama_jax.tokenizers.chat.turns import text_of
from llama_jax.tokenizers.tokenizer import Tokenizer, id_or_none

# End tokens of known formats; those in the template and the vocabulary end a reply.
_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|eot|>", "<|eom|>",
         "<|end_of_turn|>", "<end_of_turn>", "<step>", "</s>")  # fmt: skip
# Nothing goes on behind these, whether or not the template has heard of them.
_ENDS_OF_TEXT = {"<|endoftext|>", "<|end_of_text|>"}
_PRIVATE_USE = range(0xE000, 0xF900)

Span = tuple[int, int]


class TemplateFormat:
    """A template with the vocabulary that it was written for.

    What the assistant wrote is what the template puts in `{% generation %}`. Without that tag it is
    what comes between the prompt before a reply and the conversation after it, to the last special
    token: the line end that many templates write behind is theirs.

    Args:
      tokenizer: its special tokens are those that the template may write.
      template: jinja text.
      date: today's, as `date_string` and through `strftime_now`.

    Raises:
      ChatError: not valid jinja.
    """

    name = "template"

    def __init__(
        self, tokenizer: Tokenizer, template: str, *, date: datetime.date | None = None
    ) -> None:
        self._tokenizer, self._date = tokenizer, date or DEFAULT_DATE
        self._template = Template(template, self._date)
        # Inside a name of one character there is no place for the mark: such are ordinary text.
        names = sorted((n for n in tokenizer.special if len(n) > 1), key=len, reverse=True)
        # A pattern that never matches, where there are none.
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        edges = {name[:i] for name in names for i in range(1, len(name))}
        self._beginnings = tuple(sorted(edges, key=len, reverse=True))
        edges = {name[i:] for name in names for i in range(1, len(name))}
        self._endings = tuple(sorted(edges, key=len, reverse=True))

    @property
    def stop_tokens(self) -> frozenset[str]:
        """The vocabulary's end of text and the ends of turns that the template knows."""
        special = self._tokenizer.special
        ends = {name for name in _ENDS if name in special and name in self._template.source}
        ends |= _ENDS_OF_TEXT & set(special)
        # Llama 3.1's templates may not spell all of its three.
        if "<|eot_id|>" in ends:
            ends |= {"<|eom_id|>"} & set(special)
        eos = _named_tokens(self._tokenizer).get("eos_token")
        return frozenset(ends if eos is None else {*ends, eos})

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        documents: Sequence[Mapping[str, Any]] = (),
    ) -> Encoded:
        """See `ChatFormat.encode`; `documents` are passed to templates that read them.

        Raises:
          ChatError: the template refuses the conversation, would leave tools or calls out, or has
            no `{% generation %}` and writes a reply otherwise than its own prompt for it begins.
        """
        self._refuse_tools(messages, tools)
        variables, mark = self._variables(messages, tools, documents)
        text, spans = self._render(variables, add_generation_prompt=add_generation_prompt)
        if not self._template.marks_generation:
            spans = self._reply_spans(text, variables)
        return self._encoded(text, spans, mark)

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """See `ChatFormat.prompt`: works for templates that rewrite earlier replies, too."""
        self._refuse_tools(messages, tools)
        variables, mark = self._variables(messages, tools, documents)
        text, spans = self._render(variables, add_generation_prompt=True)
        return self._encoded(text, spans, mark).ids

    def _refuse_tools(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        """Raise `ChatError` for what the template never reads, which would be lost in silence."""
        given = {"tools": bool(tools), "tool_calls": any(m.tool_calls for m in messages)}
        for name, is_given in given.items():
            if is_given and name not in self._template.source:
                raise ChatError(f"the chat template leaves {name} out; it can't write them")

    def _variables(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool | Mapping[str, Any]],
        documents: Sequence[Mapping[str, Any]],
    ) -> tuple[dict[str, Any], str]:
        """What the template sees, and the mark inside what people wrote."""
        schemas = [tool.to_schema() if isinstance(tool, Tool) else dict(tool) for tool in tools]
        given = {"messages": [_to_table(m) for m in messages], "tools": schemas or None,
                 "documents": [dict(d) for d in documents] or None}  # fmt: skip
        mark, begin, end = _unused_characters(json.dumps(given, ensure_ascii=False, default=str)
                                              + self._template.source)  # fmt: skip
        variables = {
            **_named_tokens(self._tokenizer),
            **self._neutral(given, mark),
            "date_string": date_text(self._date),
            MARKS_VARIABLE: (begin, end),
        }
        return variables, mark

    def _encoded(self, text: str, spans: Sequence[Span], mark: str) -> Encoded:
        pieces = self._with_bos(list(self._pieces(text, spans, mark)))
        return encode_pieces(self._tokenizer, pieces)

    def _render(
        self, variables: Mapping[str, Any], *, add_generation_prompt: bool
    ) -> tuple[str, list[Span]]:
        """The text, and the stretches of it that stood in `{% generation %}`."""
        flag = {"add_generation_prompt": add_generation_prompt}
        marked = self._template.render({**variables, **flag})
        begin, end = variables[MARKS_VARIABLE]
        text, spans, starts = "", [], []
        for part in re.split(f"([{begin}{end}])", marked):
            if part == begin:
                starts.append(len(text))
            elif part == end and starts:
                spans.append((starts.pop(), len(text)))
            elif part == end:
                raise ChatError("chat template: it tears {% generation %} apart")
            else:
                text += part
        return text, spans

    def _reply_spans(self, whole: str, variables: Mapping[str, Any]) -> list[Span]:
        messages, spans = variables["messages"], []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = {**variables, "messages": messages[:i]}
            prompt, _ = self._render(before, add_generation_prompt=True)
            until = {**variables, "messages": messages[: i + 1]}
            reply, _ = self._render(until, add_generation_prompt=False)
            if not (reply.startswith(prompt) and whole.startswith(reply)):
                raise ChatError(
                    f"chat template: message {i + 1} is not written as the prompt for it begins, so"
                    " what the assistant wrote can't be told; it needs {% generation %}"
                )
            ends = [found.end() for found in self._special.finditer(reply, len(prompt))]
            spans.append((len(prompt), ends[-1] if ends else len(reply)))
        return spans

    def _pieces(self, text: str, spans: Sequence[Span], mark: str) -> Iterator[Piece]:
        """The text cut at special tokens and at the borders of the spans."""
        borders = sorted({border for span in spans for border in span})
        ascii_mark = json.dumps(mark)[1:-1]  # where the template wrote JSON in ASCII
        start = 0
        for found in [*self._special.finditer(text), None]:
            stop = found.start() if found else len(text)
            cuts = [start, *(b for b in borders if start < b < stop), stop]
            for a, b in itertools.pairwise(cuts):
                ordinary = text[a:b].replace(mark, "").replace(ascii_mark, "")
                if ordinary:
                    yield Piece(ordinary, _inside(a, spans))
            if found:
                yield Piece(found.group(), _inside(stop, spans), special=True)
                start = found.end()

    def _with_bos(self, pieces: list[Piece]) -> list[Piece]:
        """One begin token, whether the template writes it or the vocabulary wants it."""
        bos = _named_tokens(self._tokenizer).get("bos_token")
        written = 0
        while written < len(pieces) and pieces[written] == Piece(bos or "", special=True):
            written += 1
        if bos is None or not (written or self._tokenizer.adds_bos):
            return pieces
        return [Piece(bos, special=True), *pieces[written:]]

    def _neutral(self, value: Any, mark: str) -> Any:
        """`value` with `mark` in every text, keys included, that could make a special token."""
        if isinstance(value, str):
            return self._neutral_text(value, mark)
        if isinstance(value, Mapping):
            return {self._neutral(k, mark): self._neutral(v, mark) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._neutral(item, mark) for item in value]
        return value

    def _neutral_text(self, text: str, mark: str) -> str:
        text = self._special.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        # The ends could join what the template writes beside them; it may trim white space first.
        inner = text.strip()
        start = len(text) - len(text.lstrip())
        stop = start + len(inner)
        if inner.endswith(self._beginnings):
            cut = next(len(edge) for edge in self._beginnings if inner.endswith(edge))
            at = stop - cut + 1
            text = text[:at] + mark + text[at:]
        if inner.startswith(self._endings):
            text = text[:start] + mark + text[start:]
        return text


def _to_table(message: Message) -> dict[str, Any]:
    """A message as templates read it."""
    table = message_to_json(message)
    table.pop("ends", None)
    table.pop("context", None)
    table.pop("weight", None)
    return {**table, "content": text_of(message)}


def _named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of the special tokens that this vocabulary has, by template variable."""
    found = {"unk_token": "<unk>"} if "<unk>" in tokenizer.special else {}
    for role in ("bos", "eos", "pad"):
        token_id = id_or_none(tokenizer, role)
        if token_id is not None:  # else templates see an undefined variable
            found[f"{role}_token"] = special_name(tokenizer, token_id)
    return found


def _unused_characters(text: str) -> tuple[str, str, str]:
    """Three private-use characters that don't occur in `text`."""
    used = set(text)
    unused = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    try:
        return next(unused), next(unused), next(unused)
    except StopIteration:
        raise ChatError("the messages use every private-use character of Unicode") from None


def _inside(position: int, spans: Sequence[Span]) -> bool:
    return any(start <= position < stop for start, stop in spans)
