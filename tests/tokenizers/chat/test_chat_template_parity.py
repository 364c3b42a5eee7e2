"""Templates give the ids and masks of transformers' own `apply_chat_template`."""

import pytest

from llama_jax.tokenizers.chat import Message, ToolCall, make_chat_format, message_to_json

transformers = pytest.importorskip("transformers")

# In the manner of Llama 3.1's: dates, tools, built-in calls, trimming. Written for this test.
LLAMA31 = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0].role == "system" %}
    {%- set told = messages[0].content | trim %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set told = "" %}
    {%- set rest = messages %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is defined and tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is defined and tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- told + "<|eot_id|>" }}
{%- for message in rest %}
    {%- if message.role == "tool" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {{- message.content | tojson if message.content is mapping else message.content }}
        {{- "<|eot_id|>" }}
    {%- elif message.tool_calls is defined %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" }}
        {%- if message.role == "assistant" %}
            {%- generation %}{{- message.content | trim }}{{- "<|eot_id|>" }}{%- endgeneration %}
        {%- else %}
            {{- message.content | trim + "<|eot_id|>" }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_"
    "start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>"
    "\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>"
    "' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CALL = ToolCall("add", {"a": 1, "b": ["é", None]})
SCHEMA = {"type": "function", "function": {"name": "add", "description": "Adds <numbers>",
          "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}  # fmt: skip
DIALOGS = [
    [Message("user", "Hello there")],
    [Message("system", " Be brief.\n"), Message("user", "\nWho? "), Message("assistant", " Me.\n")],
    [Message("user", "a"), Message("assistant", "The fox\n\n"), Message("user", "12345 Việt 🙂")],
    [Message("user", "1+1"), Message("assistant", "", (CALL,)), Message("tool", '{"x": 2}'),
     Message("assistant", "2")],
]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def apply(theirs, template, messages, **options):
    tables = [message_to_json(message) for message in messages]
    return theirs.apply_chat_template(
        tables, chat_template=template, tokenize=True, return_dict=True, **options
    )


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, [SCHEMA]])
@pytest.mark.parametrize("dialog", DIALOGS, ids=lambda d: f"{len(d)} messages")
def test_a_template_of_llama31s_kind_gives_transformers_ids(trained, theirs, dialog, tools, prompt):
    chat = make_chat_format(trained, template=LLAMA31)
    ours = chat.encode(dialog, tools=tools or (), add_generation_prompt=prompt)
    wanted = apply(theirs, LLAMA31, dialog, tools=tools, add_generation_prompt=prompt)
    assert ours.ids == wanted["input_ids"]


@pytest.mark.parametrize("dialog", DIALOGS[:3], ids=lambda d: f"{len(d)} messages")
def test_the_mask_of_the_generation_tag_is_transformers_mask(trained, theirs, dialog):
    ours = make_chat_format(trained, template=LLAMA31).encode(dialog)
    wanted = apply(theirs, LLAMA31, dialog, return_assistant_tokens_mask=True)
    assert ours.mask == [bool(m) for m in wanted["assistant_masks"]]


@pytest.mark.parametrize("dialog", DIALOGS[:3], ids=lambda d: f"{len(d)} messages")
def test_smollm2s_template_gives_transformers_text(trained, theirs, dialog):
    # Its marks are no special tokens of this vocabulary; as text they are the same for both.
    ours = make_chat_format(trained, template=SMOLLM2).encode(dialog, add_generation_prompt=True)
    wanted = apply(theirs, SMOLLM2, dialog, add_generation_prompt=True)
    # The vocabulary's prompts begin with BOS, and this template doesn't write it.
    assert ours.ids == [trained.bos_id, *wanted["input_ids"]]
