"""Conversations to ids and replies to messages: the chat formats of the Llama family."""

from llama_jax.tokenizers.chat.format import ChatFormat
from llama_jax.tokenizers.chat.llama3 import Llama3Style
from llama_jax.tokenizers.chat.making import FORMATS, make_chat_format
from llama_jax.tokenizers.chat.message import (
    ROLES,
    ChatError,
    Encoded,
    Message,
    ToolCall,
    message_from_json,
    message_to_json,
    messages_from_json,
)
from llama_jax.tokenizers.chat.parsing import Reply, parse_reply
from llama_jax.tokenizers.chat.tools import Parameter, Tool

__all__ = [
    "FORMATS",
    "ROLES",
    "ChatError",
    "ChatFormat",
    "Encoded",
    "Llama3Style",
    "Message",
    "Parameter",
    "Reply",
    "Tool",
    "ToolCall",
    "make_chat_format",
    "message_from_json",
    "message_to_json",
    "messages_from_json",
    "parse_reply",
]
