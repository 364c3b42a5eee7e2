"""`llama-jax generate` on models whose continuations are known: what it prints and refuses."""

import io
import json
import sys

import numpy as np
import pytest
from scripted_models import BYTE, CONFIG, scripted_source, write_run

from llama_jax.cli.main import main
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.gguf_writing import write_gguf
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.orbax import write_orbax
from llama_jax.tokenizers.chat import Message, make_chat_format

END = BYTE.special["<|end_of_text|>"]
EOT = BYTE.special["<|eot_id|>"]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '<|eot_id|>' }}" \
           "{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"  # fmt: skip
GREEDY = ["--temperature", "0"]
ZEPHYR = "data.sources.0.conversations.chat_format=zephyr"


@pytest.fixture(scope="module")
def source():
    # Plain texts go through the alphabet to an end; replies, which follow a line end, are "Bonjür".
    return scripted_source(
        ["abcdefgh", "<|end_of_text|>"],
        ["\n", "BONJÜR", "<|eot_id|>"],
        generation=GenerationDefaults(stop_ids=frozenset({END})),
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def hugging_face(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripted") / "hf"
    write_hugging_face(source, folder, tokenizer=BYTE)
    return folder


def generate(capsys, model, *options):
    code = main(["generate", "--model", str(model), *options])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured


def json_lines(capsys, model, *options):
    printed = generate(capsys, model, *options, "--json").out
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.short
def test_a_json_line_holds_ids_text_and_why_it_ended(hugging_face, capsys):
    (line,) = json_lines(capsys, hugging_face, "--prompt", "abc", *GREEDY)
    assert line == {
        "prompt_ids": [BYTE.bos_id, 97, 98, 99],
        "ids": [100, 101, 102, 103, 104],
        "text": "defgh",
        "finish_reason": "stop",
        "stop": END,
    }


@pytest.mark.parametrize("kind", ["gguf", "orbax", "run"])
def test_the_same_comes_out_of_other_formats(source, kind, tmp_path, capsys):
    model = tmp_path / f"scripted.{kind}"
    if kind == "gguf":
        write_gguf(source, model)
    elif kind == "orbax":
        write_orbax(source, model, tokenizer=BYTE)
    else:
        write_run(source, model)
    lines = json_lines(capsys, model, "--prompt", "abc", *GREEDY)
    assert [line["text"] for line in lines] == ["defgh"]


@pytest.mark.parametrize(
    "options",
    [["--set", "mesh.tensor=2", "--set", "mesh.fsdp=4"], ["--dtype", "bfloat16", "--platform",
                                                         "cpu"]],
)  # fmt: skip
def test_the_same_comes_out_of_another_mesh_and_dtype(hugging_face, options, capsys):
    lines = json_lines(capsys, hugging_face, "--prompt", "abc", *GREEDY, *options)
    assert [line["text"] for line in lines] == ["defgh"]


def test_a_length_ends_what_no_stop_does(hugging_face, capsys):
    (line,) = json_lines(capsys, hugging_face, "--prompt", "a", *GREEDY, "--max-new-tokens", "5")
    assert (line["text"], line["finish_reason"], line["stop"]) == ("bcdef", "length", None)
    (line,) = json_lines(capsys, hugging_face, "--prompt", "abcdefgh", *GREEDY)
    assert (line["ids"], line["finish_reason"]) == ([], "stop")


def test_a_stop_text_is_cut_off(hugging_face, capsys):
    (line,) = json_lines(capsys, hugging_face, "--prompt", "a", *GREEDY, "--stop", "ef")
    assert (line["text"], line["finish_reason"], line["stop"]) == ("bcd", "stop", "ef")


def test_one_completion_is_shown_behind_its_prompt(hugging_face, capsys):
    printed = generate(capsys, hugging_face, "--prompt", "abc", *GREEDY)
    assert printed.out == "abcdefgh\n"
    assert printed.err.splitlines()[-1] == "[stop, 5 tokens]"


def test_several_are_shown_apart(hugging_face, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n\nef\n")
    options = ["--prompts", str(prompts), "--n", "2", *GREEDY, "--max-new-tokens", "4"]
    assert generate(capsys, hugging_face, *options).out == (
        "--- prompt 1 of 2, sample 1 of 2: length ---\nabcdefg\n"
        "--- prompt 1 of 2, sample 2 of 2: length ---\nabcdefg\n"
        "--- prompt 2 of 2, sample 1 of 2: stop ---\nefgh\n"
        "--- prompt 2 of 2, sample 2 of 2: stop ---\nefgh\n"
    )


def test_logprobs_are_given_for_each_token(hugging_face, capsys):
    options = ["--prompt", "abc", *GREEDY, "--logprobs"]
    (line,) = json_lines(capsys, hugging_face, *options)
    assert len(line["logprobs"]) == len(line["ids"]) == 5
    np.testing.assert_allclose(line["logprobs"], 0.0, atol=1e-3)
    printed = generate(capsys, hugging_face, *options).out
    assert [row.split()[1] for row in printed.splitlines()[2:]] == ["'d'", "'e'", "'f'", "'g'",
                                                                    "'h'"]  # fmt: skip


def test_a_chat_uses_the_models_template_with_one_bos_and_its_stops(hugging_face, capsys):
    options = ["--chat", "--prompt", "Hi", "--system", "S", *GREEDY]
    (line,) = json_lines(capsys, hugging_face, *options)
    text = "<|begin_of_text|>system: S<|eot_id|>user: Hi<|eot_id|>\n"
    assert BYTE.decode(line["prompt_ids"]) == text
    assert (line["text"], line["stop"]) == ("BONJÜR", EOT)
    assert line["message"] == {"role": "assistant", "content": "BONJÜR"}
    shown = generate(capsys, hugging_face, *options).out
    assert shown == "system: S\n\nuser: Hi\n\nBONJÜR\n"


def test_a_chat_format_can_be_named(hugging_face, capsys):
    options = ["--chat", "--chat-format", "llama3", "--prompt", "Hi", *GREEDY]
    (line,) = json_lines(capsys, hugging_face, *options)
    chat = make_chat_format(BYTE, name="llama3")
    wanted = chat.encode([Message("user", "Hi")], add_generation_prompt=True).ids
    assert line["prompt_ids"] == wanted


def test_a_run_is_asked_in_the_format_that_its_records_name(source, tmp_path, capsys):
    write_run(source, tmp_path / "run", "debug/sft", [ZEPHYR])
    options = ["--chat", "--prompt", "Hi", *GREEDY]
    (line,) = json_lines(capsys, tmp_path / "run", *options)
    text = "<|begin_of_text|><|user|>\nHi<|end_of_text|>\n<|assistant|>\n"
    assert BYTE.decode(line["prompt_ids"]) == text
    (line,) = json_lines(capsys, tmp_path / "run", "--chat-format", "llama3", *options)
    assert BYTE.decode(line["prompt_ids"]).startswith("<|begin_of_text|><|start_header_id|>user")


@pytest.mark.parametrize(("settings", "ends"), [((), {EOT, END}), ((ZEPHYR,), {END})])
def test_what_a_run_is_written_as_is_asked_and_stops_as_the_run(
    source, tmp_path, capsys, settings, ends
):
    write_run(source, tmp_path / "run", "debug/sft", settings)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "hf"), "--to", "hf"]) == 0
    assert "a chat template was written for the" in capsys.readouterr().out
    options = ["--chat", "--prompt", "Hi", "--system", "S", *GREEDY]
    (by_run,), (by_copy,) = (
        json_lines(capsys, tmp_path / name, *options) for name in ("run", "hf")
    )
    assert by_run == by_copy
    told = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert ends <= set(told if isinstance(told, list) else [told])


def test_json_lines_of_messages_are_conversations(hugging_face, monkeypatch, capsys):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"}]  # fmt: skip
    entries = [{"messages": messages}, {"prompt": "ab"}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(map(json.dumps, entries))))
    talk, plain = json_lines(capsys, hugging_face, "--prompts", "-", *GREEDY)
    assert talk["text"] == "BONJÜR"
    assert "assistant: b<|eot_id|>user: c" in BYTE.decode(talk["prompt_ids"])
    assert plain["text"] == "cdefgh"
    assert "message" not in plain


def test_samples_differ_by_seed_alone(tmp_path, capsys):
    from in_memory import random_source

    folder = tmp_path / "random"
    write_hugging_face(random_source(CONFIG), folder, tokenizer=BYTE)
    options = ["--temperature", "1", "--max-new-tokens", "8", "--prompt", "ab"]
    three = json_lines(capsys, folder, *options, "--n", "3")
    assert len({tuple(line["ids"]) for line in three}) == 3
    again = json_lines(capsys, folder, *options, "--n", "3", "--batch-size", "1")
    assert again == three
    other = json_lines(capsys, folder, *options, "--seed", "1")
    assert other[0]["ids"] not in [line["ids"] for line in three]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], 2, "temperature"),
        (["--prompt", "a", "--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["--prompt", "a", "--n", "0"], 2, "--n: at least 1"),
        (["--prompt", "a", "--system", "s"], 2, "--system: needs --chat"),
        (["--prompt", "a", "--chat-format", "llama3"], 2, "--chat-format: needs --chat"),
        (["--prompt", "a", "--chat", "--chat-format", "lama3"], 2, "did you mean 'llama3'?"),
        (["--prompts", "absent.txt"], 2, "absent.txt: No such file"),
        (["--prompt", "a" * 600], 2, "prompt 1 has 601 tokens; the model's context is 512"),
        (["--prompt", "a", "--set", "mesh.tenso=2"], 2, "did you mean 'tensor'?"),
        (["--prompt", "a", "--set", "model.embed_dim=2"], 2, "unknown key"),
        (["--prompt", "a", "--set", "mesh.tensor=7"], 2, "8 devices"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_code(hugging_face, capsys, options, code, message):
    assert main(["generate", "--model", str(hugging_face), *options]) == code
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("llama-jax: error: ")
    assert message in last
    assert captured.out == ""


def test_a_model_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path / "no"), "--prompt", "a"]) == 1
    assert "no: no such file or folder" in capsys.readouterr().err
