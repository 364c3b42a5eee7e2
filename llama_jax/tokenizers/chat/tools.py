"""Descriptions of tools, and how Llama 3.1 and 3.2 are told about them.

The texts are those of Meta's prompt formats, word for word, with their oddities: models were
trained on them.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_jax.tokenizers.chat.message import ChatError

ToolFormat = Literal["json", "function_tag", "python_list"]
CODE_INTERPRETER = "code_interpreter"
# Built in, with one argument `query`; `photogen` is written like them and never announced.
SEARCH_TOOLS = ("brave_search", "wolfram_alpha", "photogen")


@dataclass(frozen=True)
class Parameter:
    """A tool's parameter; `type` as JSON schemas or Python name it."""

    type: str
    description: str = ""
    required: bool = True
    default: Any = None


@dataclass(frozen=True)
class Tool:
    """A tool that a model may call.

    Attributes:
      name, description, parameters: what Llama's texts tell of it.
      schema: the JSON form that it was read from, whose nested types and choices templates write.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    schema: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def to_schema(self) -> dict[str, Any]:
        """As OpenAI's and Hugging Face's JSON form has it."""
        if self.schema is not None:
            return {"type": "function", "function": dict(self.schema)}
        properties = {name: _property(one) for name, one in self.parameters.items()}
        required = [name for name, one in self.parameters.items() if one.required]
        parameters = {"type": "object", "properties": properties, "required": required}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def tool_from_schema(schema: Tool | Mapping[str, Any]) -> Tool:
    """A tool from its JSON form, with or without the `{"type": "function"}` around it.

    Some write the parameters without the `{"properties"}` around them.

    Raises:
      ChatError: no name, or parameters that are not an object's.
    """
    if isinstance(schema, Tool):
        return schema
    function = schema.get("function", schema) if isinstance(schema, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatError(f"a tool needs a 'name', got {schema!r}")
    name, table = function["name"], function.get("parameters") or {}
    properties = _properties(table) if isinstance(table, Mapping) else None
    if not isinstance(properties, Mapping):
        raise ChatError(f"the parameters of tool '{name}' have no 'properties' object")
    required = table.get("required") or []
    if not isinstance(required, list | tuple | Mapping):
        raise ChatError(f"'required' of tool '{name}' is not a list")
    parameters = {
        key: _parameter(one, name, key, is_required=key in required)
        for key, one in properties.items()
    }
    return Tool(name, function.get("description") or "", parameters, function)


def _properties(table: Mapping[str, Any]) -> Any:
    bare = bool(table) and all(isinstance(one, Mapping) for one in table.values())
    return table if bare and "properties" not in table else table.get("properties") or {}


def _parameter(one: Any, tool: str, name: str, *, is_required: bool) -> Parameter:
    if not isinstance(one, Mapping):
        raise ChatError(f"parameter '{name}' of tool '{tool}' is not an object, got {one!r}")
    kind, told = str(one.get("type", "string")), one.get("description") or ""
    return Parameter(kind, told, is_required, one.get("default"))


def system_header(date_text: str, builtin: Sequence[str] = (), *, custom: bool = False) -> str:
    """What Llama 3.1's system message begins with; the system text follows.

    Args:
      date_text: today, such as `26 Jul 2024`.
      builtin: names of built-in tools; `code_interpreter` needs no mention beyond the first line.
      custom: whether there are tools of the user's own.
    """
    lines = []
    if builtin or custom:
        lines.append("Environment: ipython")
        named = ", ".join(name for name in builtin if name != CODE_INTERPRETER)
        lines.append(f"Tools: {named}" if named else "")
    if builtin and not custom and not lines[-1]:
        lines.pop()
    lines += ["Cutting Knowledge Date: December 2023", f"Today Date: {date_text}", "", ""]
    return "\n".join(lines)


def tool_instructions(tools: Sequence[Tool], tool_format: ToolFormat) -> str:
    """The message that tells of `tools` and of how to call them."""
    texts = {"json": _as_json, "function_tag": _as_tags, "python_list": _as_python}
    return texts[tool_format](tools)


def tool_response(status: str, *, stdout: str = "", stderr: str = "") -> str:
    """What a built-in tool's message says: `completed` or `failed`, then what came out."""
    text = status
    if stdout:
        text += f"\n[stdout]{stdout}[/stdout]"
    if stderr:
        text += f"\n[stderr]{stderr}[/stderr]"
    return text


def _property(parameter: Parameter) -> dict[str, Any]:
    described = {"type": parameter.type, "description": parameter.description}
    return described if parameter.default is None else {**described, "default": parameter.default}


_JSON_HEAD = """\
Answer the user's question by making use of the following functions if needed.
If none of the function can be used, please say so.
Here is a list of functions in JSON format:
"""


def _as_json(tools: Sequence[Tool]) -> str:
    return json_instructions("\n".join(map(_json_function, tools)))


def json_instructions(functions: str) -> str:
    """The message around what `json_function` gives for each tool, a line break between them."""
    return f"{_JSON_HEAD}{functions}\n\nReturn function calls in JSON format."


def _json_function(tool: Tool) -> str:
    parameters = tool.parameters.items()
    return json_function(
        tool.name,
        tool.description,
        ",\n".join(json_property(name, one.description) for name, one in parameters),
        ", ".join(f'"{name}"' for name, one in parameters if one.required),
    )


# Descriptions stand between quotes unescaped, and every type is `object`: so in the original.
def json_function(name: str, description: str, properties: str, required: str) -> str:
    """A tool; `properties` as `json_property` gives them, `required` names in quotes."""
    return f"""\
{{
    "type": "function",
    "function": {{
        "name": "{name}",
        "description": "{description}",
        "parameters": {{
            "type": "object",
            "properties": [
{properties}
            ],
            "required": [{required}]
        }}
    }}
}}"""


def json_property(name: str, description: str) -> str:
    """A tool's parameter."""
    return f"""\
                {{
                    "{name}": {{
                        "type": "object",
                        "description": "{description}"
                    }}
                }}"""


_TAGS_TAIL = """\
Think very carefully before calling functions.
If you choose to call a function ONLY reply in the following format with no prefix or suffix:

<function=example_function_name>{"example_name": "example_value"}</function>

Reminder:
- If looking for real time information use relevant functions before falling back to brave_search
- Function calls MUST follow the specified format, start with <function= and end with </function>
- Required parameters MUST be specified
- Only call one function at a time
- Put the entire function call reply on one line"""


def _as_tags(tools: Sequence[Tool]) -> str:
    described = "".join(
        f"Use the function '{tool.name}' to '{tool.description}':\n{_tag_function(tool)}\n\n"
        for tool in tools
    )
    return f"You have access to the following functions:\n\n{described}{_TAGS_TAIL}"


def _tag_function(tool: Tool) -> str:
    parameters = {}
    for name, one in sorted(tool.parameters.items()):
        table = {"description": one.description, "param_type": one.type, "required": one.required}
        parameters[name] = table if one.default is None else {"default": one.default, **table}
    return json.dumps(
        {"name": tool.name, "description": tool.description, "parameters": parameters}
    )


_PYTHON_HEAD = """\
You are an expert in composing functions. You are given a question and a set of possible functions.
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the function can be used, point it out. If the given question lacks the parameters \
required by the function,
also point it out. You should only return the function call in tools call sections.

If you decide to invoke any of the function(s), you MUST put it in the format of \
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]
You SHOULD NOT include any other text in the response.

Here is a list of functions in JSON format that you can invoke.

"""


def _as_python(tools: Sequence[Tool]) -> str:
    listed = ",\n".join(textwrap.indent(_python_function(tool), " " * 4) for tool in tools)
    return f"{_PYTHON_HEAD}[\n{listed}\n]"


def _python_function(tool: Tool) -> str:
    properties = {name: _property(one) for name, one in tool.parameters.items()}
    required = [name for name, one in tool.parameters.items() if one.required]
    described = textwrap.indent(json.dumps(properties, indent=4), " " * 8).lstrip()
    return f"""\
{{
    "name": {json.dumps(tool.name)},
    "description": {json.dumps(tool.description)},
    "parameters": {{
        "type": "dict",
        "required": {json.dumps(required)},
        "properties": {described}
    }}
}}"""
