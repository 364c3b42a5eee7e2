"""Chat formats that are a header, the text and an end for each message, as data."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_jax.tokenizers.chat.calls import write_tool_call_block
from llama_jax.tokenizers.chat.encoding import Piece, encode_pieces, special_id, special_name
from llama_jax.tokenizers.chat.message import ChatError, Encoded, Message
from llama_jax.tokenizers.chat.tools import Tool
from llama_jax.tokenizers.tokenizer import Tokenizer

_EOS = "{eos}"


@dataclass(frozen=True)
class TurnStyle:
    """How messages are marked. `{role}` and `{eos}` stand for the role and the vocabulary's end.

    Attributes:
      name: of the format.
      header: before each text.
      end: after it; what an assistant writes to end its turn.
      separator: between messages.
      default_system: written where a conversation begins without a system message.
      specials: the special tokens that the vocabulary must have, beside the end.
      roles: those that the format knows.
      writes_calls: whether assistants call tools, in `<tool_call>` tags.
    """

    name: str
    header: str
    end: str
    separator: str
    default_system: str | None = None
    specials: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("system", "user", "assistant")
    writes_calls: bool = False


# As SmolLM2 was taught; others that speak ChatML bring their own template.
CHATML = TurnStyle(
    name="chatml",
    header="<|im_start|>{role}\n",
    end="<|im_end|>",
    separator="\n",
    default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    specials=("<|im_start|>", "<|im_end|>"),
    roles=("system", "user", "assistant", "tool"),
    writes_calls=True,
)
# TinyLlama's; its tags are ordinary text of its vocabulary.
ZEPHYR = TurnStyle(name="zephyr", header="<|{role}|>\n", end=_EOS, separator="\n")


class TurnFormat:
    """The format of a `TurnStyle`.

    Raises:
      TokenizerError: a special token is missing.
    """

    def __init__(self, tokenizer: Tokenizer, style: TurnStyle) -> None:
        self.name, self._tokenizer, self._style = style.name, tokenizer, style
        for name in style.specials:
            special_id(tokenizer, name, style.name)
        self._end = style.end
        if style.end == _EOS:
            self._end = special_name(tokenizer, tokenizer.eos_id)
        self._tags = [self._header(role) for role in style.roles]

    @property
    def stop_tokens(self) -> frozenset[str]:
        """The end of a message, and the vocabulary's end of text."""
        ends = {self._end, special_name(self._tokenizer, self._tokenizer.eos_id), "<|endoftext|>"}
        return frozenset(ends & set(self._tokenizer.special))

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """See `ChatFormat.encode`."""
        refuse_tools(self.name, tools)
        messages = list(messages)
        default = self._style.default_system
        if default is not None and messages and messages[0].role != "system":
            messages.insert(0, Message("system", default))
        pieces = bos_pieces(self._tokenizer)
        for message in messages:
            pieces += self._message(message)
        if add_generation_prompt:
            pieces += self._split(self._header("assistant"))
        return encode_pieces(self._tokenizer, pieces)

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Tool | Mapping[str, Any]] = ()
    ) -> list[int]:
        """See `ChatFormat.prompt`."""
        return self.encode(messages, tools=tools, add_generation_prompt=True).ids

    def _message(self, message: Message) -> Iterator[Piece]:
        refuse_role(self.name, message, self._style.roles)
        if not self._style.writes_calls:
            refuse_calls(self.name, message)
        refuse_ends(self.name, message)
        written = message.role == "assistant"
        if not written:
            self._refuse_tags(message)
        yield from self._split(self._header(message.role))
        yield Piece(text_of(message), written)
        if message.tool_calls:
            yield Piece(write_tool_call_block(message.tool_calls), written)
        yield Piece(self._end, written, special=True)
        yield Piece(self._style.separator)

    def _header(self, role: str) -> str:
        return self._style.header.replace("{role}", role)

    def _split(self, marks: str) -> Iterator[Piece]:
        """The format's own marks: special tokens where the vocabulary has them."""
        names = sorted((n for n in self._tokenizer.special if n in marks), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", marks) if names else [marks]
        return (Piece(part, special=part in names) for part in parts if part)

    def _refuse_tags(self, message: Message) -> None:
        """Marks that are ordinary text could be forged by text."""
        for tag in self._tags:
            tag = tag.strip()
            is_text = all(not piece.special for piece in self._split(tag))
            if is_text and tag in text_of(message):
                raise ChatError(f"the {message.role}'s text holds the {self.name} mark {tag}")


def bos_pieces(tokenizer: Tokenizer) -> list[Piece]:
    """The begin token where the model's texts have one: once, at the start."""
    if not tokenizer.adds_bos:
        return []
    return [Piece(special_name(tokenizer, tokenizer.bos_id), special=True)]


def text_of(message: Message) -> str:
    """A message's text with the retrieved text behind it."""
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def refuse_tools(name: str, tools: Sequence[Any]) -> None:
    """Raise `ChatError` where tools are given to a format without a way to describe them."""
    if tools:
        raise ChatError(f"the {name} format can't describe tools; do so in the system message")


def refuse_calls(name: str, message: Message) -> None:
    """Raise `ChatError` for calls in a format that has none."""
    if message.tool_calls:
        raise ChatError(f"the {name} format has no calls of tools")


def refuse_ends(name: str, message: Message) -> None:
    """Raise `ChatError` for a message that waits for a tool in a format without such an end."""
    if message.ends == "message":
        raise ChatError(f"the {name} format ends turns only; it has no end of message")


def refuse_role(name: str, message: Message, roles: Sequence[str]) -> None:
    """Raise `ChatError` for a role that the format doesn't know."""
    if message.role not in roles:
        raise ChatError(f"the {name} format has no {message.role} messages")
