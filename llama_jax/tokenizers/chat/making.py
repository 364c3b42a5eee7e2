"""Choosing a model's chat format: by name, by the model's template, or by its vocabulary."""

import datetime
from collections.abc import Callable, Mapping

from llama_jax.config.loading import nearest
from llama_jax.tokenizers.chat.format import ChatFormat
from llama_jax.tokenizers.chat.llama2 import CodeLlama70bFormat, Llama2Format
from llama_jax.tokenizers.chat.llama3 import (
    END_OF_MESSAGE,
    START_HEADER,
    Llama3Format,
    Llama3Style,
)
from llama_jax.tokenizers.chat.message import ChatError
from llama_jax.tokenizers.chat.template_format import TemplateFormat
from llama_jax.tokenizers.chat.turns import CHATML, ZEPHYR, TurnFormat
from llama_jax.tokenizers.special import SMALL_SPECIAL_COUNT
from llama_jax.tokenizers.tokenizer import Tokenizer

FORMATS = ("llama2", "codellama-70b", "llama3", "llama3.1", "chatml", "zephyr", "template")


def make_chat_format(
    tokenizer: Tokenizer,
    *,
    name: str | None = None,
    template: str | None = None,
    date: datetime.date | None = None,
    llama3: Llama3Style | None = None,
) -> ChatFormat:
    """The format called `name`, else that of `template`, else the one the vocabulary is made for.

    Args:
      tokenizer: the model's.
      name: one of `FORMATS`; `template` insists on the model's own.
      template: jinja text from the model's files.
      date: today, for the formats that tell it; by default 26 July 2024, so that ids are the same
        on every day.
      llama3: tools and texts of the formats `llama3` and `llama3.1`; an error with another.

    Raises:
      ChatError: an unknown name, or no way to tell.
      TokenizerError: the vocabulary lacks a special token of the format.
    """
    if name is None:
        name = "template" if template is not None else _recognised(tokenizer)
    if name not in FORMATS:
        raise ChatError(f"unknown chat format '{name}'{nearest(name, FORMATS)}")
    if llama3 is not None and name not in ("llama3", "llama3.1"):
        raise ChatError(f"a style of Llama 3 was given for the chat format '{name}'")
    if name == "template" and template is None:
        raise ChatError("this model's files have no chat template; name another chat format")
    makers: Mapping[str, Callable[[], ChatFormat]] = {
        "llama2": lambda: Llama2Format(tokenizer),
        "codellama-70b": lambda: CodeLlama70bFormat(tokenizer),
        "llama3": lambda: Llama3Format(tokenizer, dates=False, style=llama3),
        "llama3.1": lambda: Llama3Format(tokenizer, dates=True, date=date, style=llama3),
        "chatml": lambda: TurnFormat(tokenizer, CHATML),
        "zephyr": lambda: TurnFormat(tokenizer, ZEPHYR),
        "template": lambda: TemplateFormat(tokenizer, template or "", date=date),
    }
    return makers[name]()


def _recognised(tokenizer: Tokenizer) -> str:
    special = tokenizer.special
    if START_HEADER in special:
        # April 2024's vocabulary had not named the end of a message yet. Those trained here have
        # the names, few as they are, but nothing that was trained on them knows of dates.
        dated = END_OF_MESSAGE in special and len(special) > SMALL_SPECIAL_COUNT
        return "llama3.1" if dated else "llama3"
    if "<|im_start|>" in special:
        return "chatml"
    if "<step>" in special:
        return "codellama-70b"
    if tokenizer.spelling.leading != "kept" or {"<s>", "</s>"} <= set(special):
        return "llama2"
    raise ChatError(
        "this model has no chat template, and its vocabulary no special tokens of a known chat"
        f" format; name one of {', '.join(FORMATS[:-1])}"
    )
