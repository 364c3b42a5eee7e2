"""The chat formats of Llama 2 and of Code Llama 70B Instruct."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.tokenizers.chat.encoding import Piece, encode_pieces, special_id, special_name
from llama_jax.tokenizers.chat.message import ChatError, Encoded, Message
from llama_jax.tokenizers.chat.tools import Tool
from llama_jax.tokenizers.chat.turns import (
    refuse_calls,
    refuse_ends,
    refuse_role,
    refuse_tools,
    text_of,
)
from llama_jax.tokenizers.tokenizer import Tokenizer

_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
_STEP = "<step>"
_ROLES = ("system", "user", "assistant")


class Llama2Format:
    """BOS, `[INST] user [/INST] answer `, EOS for each exchange; the last may lack its answer.

    A system message goes inside the first user's, between `<<SYS>>` marks. Texts are stripped. The
    marks are ordinary text, so text that holds them is refused.
    """

    name = "llama2"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos = special_name(tokenizer, tokenizer.bos_id)
        self._eos = special_name(tokenizer, tokenizer.eos_id)

    @property
    def stop_tokens(self) -> frozenset[str]:
        """The end of an exchange."""
        return frozenset({self._eos})

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """See `ChatFormat.encode`; the assistant's header is the user's `[/INST]`."""
        refuse_tools(self.name, tools)
        turns = _checked_turns(self.name, messages, _TAGS)
        system = turns.pop(0).content if turns and turns[0].role == "system" else None
        if add_generation_prompt and (not turns or turns[-1].role != "user"):
            raise ChatError("a llama2 conversation needs a user's message before the reply")
        pieces: list[Piece] = []
        for message in turns:
            pieces += self._answer(message) if message.role == "assistant" else self._ask(
                message, system if not pieces else None
            )  # fmt: skip
        return encode_pieces(self._tokenizer, pieces)

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Tool | Mapping[str, Any]] = ()
    ) -> list[int]:
        """See `ChatFormat.prompt`."""
        return self.encode(messages, tools=tools, add_generation_prompt=True).ids

    def _ask(self, message: Message, system: str | None) -> Iterator[Piece]:
        yield Piece(self._bos, special=True)
        told = "" if system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n"
        # Stripped with the system text on, as the reference does.
        yield Piece(f"[INST] {(told + text_of(message)).strip()} [/INST]")

    def _answer(self, message: Message) -> Iterator[Piece]:
        yield Piece(f" {message.content.strip()} ", written=True)
        yield Piece(self._eos, written=True, special=True)


class CodeLlama70bFormat:
    """BOS, then ` Source: role`, an empty line, the text and `<step>` for each message.

    What the assistant writes goes to `Destination: user`. A conversation without a system message
    gets an empty one, as in the reference.
    """

    name = "codellama-70b"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bos = special_name(tokenizer, tokenizer.bos_id)
        special_id(tokenizer, _STEP, self.name)

    @property
    def stop_tokens(self) -> frozenset[str]:
        """The end of a message, and the vocabulary's."""
        return frozenset({_STEP, special_name(self._tokenizer, self._tokenizer.eos_id)})

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """See `ChatFormat.encode`."""
        refuse_tools(self.name, tools)
        turns = _checked_turns(self.name, messages, (*_TAGS, _STEP))
        if not turns or turns[0].role != "system":
            turns.insert(0, Message("system", ""))
        pieces = [Piece(self._bos, special=True)]
        for message in turns:
            pieces += self._message(message)
        if add_generation_prompt:
            pieces += [self._header("assistant"), Piece("\n\n ", apart=True)]
        return encode_pieces(self._tokenizer, pieces)

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Tool | Mapping[str, Any]] = ()
    ) -> list[int]:
        """See `ChatFormat.prompt`."""
        return self.encode(messages, tools=tools, add_generation_prompt=True).ids

    def _header(self, role: str) -> Piece:
        destination = "\nDestination: user" if role == "assistant" else ""
        return Piece(f" Source: {role}{destination}", apart=True)

    def _message(self, message: Message) -> Iterator[Piece]:
        written = message.role == "assistant"
        yield self._header(message.role)
        text = text_of(message).strip()
        if text:
            # The space in front is part of the first word's token.
            yield Piece("\n\n", apart=True)
            yield Piece(f" {text}", written)
        yield Piece(_STEP, written, special=True)


def _checked_turns(
    name: str, messages: Sequence[Message], marks: Sequence[str]
) -> list[Message]:  # fmt: skip
    """The messages: system if any, then user and assistant by turns, none with a forged mark."""
    turns = list(messages)
    for number, message in enumerate(turns, 1):
        refuse_role(name, message, _ROLES)
        refuse_calls(name, message)
        refuse_ends(name, message)
        found = [tag for tag in marks if tag in text_of(message)]
        if found and message.role != "assistant":
            raise ChatError(
                f"message {number}: the {message.role}'s text holds the mark {found[0]}"
            )
    start = 1 if turns and turns[0].role == "system" else 0
    for place, message in enumerate(turns[start:]):
        wanted = ("user", "assistant")[place % 2]
        if message.role != wanted:
            raise ChatError(
                f"message {start + place + 1} is the {message.role}'s; {name} conversations go"
                f" user, assistant, user, ...: the {wanted}'s is missing"
            )
    if start and len(turns) == 1:
        raise ChatError(f"a {name} system message needs a user's message to go into")
    return turns
