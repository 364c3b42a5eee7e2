"""Tools out of the JSON forms that are about: nothing that they say is lost, nothing crashes."""

import pytest

from llama_jax.tokenizers.chat import ChatError
from llama_jax.tokenizers.chat.tools import tool_from_schema, tool_instructions

CITY = {"type": "string", "description": "where", "enum": ["Rome", "Oslo"]}


def with_parameters(parameters):
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def test_choices_and_nested_types_reach_templates_as_they_were():
    points = {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}}
    schema = with_parameters({"type": "object", "properties": {"city": CITY, "points": points}})
    assert tool_from_schema(schema).to_schema() == schema
    assert tool_from_schema(schema["function"]).to_schema() == schema


def test_parameters_without_their_frame_are_parameters():
    bare, framed = (
        tool_from_schema(with_parameters(one))
        for one in ({"city": CITY, "type": {"type": "int"}},
                    {"properties": {"city": CITY, "type": {"type": "int"}}})
    )  # fmt: skip
    assert bare.parameters == framed.parameters
    assert list(bare.parameters) == ["city", "type"]
    assert not tool_from_schema(with_parameters({"type": "object"})).parameters


def test_absent_parts_may_be_null():
    no_words = {"type": "string", "description": None}
    table = {"type": "object", "properties": {"a": no_words}, "required": None}
    tool = tool_from_schema(with_parameters(table))
    assert not tool.parameters["a"].required
    assert "None" not in tool_instructions([tool], "json")
    assert not tool_from_schema(with_parameters({"properties": None})).parameters


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ("f", "a tool needs a 'name', got 'f'"),
        ({"function": None}, "a tool needs a 'name'"),
        (with_parameters([1]), "the parameters of tool 'f' have no 'properties' object"),
        (with_parameters({"properties": [1]}), "the parameters of tool 'f' have no 'properties'"),
        (with_parameters({"properties": {"a": True}}), "parameter 'a' of tool 'f' is not an"),
        (with_parameters({"properties": {}, "required": True}), "'required' of tool 'f' is not a"),
    ],
)
def test_another_form_is_an_error_that_names_the_tool(schema, complaint):
    with pytest.raises(ChatError, match=complaint):
        tool_from_schema(schema)
