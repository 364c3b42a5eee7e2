"""Llama 3's chat formats: `llama3` as released, `llama3.1` with dates and tools (3.1 to 3.3).

Each part of a message is encoded alone, as the reference does, so that ids don't depend on what
stands beside it.
"""

import dataclasses
import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama_jax.tokenizers.chat.calls import write_calls
from llama_jax.tokenizers.chat.encoding import Piece, encode_pieces, special_id
from llama_jax.tokenizers.chat.message import ChatError, Encoded, Message
from llama_jax.tokenizers.chat.tools import (
    CODE_INTERPRETER,
    Tool,
    ToolFormat,
    system_header,
    tool_from_schema,
    tool_instructions,
)
from llama_jax.tokenizers.special import BEGIN_OF_TEXT, END_OF_TEXT
from llama_jax.tokenizers.tokenizer import Tokenizer

START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
END_OF_TURN, END_OF_MESSAGE, PYTHON_TAG = "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"

# Fixed, so that the same conversation has the same ids tomorrow; the chat verb passes today.
DEFAULT_DATE = datetime.date(2024, 7, 26)
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


@dataclass(frozen=True)
class Llama3Style:
    """What differs between uses of the format.

    Attributes:
      tool_format: how tools are described and their calls written; Llama 3.2's small models want
        `python_list`.
      builtin_tools: switched on in the system message; needs `llama3.1`.
      python_tag: before code alone, as the reference does, or before every call, as the pages of
        Llama 3.1's format show and its release 0.0.63 did.
      trim: take white space off the ends of texts, as the released templates do. Messages with
        calls, and what tools return, stay as they are.
    """

    tool_format: ToolFormat = "json"
    builtin_tools: tuple[str, ...] = ()
    python_tag: Literal["code_only", "always"] = "code_only"
    trim: bool = True


class Llama3Format:
    """`<|start_header_id|>role<|end_header_id|>`, an empty line, the text, `<|eot_id|>`.

    Args:
      tokenizer: with Llama 3's special tokens.
      dates: begin with a system message that tells dates and tools, as Llama 3.1's.
      date: today's, for that message.
      style: tools and texts.

    Raises:
      TokenizerError: a special token is missing.
      ChatError: built-in tools without the message that announces them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        dates: bool,
        date: datetime.date | None = None,
        style: Llama3Style | None = None,
    ) -> None:
        self.name = "llama3.1" if dates else "llama3"
        self._tokenizer, self._dates, self._style = tokenizer, dates, style or Llama3Style()
        self._date_text = date_text(date or DEFAULT_DATE)
        for name in (BEGIN_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN):
            special_id(tokenizer, name, self.name)
        if self._style.builtin_tools and not dates:
            raise ChatError("built-in tools are announced by the format 'llama3.1', not 'llama3'")

    @property
    def stop_tokens(self) -> frozenset[str]:
        """Ends of text, turn and message: a set, for any of them ends a reply."""
        ends = {END_OF_TEXT, END_OF_TURN, END_OF_MESSAGE}
        return frozenset(ends & set(self._tokenizer.special))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """See `ChatFormat.encode`."""
        described = [tool_from_schema(tool) for tool in tools]
        pieces = [Piece(BEGIN_OF_TEXT, special=True)]
        for message in self._with_tools([self._trimmed(m) for m in messages], described):
            pieces += self._message(message)
        if add_generation_prompt:
            pieces += _header("assistant")
        return encode_pieces(self._tokenizer, pieces)

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Tool | Mapping[str, Any]] = ()
    ) -> list[int]:
        """See `ChatFormat.prompt`."""
        return self.encode(messages, tools=tools, add_generation_prompt=True).ids

    def _with_tools(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
        """The conversation behind the system message and the message that describes tools."""
        style, rest = self._style, list(messages)
        system = rest.pop(0).content if rest and rest[0].role == "system" else None
        pythonic = style.tool_format == "python_list"
        if tools and pythonic:
            # Llama 3.2 has its functions in the system message.
            told = tool_instructions(tools, style.tool_format)
            system = f"{told}\n\n{system}" if system else told
        if self._dates:
            custom = bool(tools) and not pythonic
            header = system_header(self._date_text, style.builtin_tools, custom=custom)
            system = header + (system or "")
        first = [Message("system", system)] if system is not None else []
        if tools and not pythonic:
            first.append(Message("user", tool_instructions(tools, style.tool_format)))
        return first + rest

    def _message(self, message: Message) -> Iterator[Piece]:
        yield from _header("ipython" if message.role == "tool" else message.role)
        written = message.role == "assistant"
        if self._has_python_tag(message):
            special_id(self._tokenizer, PYTHON_TAG, self.name)
            yield Piece(PYTHON_TAG, written, special=True)
        texts = [message.content, *write_calls(message.tool_calls, self._style.tool_format)]
        if message.context:
            texts += ["\n\n", message.context]
        for text in texts:
            yield Piece(text, written, apart=True)
        end = END_OF_TURN if message.ends == "turn" else END_OF_MESSAGE
        special_id(self._tokenizer, end, self.name)
        yield Piece(end, written, special=True)

    def _trimmed(self, message: Message) -> Message:
        if not self._style.trim or message.tool_calls or message.role == "tool":
            return message
        return dataclasses.replace(message, content=message.content.strip())

    def _has_python_tag(self, message: Message) -> bool:
        calls = message.tool_calls
        always = self._style.python_tag == "always"
        return bool(calls) and (always or calls[0].name == CODE_INTERPRETER)


def date_text(date: datetime.date) -> str:
    """`26 Jul 2024`, in any locale."""
    return f"{date.day:02} {_MONTHS[date.month - 1]} {date.year}"


def _header(role: str) -> list[Piece]:
    return [
        Piece(START_HEADER, special=True),
        Piece(role),
        Piece(END_HEADER, special=True),
        Piece("\n\n"),
    ]
