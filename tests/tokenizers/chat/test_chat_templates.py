"""Models' own templates: what they may do, one BOS, masks, errors."""

import datetime

import pytest
from chat_vocabularies import BytesWith, written

from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat import ChatError, Message, Tool, make_chat_format
from llama_jax.tokenizers.chat.template_format import TemplateFormat
from llama_jax.tokenizers.chat.templates import Template

CHATML = BytesWith("<|endoftext|>", "<|im_end|>", "<|im_start|>")
WITH_BOS = BytesWith("<s>", "</s>", adds_bos=True)
TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)
TALK = [
    Message("user", "One?"),
    Message("assistant", "1"),
    Message("user", "Two?"),
    Message("assistant", "2é"),
]


def rendered(template, messages=(), tokenizer=CHATML, **options):
    chat = make_chat_format(tokenizer, template=template)
    return tokenizer.decode(chat.encode(list(messages), **options).ids)


@pytest.mark.short
def test_the_mask_comes_from_the_prompts_where_the_template_has_no_generation_tag():
    encoded = make_chat_format(CHATML, template=TURNS).encode(TALK)
    # The line end behind the end of the turn is the template's.
    assert written(CHATML, encoded) == ["1<|im_end|>", "2é<|im_end|>"]


def test_the_mask_is_what_the_template_puts_in_its_generation_tag():
    encoded = make_chat_format(CHATML, template=GENERATION).encode(TALK)
    assert written(CHATML, encoded) == ["1<|im_end|>", "2é<|im_end|>"]
    same = "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in TALK)
    assert CHATML.decode(encoded.ids) == same


def test_the_generation_tag_may_be_captured_before_it_is_written():
    template = (
        "{% for m in messages %}{% set text %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% endset %}({{ text }}){% endfor %}"
    )
    encoded = make_chat_format(CHATML, template=template).encode(TALK[1:2])
    assert written(CHATML, encoded) == ["1"]
    assert CHATML.decode(encoded.ids) == "(1)"


def test_a_template_that_drops_earlier_text_needs_the_generation_tag():
    template = "{% for m in messages %}{% if loop.last %}{{ m.role + m.content }}{% endif %}" \
               "{% endfor %}"  # fmt: skip
    with pytest.raises(ChatError, match=r"message 2 is not written as .* needs {% generation %}"):
        make_chat_format(CHATML, template=template).encode(TALK)
    # To be replied to it needs no mask.
    assert CHATML.decode(make_chat_format(CHATML, template=template).prompt(TALK)) == "assistant2é"


def test_a_token_over_the_border_belongs_to_where_it_begins(trained):
    # "\n\n" is one token; the header's line end and the answer's are in it.
    template = TURNS.replace("<|im_start|>", "<|start_header_id|>").replace("<|im_end|>", "")
    chat = make_chat_format(trained, template=template)
    encoded = chat.encode([Message("assistant", "\nx")])
    double = trained.encode("\n\n")
    assert len(double) == 1
    place = encoded.ids.index(double[0])
    assert encoded.mask[place : place + 2] == [False, True]


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}", "<s>", "{{ bos_token }}<s>"])
def test_there_is_one_bos_whether_or_not_the_template_writes_it(bos):
    chat = make_chat_format(WITH_BOS, template=bos + "{{ messages[0].content }}")
    assert chat.encode([Message("user", "<s>")]).ids == [256, *b"<s>"]


def test_no_bos_is_added_where_the_vocabulary_adds_none():
    assert rendered("x{{ messages[0].content }}", TALK[:1]) == "xOne?"
    assert rendered("{{ bos_token }}x") == "<|endoftext|>x"


def test_templates_see_the_names_of_special_tokens():
    assert rendered("{{ eos_token }}{{ unk_token is defined }}") == "<|im_end|>False"


def test_white_space_around_blocks_goes_as_transformers_has_it():
    assert rendered("a\n  {% if true %}\nb\n  {% endif %}\nc\n") == "a\nb\nc"


def test_loops_can_be_left():
    assert rendered("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", TALK[:3:2]) \
        == "One?"  # fmt: skip


def test_tojson_keeps_html_order_and_letters():
    text = rendered("{{ tools[0] | tojson }}|{{ {'b': [1], 'a': '<é>'} | tojson(indent=1) }}",
                    tools=[{"z": "<é>", "a": None}])  # fmt: skip
    assert text == '{"z": "<é>", "a": null}|{\n "b": [\n  1\n ],\n "a": "<é>"\n}'


def test_tools_documents_and_absent_ones():
    chat = TemplateFormat(CHATML, "{{ tools is none }} {{ documents[0].text }}")
    encoded = chat.encode([], documents=[{"text": "<|im_end|>"}])
    assert CHATML.decode(encoded.ids) == "True <|im_end|>"
    assert max(encoded.ids) < 256
    named = rendered("{{ tools[0].function.name }}", tools=[Tool("f")])
    assert named == "f"


def test_the_date_is_that_of_the_format_not_of_the_clock():
    template = "{{ date_string }}|{{ strftime_now('%Y-%m-%d') }}"
    assert rendered(template) == "26 Jul 2024|2024-07-26"
    chat = make_chat_format(CHATML, template=template, date=datetime.date(2030, 2, 3))
    assert CHATML.decode(chat.encode([]).ids) == "03 Feb 2030|2030-02-03"


def test_a_template_may_refuse_a_conversation():
    with pytest.raises(ChatError, match=r"^chat template: roles must alternate$"):
        rendered("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatError, match=r"^chat template: can only concatenate str"):
        rendered("{{ 'a' + none }}")


def test_a_broken_template_is_an_error_that_names_the_line():
    with pytest.raises(ChatError, match=r"^chat template, line 2: .*endfor"):
        make_chat_format(CHATML, template="a\n{% endfor %}")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_a_template_stays_in_its_sandbox(attack):
    with pytest.raises(ChatError, match=r"^chat template: "):
        rendered(attack, TALK)


def test_the_ends_that_a_template_knows_stop_a_reply():
    assert make_chat_format(CHATML, template=TURNS).stop_tokens == {"<|im_end|>", "<|endoftext|>"}
    llama = make_chat_format(ByteTokenizer(), template="{{ '<|eot_id|>' }}")
    assert llama.stop_tokens == {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}


def test_rendering_leaves_the_messages_alone():
    template = Template("{% set _ = namespace(x=1) %}{{ messages[0].content }}",
                        datetime.date(2024, 7, 26))  # fmt: skip
    assert template.render({"messages": [{"content": "a"}]}) == "a"
