"""How calls of tools are written in an assistant's message; `parsing` reads them back."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.tokenizers.chat.message import ChatError, ToolCall
from llama_jax.tokenizers.chat.tools import CODE_INTERPRETER, SEARCH_TOOLS, ToolFormat


def write_calls(calls: Sequence[ToolCall], tool_format: ToolFormat) -> list[str]:
    """Each call's text, as Llama 3's reference writes it; pythonic calls share one list."""
    if tool_format == "python_list" and not any(_is_builtin(call) for call in calls):
        return [f"[{', '.join(map(_python_call, calls))}]"] if calls else []
    return [_write_call(call, tool_format) for call in calls]


def write_tool_call_block(calls: Sequence[ToolCall]) -> str:
    """SmolLM2's form: a JSON list between `<tool_call>` tags."""
    listed = [{"name": call.name, "arguments": dict(call.arguments)} for call in calls]
    return f"<tool_call>{json.dumps(listed, ensure_ascii=False)}</tool_call>"


def _is_builtin(call: ToolCall) -> bool:
    return call.name == CODE_INTERPRETER or call.name in SEARCH_TOOLS


def _write_call(call: ToolCall, tool_format: ToolFormat) -> str:
    if call.name == CODE_INTERPRETER:
        return str(_argument(call, "code"))
    if call.name in SEARCH_TOOLS:
        # A quote in the query stays as it is: so in the reference.
        return f'{call.name}.call(query="{_argument(call, "query")}")'
    writers: Mapping[str, Callable[[ToolCall], str]] = {
        "json": _json_call,
        "function_tag": _tag_call,
        "python_list": lambda call: f"[{_python_call(call)}]",
    }
    return writers[tool_format](call)


def _argument(call: ToolCall, name: str) -> Any:
    if name not in call.arguments:
        raise ChatError(f"a call of {call.name} needs the argument '{name}'")
    return call.arguments[name]


def _json_call(call: ToolCall) -> str:
    table = {"type": "function", "name": call.name, "parameters": dict(call.arguments)}
    return json.dumps(table)


def _tag_call(call: ToolCall) -> str:
    return f"<function={call.name}>{json.dumps(dict(call.arguments))}</function>"


def _python_call(call: ToolCall) -> str:
    written = ", ".join(f"{name}={_python_value(v)}" for name, v in call.arguments.items())
    return f"{call.name}({written})"


def _python_value(value: Any) -> str:
    if isinstance(value, str):
        # In double quotes as the reference has them, and, unlike there, readable with any content.
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_python_value, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{_python_value(key)}: {_python_value(v)}" for key, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    return str(value)
