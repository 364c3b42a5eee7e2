"""Preferences out of records' fields: ranked responses, `chosen` and `rejected`, or one response.

{"prompt": ..., "responses": [{"content": ..., "model": ...}, ...], "ranking": [1, 0],
 "strength": "slightly", "edited": ...}, {"prompt": ..., "chosen": ..., "rejected": ...} or, of a
single response, desirable or not, {"prompt": ..., "completion": ..., "label": true}, where a prompt
is a text or messages, and a response a text, a message or messages.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from llama_jax.config.data import STRENGTHS, Strength
from llama_jax.config.loading import nearest
from llama_jax.data.message_forms import (
    any_messages,
    check_messages,
    openai_messages,
    prompt_messages,
    sharegpt_messages,
    tools_of,
    with_system,
)
from llama_jax.data.reading import type_name
from llama_jax.data.record_files import Record
from llama_jax.data.records import Preference, RecordError, Response, Role, ranked
from llama_jax.tokenizers.chat import ChatError, Message, message_from_json

_Form = Callable[[Mapping[str, Any]], tuple[list[Message], list[Response]]]

# As people write them, after "better" is taken off the end; Llama 2's weakest is "negligibly".
_SPELLINGS: dict[str, Strength] = {
    **{strength: strength for strength in get_args(Strength)},
    "": "better",
    "significant": "significantly",
    "slight": "slightly",
    "marginal": "marginally",
    "negligibly": "marginally",
}


def is_preference(fields: Mapping[str, Any]) -> bool:
    """Whether a record has the fields of one with several responses."""
    return "responses" in fields or {"chosen", "rejected"} <= fields.keys()


def is_unpaired(fields: Mapping[str, Any]) -> bool:
    """Whether a record is a single response with a label (TRL's unpaired preferences)."""
    return not is_preference(fields) and {"completion", "label"} <= fields.keys()


def to_preference(record: Record, *, strength: Strength) -> Preference:
    """The preference of a record.

    Args:
      record: of any form.
      strength: of a record that doesn't say.

    Raises:
      RecordError: what is wrong with it.
    """
    fields = record.fields
    prompt, responses = _form_of(fields)(fields)
    prompt = with_system(fields, prompt)
    check_messages(prompt)
    if not prompt or prompt[-1].role not in ("user", "tool"):
        raise RecordError("bad_message", "a prompt ends with the user's message or a tool's")
    steps = _steps(fields.get("strength"), len(responses) - 1, strength)
    if fields.get("edited") is not None:
        responses.append(_response(fields["edited"], "edited", "edited"))
    _check_responses(responses)
    pairs = ranked(responses, steps)
    return Preference(
        tuple(prompt), tuple(responses), pairs, tools_of(fields), record.file, record.line
    )


def _form_of(fields: Mapping[str, Any]) -> _Form:
    if is_unpaired(fields):
        return _unpaired_form
    if not is_preference(fields):
        detail = "neither responses, nor chosen and rejected, nor completion and label"
        raise RecordError("unknown_form", detail + nearest("responses", list(fields)))
    return _ranked_form if "responses" in fields else _pair_form


def _unpaired_form(fields: Mapping[str, Any]) -> tuple[list[Message], list[Response]]:
    label = fields["label"]
    if not isinstance(label, bool):
        raise RecordError("wrong_type", f"'label' is {type_name(label)}, not true or false")
    for name in ("strength", "edited"):
        if fields.get(name) is not None:
            raise RecordError("bad_ranking", f"'{name}' has no meaning for a single response")
    if "prompt" not in fields:
        others = sorted(fields.keys() - {"completion", "label"})
        near = nearest("prompt", others) if others else ""
        raise RecordError("missing_field", f"no 'prompt'{near}")
    role, model = "chosen" if label else "rejected", str(fields.get("model", ""))
    response = _response(fields["completion"], role, "completion", model)
    return prompt_messages(fields["prompt"], "prompt"), [response]


def _ranked_form(fields: Mapping[str, Any]) -> tuple[list[Message], list[Response]]:
    given = fields["responses"]
    if not isinstance(given, list) or len(given) < 2:
        raise RecordError("bad_ranking", "at least two 'responses' are needed")
    if "prompt" not in fields:
        raise RecordError("missing_field", f"no 'prompt'{nearest('prompt', list(fields))}")
    order = fields.get("ranking")
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(
        map(str, range(len(given)))
    ):
        raise RecordError(
            "bad_ranking",
            f"'ranking' is {order!r}; wanted are the numbers 0 to {len(given) - 1}, best first",
        )
    responses = [
        _response(given[int(n)], "rejected" if rank else "chosen", f"responses[{n}]")
        for rank, n in enumerate(order)
    ]
    return prompt_messages(fields["prompt"], "prompt"), responses


def _pair_form(fields: Mapping[str, Any]) -> tuple[list[Message], list[Response]]:
    chosen, rejected = fields["chosen"], fields["rejected"]
    if _is_whole(chosen) and _is_whole(rejected):
        prompt, chosen, rejected = _common_prompt(fields, chosen, rejected)
    elif "prompt" in fields:
        prompt = prompt_messages(fields["prompt"], "prompt")
    else:
        raise RecordError("missing_field", f"no 'prompt'{nearest('prompt', list(fields))}")
    models = (str(fields.get(f"{role}_model", "")) for role in ("chosen", "rejected"))
    return prompt, [
        _response(value, role, role, model)
        for value, role, model in zip(
            (chosen, rejected), ("chosen", "rejected"), models, strict=True
        )
    ]


def _is_whole(value: Any) -> bool:
    """Whether it is a conversation, prompt included: messages that begin before the assistant's."""
    if not isinstance(value, list) or not value:
        return False
    return any_messages(value[:1], "chosen")[0].role != "assistant"


def _common_prompt(
    fields: Mapping[str, Any], chosen: Any, rejected: Any
) -> tuple[list[Message], list[Message], list[Message]]:
    """What both conversations begin with, and how each goes on."""
    left, right = any_messages(chosen, "chosen"), any_messages(rejected, "rejected")
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    if common == len(left) == len(right):
        raise RecordError("identical_responses", "chosen and rejected")
    prompt = left[:common]
    said = prompt_messages(fields["prompt"], "prompt") if fields.get("prompt") else []
    if any(one.content not in [message.content for message in prompt] for one in said):
        raise RecordError("bad_message", "'prompt' is not among the messages of both responses")
    return prompt, left[common:], right[common:]


def _response(value: Any, role: Role, name: str, model: str = "") -> Response:
    if isinstance(value, Mapping):
        model = str(value.get("model", model))
    messages = _reply(value, name)
    if not messages:
        raise RecordError("empty_response", name)
    for message in messages:
        if message.role not in ("assistant", "tool"):
            detail = f"{name}: a response has the assistant's messages, not the {message.role}'s"
            raise RecordError("bad_message", detail)
    if messages[0].role != "assistant" or messages[-1].role != "assistant":
        raise RecordError("bad_message", f"{name}: the assistant begins and ends a response")
    if any(not m.content.strip() and not m.tool_calls for m in messages if m.role != "tool"):
        raise RecordError("empty_response", name)
    return Response(tuple(messages), role, model)


def _reply(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        return [Message("assistant", value)]
    if isinstance(value, list):
        if all(isinstance(message, Message) for message in value):
            return list(value)
        return any_messages(value, name)
    if not isinstance(value, Mapping):
        raise RecordError("wrong_type", f"'{name}' is {type_name(value)}")
    if "messages" in value:
        return openai_messages(value["messages"])
    if "from" in value:
        return sharegpt_messages([value])
    keys = ("content", "text", "response", "tool_calls", "function_call")
    if not any(key in value for key in keys):
        raise RecordError("missing_field", f"{name} has no 'content'{nearest('content', [*value])}")
    text = next((value[key] for key in keys[:3] if key in value), None)
    try:
        return [message_from_json({"role": "assistant", **value, "content": text})]
    except ChatError as error:
        raise RecordError("bad_message", f"{name}: {error}") from None


def _steps(given: Any, count: int, strength: Strength) -> list[Strength]:
    if given is None or given == "":
        return [strength] * count
    words = given if isinstance(given, list) else [given] * count
    if len(words) != count:
        detail = f"{len(words)} strengths for the {count} steps of the ranking"
        raise RecordError("bad_ranking", detail)
    return [_strength(word) for word in words]


def _strength(word: Any) -> Strength:
    said = word.strip().lower() if isinstance(word, str) else ""
    spelled = said.removesuffix("better").strip()
    if not said or spelled not in _SPELLINGS:
        known = nearest(str(word), list(STRENGTHS))
        raise RecordError("bad_ranking", f"unknown strength {word!r}{known}")
    return _SPELLINGS[spelled]


def _check_responses(responses: Sequence[Response]) -> None:
    names = ["edited" if r.role == "edited" else str(i) for i, r in enumerate(responses, 1)]
    seen: dict[tuple[Any, ...], str] = {}
    for name, response in zip(names, responses, strict=True):
        if response.content in seen:
            detail = f"responses {seen[response.content]} and {name} by rank"
            raise RecordError("identical_responses", detail)
        seen[response.content] = name
