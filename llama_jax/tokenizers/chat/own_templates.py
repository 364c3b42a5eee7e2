"""Our chat formats as jinja, for programs that know a model by its chat template alone.

Conversations only: a template that is given tools or calls of them refuses, as do unknown roles.
"""

from llama_jax.tokenizers.chat.turns import CHATML, ZEPHYR, TurnStyle
from llama_jax.tokenizers.tokenizer import Tokenizer

_REFUSALS = """\
{%- if tools %}{{ raise_exception("this chat template can't describe tools") }}{% endif -%}
{%- for message in messages %}
{%- if message.tool_calls or message.role not in ROLES %}
{{- raise_exception("this chat template has no " ~ message.role ~ " messages, or no calls") }}
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
_LLAMA3 = """\
{%- macro said(role, text) -%}
{{- "<|start_header_id|>" ~ role ~ "<|end_header_id|>\\n\\n" ~ text ~ "<|eot_id|>" -}}
{%- endmacro -%}
{{- bos_token -}}
FIRST
{%- for message in messages -%}
{{- said(message.role, message.content | trim) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" -}}
{%- endif -%}
"""
# Llama 3.1's system message, with or without a text of its own.
_DATES = """\
{%- set dates = "Cutting Knowledge Date: December 2023\\nToday Date: "
    ~ (date_string or "26 Jul 2024") ~ "\\n\\n" -%}
{%- if messages and messages[0].role == "system" -%}
{{- said("system", dates ~ messages[0].content | trim) -}}
{%- set messages = messages[1:] -%}
{%- else -%}
{{- said("system", dates) -}}
{%- endif -%}"""


def own_template(name: str, tokenizer: Tokenizer) -> str | None:
    """The template of the format called `name`; None for one without.

    The vocabulary says whether a conversation begins with its begin token.
    """
    bos = "{{- bos_token -}}\n" if tokenizer.adds_bos else ""
    return {
        "llama2": lambda: _refusing("system", "user", "assistant") + _LLAMA2,
        "llama3": lambda: _refusing("system", "user", "assistant") + _LLAMA3.replace("FIRST\n", ""),
        "llama3.1": lambda: (
            _refusing("system", "user", "assistant") + _LLAMA3.replace("FIRST", _DATES)
        ),
        "chatml": lambda: _of_turns(CHATML, bos),
        "zephyr": lambda: _of_turns(ZEPHYR, bos),
    }.get(name, lambda: None)()


def _refusing(*roles: str) -> str:
    return _REFUSALS.replace("ROLES", str(list(roles)))


def _of_turns(style: TurnStyle, bos: str) -> str:
    def text(marks: str) -> str:
        """A jinja expression of header or end."""
        literal = '"' + marks.replace("\n", "\\n") + '"'
        return literal.replace("{role}", '" ~ role ~ "').replace('"{eos}"', "eos_token")

    turn = f"{text(style.header)} ~ text ~ {text(style.end)} ~ {text(style.separator)}"
    first = ""
    if style.default_system is not None:
        first = (
            '{%- if messages and messages[0].role != "system" -%}\n'
            f'{{{{- said("system", "{style.default_system}") -}}}}\n'
            "{%- endif -%}\n"
        )
    header = text(style.header.replace("{role}", "assistant"))
    return (
        _refusing(*style.roles)
        + f"{{%- macro said(role, text) -%}}\n{{{{- {turn} -}}}}\n{{%- endmacro -%}}\n"
        + bos
        + first
        + "{%- for message in messages -%}\n"
        + "{{- said(message.role, message.content) -}}\n"
        + "{%- endfor -%}\n"
        + f"{{%- if add_generation_prompt -%}}\n{{{{- {header} -}}}}\n{{%- endif -%}}\n"
    )
