"""Our chat formats as jinja, for programs that know a model by its chat template alone.

Each writes what its format does, and refuses what that can't write: tools and calls of them for
most, some roles. Texts that the formats' own modules have are taken from there.
"""

from llama_jax.tokenizers.chat.tools import (
    CODE_INTERPRETER,
    SEARCH_TOOLS,
    json_function,
    json_instructions,
    json_property,
    system_header,
)
from llama_jax.tokenizers.chat.turns import CHATML, ZEPHYR, TurnStyle
from llama_jax.tokenizers.tokenizer import Tokenizer

_NO_TOOLS = """\
{%- if tools %}{{ raise_exception("this chat template can't describe tools") }}{% endif -%}
"""
_ROLES = """\
{%- for message in messages %}
{%- if message.role not in ROLES %}
{{- raise_exception("this chat template has no " ~ message.role ~ " messages") }}
{%- endif %}
{%- endfor -%}
"""
_NO_CALLS = """\
{%- for message in messages %}
{%- if message.tool_calls %}
{{- raise_exception("this chat template has no calls of tools") }}
{%- endif %}
{%- endfor -%}
"""
_LLAMA2 = """\
{%- set told = namespace(text="") -%}
{%- for message in messages -%}
{%- if message.role == "system" -%}
{%- if not loop.first %}{{ raise_exception("the system message comes first") }}{% endif -%}
{%- set told.text = "<<SYS>>\\n" ~ message.content ~ "\\n<</SYS>>\\n\\n" -%}
{%- elif message.role == "user" -%}
{{- bos_token ~ "[INST] " ~ (told.text ~ message.content) | trim ~ " [/INST]" -}}
{%- set told.text = "" -%}
{%- else -%}
{{- " " ~ message.content | trim ~ " " ~ eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
# Arguments may be given as JSON in a text.
_ARGUMENTS = """\
{%- macro arguments_of(call, ascii) -%}
{{- call.arguments if call.arguments is string else call.arguments | tojson(ensure_ascii=ascii) -}}
{%- endmacro -%}
"""
_LLAMA3 = """\
{%- macro said(role, text) -%}
{{- "<|start_header_id|>" ~ role ~ "<|end_header_id|>\\n\\n" ~ text ~ "<|eot_id|>" -}}
{%- endmacro -%}
{%- macro called(call) -%}
{%- if call.name == "CODE_INTERPRETER" -%}
{{- call.arguments.code -}}
{%- elif call.name in SEARCH_TOOLS -%}
{{- call.name ~ '.call(query="' ~ call.arguments.query ~ '")' -}}
{%- else -%}
{{- '{"type": "function", "name": ' ~ call.name | tojson -}}
{{- ', "parameters": ' ~ arguments_of(call, true) ~ "}" -}}
{%- endif -%}
{%- endmacro -%}
{%- macro with_calls(message) -%}
{%- set first = message.tool_calls[0].function or message.tool_calls[0] -%}
{{- "<|python_tag|>" if first.name == "CODE_INTERPRETER" else "" -}}
{{- message.content or "" -}}
{%- for call in message.tool_calls %}{{ called(call.function or call) }}{% endfor -%}
{%- endmacro -%}
{%- macro described(function) -%}
{%- set table = function.parameters or {} -%}
{%- set properties = table.properties or {} -%}
{%- set told = namespace(properties="", required="") -%}
{%- for name, one in properties.items() -%}
{%- set told.properties = told.properties ~ (",\\n" if told.properties else "") ~ PROPERTY -%}
{%- if name in (table.required or []) -%}
{%- set told.required = told.required ~ (", " if told.required else "") ~ '"' ~ name ~ '"' -%}
{%- endif -%}
{%- endfor -%}
{{- FUNCTION -}}
{%- endmacro -%}
{%- macro all_described() -%}
{%- for tool in tools -%}
{{- ("" if loop.first else "\\n") ~ described(tool.function or tool) -}}
{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set header = HEADER -%}
{%- if messages and messages[0].role == "system" -%}
{{- said("system", header ~ messages[0].content | trim) -}}
{%- set messages = messages[1:] -%}
{%- elif header -%}
{{- said("system", header) -}}
{%- endif -%}
{%- if tools -%}
{{- said("user", INSTRUCTIONS) -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role in ["tool", "ipython"] -%}
{{- said("ipython", message.content) -}}
{%- elif message.tool_calls -%}
{{- said(message.role, with_calls(message)) -}}
{%- else -%}
{{- said(message.role, message.content | trim) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" -}}
{%- endif -%}
"""
# As `write_tool_call_block` writes them.
_CALL_BLOCK = """\
{%- macro with_calls(message) -%}
{{- (message.content or "") ~ "<tool_call>[" -}}
{%- for call in message.tool_calls -%}
{%- set call = call.function or call -%}
{{- ("" if loop.first else ", ") ~ '{"name": ' ~ call.name | tojson -}}
{{- ', "arguments": ' ~ arguments_of(call, false) ~ "}" -}}
{%- endfor -%}
{{- "]</tool_call>" -}}
{%- endmacro -%}
"""


def own_template(name: str, tokenizer: Tokenizer) -> str | None:
    """The template of the format called `name`; None for one without.

    The vocabulary says whether a conversation begins with its begin token.
    """
    bos = "{{- bos_token -}}\n" if tokenizer.adds_bos else ""
    return {
        "llama2": lambda: _NO_TOOLS + _NO_CALLS + _knowing("system", "user", "assistant") + _LLAMA2,
        "llama3": lambda: _llama3(dates=False),
        "llama3.1": lambda: _llama3(dates=True),
        "chatml": lambda: _of_turns(CHATML, bos),
        "zephyr": lambda: _of_turns(ZEPHYR, bos),
    }.get(name, lambda: None)()


def _knowing(*roles: str) -> str:
    return _ROLES.replace("ROLES", str(list(roles)))


def _llama3(*, dates: bool) -> str:
    header = '""'
    if dates:
        without, with_tools = (
            _expression(system_header(_at('(date_string or "26 Jul 2024")'), custom=custom))
            for custom in (False, True)
        )
        header = f"{with_tools} if tools else {without}"
    described = json_function(
        _at("function.name"),
        _at('(function.description or "")'),
        _at("told.properties"),
        _at("told.required"),
    )
    template = _LLAMA3
    for place, text in {
        "CODE_INTERPRETER": CODE_INTERPRETER,
        "SEARCH_TOOLS": str(list(SEARCH_TOOLS)),
        "PROPERTY": _expression(json_property(_at("name"), _at('(one.description or "")'))),
        "FUNCTION": _expression(described),
        "HEADER": header,
        "INSTRUCTIONS": _expression(json_instructions(_at("all_described()"))),
    }.items():
        template = template.replace(place, text)
    return _knowing("system", "user", "assistant", "tool", "ipython") + _ARGUMENTS + template


def _of_turns(style: TurnStyle, bos: str) -> str:
    def text(marks: str, role: str = "role") -> str:
        return _expression(marks.replace("{role}", _at(role)).replace("{eos}", _at("eos_token")))

    turn = f"{text(style.header)} ~ text ~ {text(style.end)} ~ {text(style.separator)}"
    header = text(style.header, role='"assistant"')
    calls, content = _NO_CALLS, "message.content"
    if style.writes_calls:
        calls = _ARGUMENTS + _CALL_BLOCK
        content = "with_calls(message) if message.tool_calls else message.content"
    first = ""
    if style.default_system is not None:
        first = (
            '{%- if messages and messages[0].role != "system" -%}\n'
            f'{{{{- said("system", {_expression(style.default_system)}) -}}}}\n'
            "{%- endif -%}\n"
        )
    return (
        _NO_TOOLS
        + _knowing(*style.roles)
        + calls
        + f"{{%- macro said(role, text) -%}}\n{{{{- {turn} -}}}}\n{{%- endmacro -%}}\n"
        + bos
        + first
        + "{%- for message in messages -%}\n"
        + f"{{{{- said(message.role, {content}) -}}}}\n"
        + "{%- endfor -%}\n"
        + "{%- if add_generation_prompt -%}\n"
        + f"{{{{- {header} -}}}}\n"
        + "{%- endif -%}\n"
    )


def _at(expression: str) -> str:
    """The place in a text of what a jinja expression gives."""
    return f"\0{expression}\0"


def _expression(text: str) -> str:
    """A text with such places as one jinja expression."""
    parts = text.split("\0")
    parts[::2] = [_literal(part) if part else "" for part in parts[::2]]
    return " ~ ".join(filter(None, parts))


def _literal(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
