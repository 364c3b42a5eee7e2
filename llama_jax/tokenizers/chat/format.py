"""What every chat format offers."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from llama_jax.tokenizers.chat.message import Encoded, Message
from llama_jax.tokenizers.chat.tools import Tool


class ChatFormat(Protocol):
    """How a model was taught to read a conversation.

    What people write can't make special tokens: they come from the format alone. (Formats whose
    turns are marked by ordinary text, such as Llama 2's, refuse the marks instead, and a template
    that does so can't be protected: its marks aren't known.)
    """

    @property
    def name(self) -> str:
        """As `make_chat_format` takes it; `template` for a model's own."""
        ...

    @property
    def stop_tokens(self) -> frozenset[str]:
        """The special tokens that end an assistant's message."""
        ...

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
    ) -> Encoded:
        """Ids of the conversation and what the assistant wrote of it, ends of turns included.

        Args:
          messages: the conversation; a system message first, if any.
          tools: what the assistant may call, as `Tool` or as JSON schemas.
          add_generation_prompt: end with the header of the assistant's next message.

        Raises:
          ChatError: a conversation that the format can't express, or of which can't be told what
            the assistant wrote.
        """
        ...

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Tool | Mapping[str, Any]] = ()
    ) -> list[int]:
        """What a model is given to reply to: the conversation and the header of the reply.

        The ids of `encode` with a generation prompt, where it is of no matter what the assistant
        wrote before.
        """
        ...
