"""`llama-jax chat` with its input from a pipe, and one conversation with a real model."""

import io
import json
import os
import subprocess
import sys

import pytest
from scripted_models import BYTE, scripted_source

from llama_jax.cli import chat
from llama_jax.cli.main import main
from llama_jax.inference.generator import Generator
from llama_jax.interchange.hugging_face_writing import write_hugging_face


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripted") / "hf"
    source = scripted_source(["\n", "BONJÜR", "<|eot_id|>"])
    write_hugging_face(source, folder, tokenizer=BYTE)
    return folder


@pytest.fixture
def talk(model, monkeypatch, capsys):
    def talk(*lines, options=("--chat-format", "llama3", "--temperature", "0")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", "--model", str(model), *options])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out, captured.err

    return talk


@pytest.mark.short
def test_each_line_gets_a_reply_until_the_input_ends(talk):
    out, err = talk("Hi", "", "More")
    assert out == "BONJÜR\nBONJÜR\n"
    assert "[chat format llama3; /help shows the commands]" in err


def test_the_format_of_a_base_model_is_that_of_its_special_tokens(talk):
    out, err = talk("Hi", options=("--temperature", "0"))
    assert out == "BONJÜR\n"
    assert "[chat format llama3;" in err


def test_the_conversation_is_saved_with_its_system_message(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    out, err = talk("/system Be brief.", "Hi", "//etc", f"/save {path}", "/quit", "not said")
    assert out == "BONJÜR\nBONJÜR\n"
    said = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(message["role"], message["content"]) for message in said] == [
        ("system", "Be brief."),
        ("user", "Hi"), ("assistant", "BONJÜR"), ("user", "/etc"), ("assistant", "BONJÜR"),
    ]  # fmt: skip
    assert "[system message set; forgot all turns]" in err
    assert "[wrote 5 messages to " in err


def test_reset_forgets_the_turns(talk, tmp_path):
    path = tmp_path / "talk.jsonl"
    talk("Hi", "/reset", f"/save {path}")
    assert path.read_text() == ""


def test_system_alone_shows_it(talk):
    out, _ = talk("/system", "/system S", "/system")
    assert out == "(no system message)\nS\n"
    out, _ = talk("/system", options=("--system", "T", "--chat-format", "llama3"))
    assert out == "T\n"


def test_commands_that_are_unknown_or_incomplete_are_told(talk, tmp_path):
    out, err = talk("/sav x", "/save", f"/save {tmp_path}", "/help")
    assert "[unknown command '/sav' (did you mean '/save'?)]" in err
    assert "[/save needs a file's name]" in err
    assert "Is a directory]" in err
    assert "/system TEXT" in out


def test_what_does_not_fit_is_told_and_the_chat_goes_on(talk):
    out, err = talk("x" * 600, "Hi")
    assert out == "BONJÜR\n"
    assert "the model's context is 512" in err


def test_a_full_context_forgets_the_oldest_exchange_and_says_so(talk):
    out, err = talk(*["x" * 100] * 5)
    assert out == "BONJÜR\n" * 5
    assert "[the context is full: the 2 oldest messages were left out]" in err


def test_ctrl_c_stops_a_reply_and_keeps_what_came(talk, tmp_path, monkeypatch):
    whole, path = Generator.stream, tmp_path / "talk.jsonl"

    def interrupted(self, prompt, sampling):
        for piece in whole(self, prompt, sampling):
            yield piece
            if piece.text == "N":
                raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", interrupted)
    out, err = talk("Hi", f"/save {path}")
    assert out == "BON\n"
    assert "[stopped]" in err
    assert json.loads(path.read_text().splitlines()[1])["content"] == "BON"


def test_a_length_cuts_a_reply_and_says_so(talk):
    out, err = talk("Hi", options=("--max-new-tokens", "3", "--temperature", "0"))
    assert out == "BON\n"
    assert "[cut after 3 tokens]" in err


def test_ctrl_d_ends_a_terminal_chat_with_its_line(monkeypatch, capsys):
    def ended(prompt):
        assert prompt == "> "
        raise EOFError

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", ended)
    assert chat._read_line() is None
    assert capsys.readouterr().out == "\n"


def test_the_help_names_every_command():
    for command in chat.COMMANDS:
        assert command in chat.__doc__


def llama_jax(*arguments, said=""):
    """The command on one device, as on a laptop."""
    one = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    done = subprocess.run(
        [sys.executable, "-m", "llama_jax.cli.main", *arguments],
        env={**os.environ, **one}, input=said, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_conversation_with_smollm2(smollm2_gguf, tmp_path):
    options = ["--model", str(smollm2_gguf), "--temperature", "0"]
    question = "What is the capital of France?"
    line = json.loads(
        llama_jax("generate", *options, "--chat", "--prompt", question, "--json").stdout
    )
    assert len(line["prompt_ids"]) == 37
    assert line["ids"] == [504, 3575, 282, 4649, 314, 7042, 30]
    assert (line["finish_reason"], line["stop"]) == ("stop", 2)
    path = tmp_path / "talk.jsonl"
    said = f"{question}\nAnd of Germany?\n/save {path}\n"
    talk = llama_jax("chat", *options, said=said)
    assert talk.stdout == "The capital of France is Paris.\nThe capital of Germany is Berlin.\n"
    saved = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2
    assert saved[3]["content"] == "The capital of Germany is Berlin."
