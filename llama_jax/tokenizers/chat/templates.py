"""Rendering chat templates: jinja, in a sandbox, with what transformers offers to templates.

A template comes with a model's files and is untrusted: it can't reach Python's objects, and it
can't write files. Nothing bounds the time that one takes.
"""

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.parser import Parser

from llama_jax.tokenizers.chat.message import ChatError

# The variable with the two characters that a render puts around what an assistant wrote.
MARKS_VARIABLE = "generation_marks"


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the template says what the assistant writes."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> jinja2.nodes.Node:
        """The block as a call of `_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @jinja2.pass_context
    def _mark(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        begin, end = context[MARKS_VARIABLE]
        return f"{begin}{caller()}{end}"


class Template:
    """A compiled chat template.

    Args:
      source: jinja text.
      date: what `strftime_now` tells.

    Raises:
      ChatError: it isn't valid jinja; the line is named.
    """

    def __init__(self, source: str, date: datetime.date) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = functools.partial(_format_date, date)
        try:
            tree = environment.parse(source)
            self._compiled = environment.from_string(tree)
        except jinja2.TemplateSyntaxError as error:
            raise ChatError(f"chat template, line {error.lineno}: {error.message}") from None
        self.source = source
        self.marks_generation = any(
            isinstance(node.call.node, jinja2.nodes.ExtensionAttribute)
            for node in tree.find_all(jinja2.nodes.CallBlock)
        )

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text for these variables.

        Raises:
          ChatError: the template refused the conversation, or failed on it.
        """
        try:
            return self._compiled.render(variables)
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"chat template: {reason}") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes for HTML and sorts keys; transformers replaces it too.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _format_date(date: datetime.date, text: str) -> str:
    return datetime.datetime.combine(date, datetime.time()).strftime(text)
