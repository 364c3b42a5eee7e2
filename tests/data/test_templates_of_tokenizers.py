"""The chat template that lies with a run's tokenizer is how its records are written."""

import dataclasses
import json

import pytest
from chat_bytes import CHATML, LLAMA2, data_config, lines, marked, opened, said

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError, to_table, to_toml
from llama_jax.config.run import TokenizerFile
from llama_jax.data.sources import open_documents, open_tokenizer
from llama_jax.interchange.run_checkpoint import RunCheckpoint
from llama_jax.interchange.tensors import InterchangeError
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.chat import make_chat_format
from llama_jax.tokenizers.chat.template_files import find_chat_template
from llama_jax.tokenizers.tokenizer import TokenizerError
from llama_jax.training.samples import _chat_prompt

# As SmolLM2's: a system message of its own where a conversation has none.
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|start_header_id|>system"
    "<|end_header_id|>\n\nI am Tiny.<|eot_id|>{% endif %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TOLD = "system\n\nI am Tiny.user\n\nHi"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's folder, as far as a tokenizer goes."""
    ByteTokenizer().save(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "checkpoint"


def run_config(tmp_path, folder, *settings):
    path = lines(tmp_path / "c.jsonl", [said("Hi", "Hello")])
    config = load_run_config("debug/sft", [f"data.sources.0.conversations.path={path}", *settings])
    return dataclasses.replace(config, tokenizer=TokenizerFile(str(folder)))


def written(config, run_dir):
    """The first example as text, and what is trained on."""
    tokenizer = open_tokenizer(config, run_dir)
    example = opened(config.data, run_dir, tokenizer=tokenizer).read([0])[0]
    return tokenizer.decode(example.tokens.tolist(), skip_special=True), marked(tokenizer, example)


def test_records_are_written_by_the_template_that_lies_with_the_tokenizer(tmp_path, folder):
    config = run_config(tmp_path, folder)
    text, trained_on = written(config, tmp_path / "run")
    assert text == f"{TOLD}assistant\n\nHello"
    assert trained_on == ["Hello<|eot_id|>"]
    # A file of the folder is as good as the folder, and samples are asked for in the same way.
    by_file = dataclasses.replace(config, tokenizer=TokenizerFile(f"{folder}/tokenizer.json"))
    (folder / "tokenizer.json").write_text("{}")
    assert written(by_file, tmp_path / "other")[0] == text
    ids = _chat_prompt(config, ByteTokenizer(), tmp_path / "run")("Hi")
    assert ByteTokenizer().decode(ids, skip_special=True) == f"{TOLD}assistant\n\n"


def test_a_format_that_a_source_names_goes_first(tmp_path, folder):
    config = run_config(tmp_path, folder, "data.sources.0.conversations.chat_format=llama3")
    assert written(config, tmp_path / "run")[0] == "user\n\nHiassistant\n\nHello"
    theirs = run_config(tmp_path, folder, "data.sources.0.conversations.chat_format=template")
    assert written(theirs, tmp_path / "theirs")[0].startswith(TOLD)


def test_a_run_that_began_without_a_template_goes_on_without(tmp_path, folder):
    (folder / "chat_template.jinja").rename(tmp_path / "aside")
    config = run_config(tmp_path, folder)
    text, _ = written(config, tmp_path / "run")
    (tmp_path / "aside").rename(folder / "chat_template.jinja")
    assert written(config, tmp_path / "run")[0] == text == "user\n\nHiassistant\n\nHello"


def finished(config, run_dir):
    """The checkpoint of a run, as far as chats go."""
    open_documents(
        config.data, "sources", open_tokenizer(config, run_dir), run_dir, workers=1, progress=False
    )
    (run_dir / "checkpoints" / "step_1").mkdir(parents=True)
    (run_dir / "config.toml").write_text(to_toml(to_table(config)))
    return RunCheckpoint(run_dir)


@pytest.mark.parametrize("setting", ["seed=1", "data.sources.0.conversations.chat_format=template"])
def test_a_runs_checkpoint_has_the_template_that_it_was_trained_with(tmp_path, folder, setting):
    checkpoint = finished(run_config(tmp_path, folder, setting), tmp_path / "run")
    assert checkpoint.chat_template == TEMPLATE
    assert checkpoint.generation.chat_format is None


def test_a_runs_checkpoint_has_the_format_that_its_records_name(tmp_path, folder):
    config = run_config(tmp_path, folder, "data.sources.0.conversations.chat_format=llama3")
    checkpoint = finished(config, tmp_path / "run")
    assert checkpoint.chat_template is None
    assert checkpoint.generation.chat_format == "llama3"


def test_a_runs_checkpoint_has_a_copy_of_the_template_that_its_records_name(tmp_path, folder):
    mine = tmp_path / "mine.jinja"
    mine.write_text(TEMPLATE.replace("Tiny", "Mine"))
    config = run_config(tmp_path, folder, f"data.sources.0.conversations.chat_template={mine}")
    checkpoint = finished(config, tmp_path / "run")
    mine.unlink()
    assert checkpoint.chat_template == TEMPLATE.replace("Tiny", "Mine")
    assert checkpoint.generation.chat_format is None
    (tmp_path / "run" / "chat_template.jinja").unlink()
    with pytest.raises(InterchangeError, match=r"chat_template\.jinja: No such file .*mine\.jinja"):
        checkpoint.chat_template  # noqa: B018 (reading it is what fails)


def test_templates_are_found_beside_any_tokenizer_or_told_what_is_wrong(tmp_path):
    assert find_chat_template(tmp_path) is None
    assert find_chat_template(tmp_path / "none" / "tokenizer.model") is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": TEMPLATE}))
    assert find_chat_template(tmp_path / "tokenizer.model") == TEMPLATE
    config.write_text(json.dumps({"chat_template": [{"name": "rag", "template": ""}]}))
    with pytest.raises(TokenizerError, match=r"config\.json: chat_template: none of rag is named"):
        find_chat_template(tmp_path)


def test_without_a_template_or_a_known_vocabulary_it_is_said_what_to_name(tmp_path):
    plain = type(CHATML)("<|endoftext|>", "<|pad|>")
    config = data_config(lines(tmp_path / "c.jsonl", [said("Hi", "Hello")]), "conversations")
    with pytest.raises(ConfigError, match=r"^chat_format: this model has no chat template, and .*"
                       r"; name one of llama2, .*zephyr$"):  # fmt: skip
        opened(config, tmp_path / "run", tokenizer=plain)
    assert make_chat_format(LLAMA2).name == "llama2"


def test_what_a_template_never_reads_is_left_out_by_line(tmp_path, folder):
    config = run_config(tmp_path, folder)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {}}}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add",
            "arguments": {}}}]}  # fmt: skip
    asked = said("Hi", "Hello")["messages"]
    records = [{"messages": asked}, {"messages": asked, "tools": tools},
               {"messages": [asked[0], call]}]  # fmt: skip
    lines(tmp_path / "c.jsonl", records)
    tokenizer = open_tokenizer(config, tmp_path / "run")
    summary = opened(config.data, tmp_path / "run", tokenizer=tokenizer).manifest.summary
    assert summary.problems == [
        f"c.jsonl:{line}: inexpressible (the chat template leaves {what} out; it can't write them)"
        for line, what in ((2, "tools"), (3, "tool_calls"))
    ]
