"""An assistant's reply to content, the reason it stopped, and the calls of tools in it.

Reads what Llama 3.1 and 3.2 write (JSON, function tags, pythonic lists, built-in tools, code after
`<|python_tag|>`), and the `<tool_call>` blocks of SmolLM2. What isn't exactly a call is content.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llama_jax.tokenizers.chat.message import Message, ToolCall
from llama_jax.tokenizers.chat.tools import CODE_INTERPRETER, SEARCH_TOOLS

StopReason = Literal["end_of_turn", "end_of_message"]

_HEADERS = (
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|im_start|>assistant\n",
    "<|assistant|>\n",
)
_ENDS: Mapping[str, StopReason] = {
    "<|eom_id|>": "end_of_message",
    "<|eot_id|>": "end_of_turn",
    "<|end_of_text|>": "end_of_turn",
    "<|im_end|>": "end_of_turn",
    "<|endoftext|>": "end_of_turn",
    "</s>": "end_of_turn",
}
_PYTHON_TAG = "<|python_tag|>"
_FUNCTION_TAG = re.compile(r"<function=([^>{}]+)>(\{.*?\})(?:</function>|\s*\Z)", re.DOTALL)
_TOOL_CALL_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_DECODER, _GAP = json.JSONDecoder(), re.compile(r"[\s;]*")
_BUILTIN_CALL = re.compile(r'\b(\w+)\.call\(query="([^"]*)"\)')


@dataclass(frozen=True)
class Reply:
    """What an assistant's text says; with calls the content is what stands beside them."""

    content: str
    stop_reason: StopReason
    tool_calls: tuple[ToolCall, ...] = ()

    def to_message(self) -> Message:
        """The reply as a message of the conversation."""
        ends = "message" if self.stop_reason == "end_of_message" else "turn"
        return Message("assistant", self.content, self.tool_calls, ends)


def parse_reply(text: str, *, stop: str | None = None, parallel: bool = True) -> Reply:
    """Read a reply, with or without its header and its end token.

    Args:
      text: what the model wrote.
      stop: the end token that generation removed, where it ended by one.
      parallel: read every call of the text; the reference keeps the first alone.
    """
    text = text.strip(" ")
    for header in _HEADERS:
        text = text.removeprefix(header)
    is_code = text.startswith(_PYTHON_TAG)
    text = text.removeprefix(_PYTHON_TAG)
    reason = _ENDS.get(stop or "", "end_of_turn")
    for end, meaning in _ENDS.items():
        if text.endswith(end):
            text, reason = text.removesuffix(end), meaning
            break
    content, calls = _find_calls(text)
    if not calls and is_code:
        return Reply("", reason, (ToolCall(CODE_INTERPRETER, {"code": text}),))
    return Reply(content, reason, tuple(calls if parallel else calls[:1]))


def _find_calls(text: str) -> tuple[str, list[ToolCall]]:
    """(content beside the calls, calls): the first form that matches decides."""
    for find in (_tag_calls, _block_calls, _json_calls, _python_calls, _builtin_calls):
        calls = find(text)
        if calls:
            beside = _TOOL_CALL_BLOCK.sub("", text).strip() if find is _block_calls else ""
            return beside, [_as_builtin(call) for call in calls]
    return text, []


def _tag_calls(text: str) -> list[ToolCall]:
    calls = [_call_of(name, _load_json(args)) for name, args in _FUNCTION_TAG.findall(text)]
    return [call for call in calls if call is not None]


def _block_calls(text: str) -> list[ToolCall]:
    calls = []
    for block in _TOOL_CALL_BLOCK.findall(text):
        found = _load_json(block)
        for entry in found if isinstance(found, list) else [found]:
            calls.append(_call_of_table(entry))
    return [call for call in calls if call is not None]


def _json_calls(text: str) -> list[ToolCall]:
    """Objects one after the other, as parallel calls are written; `;` may part them."""
    calls = [_call_of_table(table) for table in _json_values(text)]
    return [call for call in calls if call is not None] if None not in calls else []


def _json_values(text: str) -> list[Any]:
    """The values that make up the whole text; none where something else stands among them."""
    values, place = [], _past_gap(text, 0)
    while place < len(text):
        try:
            value, place = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return []
        values.append(value)
        place = _past_gap(text, place)
    return values


def _past_gap(text: str, place: int) -> int:
    gap = _GAP.match(text, place)
    return gap.end() if gap else place


def _python_calls(text: str) -> list[ToolCall]:
    """`[f(a=1), g(b='x')]`: keyword arguments that are literals, and nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in a model's text are none of ours
            tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        return [_python_call(node) for node in tree.elts]
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []


def _python_call(node: ast.expr) -> ToolCall:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.args:
        raise ValueError("not a call with keyword arguments alone")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("a call with **")
        arguments[keyword.arg] = ast.literal_eval(keyword.value)
    return ToolCall(node.func.id, arguments)


def _builtin_calls(text: str) -> list[ToolCall]:
    match = _BUILTIN_CALL.search(text)
    return [ToolCall(match[1], {"query": match[2]})] if match else []


def _call_of_table(table: Any) -> ToolCall | None:
    """A call from `{"name", "parameters" or "arguments"}`; other JSON is content."""
    if not isinstance(table, Mapping):
        return None
    named = table.get("parameters", table.get("arguments"))
    if named is None and table.get("type") == "function":
        named = {}
    return _call_of(table.get("name"), named)


def _call_of(name: Any, arguments: Any) -> ToolCall | None:
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        return None
    return ToolCall(name, arguments)


def _as_builtin(call: ToolCall) -> ToolCall:
    """A built-in tool called in another form, whatever its argument was called there."""
    values = list(call.arguments.values())
    if call.name in SEARCH_TOOLS and values:
        return ToolCall(call.name, {"query": values[0]})
    return call


def _load_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
