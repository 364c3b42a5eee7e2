"""`llama-jax tokenizer`: train, encode, decode."""

import io
import json

import pytest

from llama_jax.cli.main import main
from llama_jax.tokenizers import load_tokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    source = folder / "corpus"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.txt").write_text(f"The quick brown fox number {number} jumps over it.")
    options = ["--vocab-size", "300", "--held-out-fraction", "0.2"]
    assert main(["tokenizer", "train", str(source), *options, "--out", str(folder / "made")]) == 0
    return folder / "made"


def test_train_writes_both_forms_and_reports_held_out_compression(trained, tmp_path, capsys):
    names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in trained.iterdir()) == names
    source = str(trained.parent / "corpus")
    options = ["--vocab-size", "300", "--held-out-fraction", "0.2", "--json"]
    assert main(["tokenizer", "train", source, *options, "--out", str(tmp_path / "again")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fingerprint"] == load_tokenizer(trained).fingerprint
    assert (report["vocab_size"], report["measured_on"]) == (300, "held_out")
    assert 20 < report["files"] < 40
    assert 2.5 < report["bytes_per_token"] < 8


def test_one_text_is_measured_on_itself_and_says_so(tmp_path, capsys):
    source = tmp_path / "one.txt"
    source.write_text("abab abab")
    options = ["--vocab-size", "274", "--out", str(tmp_path / "made")]
    assert main(["tokenizer", "train", str(source), *options]) == 0
    output = capsys.readouterr().out
    # abab, space, abab.
    assert "3.000 bytes a token on its own training text" in output
    assert "274 tokens, trained on 1 files" in output


def test_train_makes_a_sentencepiece_vocabulary_where_asked(trained, tmp_path, capsys):
    source, out = str(trained.parent / "corpus"), str(tmp_path / "made")
    options = ["--kind", "sentencepiece", "--vocab-size", "320", "--json"]
    assert main(["tokenizer", "train", source, *options, "--out", out]) == 0
    report = json.loads(capsys.readouterr().out)
    made = load_tokenizer(out)
    assert isinstance(made, SentencePieceTokenizer)
    assert (report["vocab_size"], report["fingerprint"]) == (320, made.fingerprint)
    assert main(["tokenizer", "encode", "--tokenizer", out, "--bos", "\n"]) == 0
    ids = capsys.readouterr().out.split()
    assert (ids[0], ids[-1]) == ("1", "13")


@pytest.mark.slow
def test_a_gguf_file_is_a_tokenizer_too(smollm2_gguf, capsys):
    path = str(smollm2_gguf)
    assert main(["tokenizer", "encode", "--tokenizer", path, "Hello, world! 12"]) == 0
    ids = capsys.readouterr().out.split()
    assert ids == ["19556", "28", "905", "17", "216", "33", "34"]
    assert main(["tokenizer", "decode", "--tokenizer", path, *ids]) == 0
    assert capsys.readouterr().out == "Hello, world! 12\n"


def test_train_does_not_overwrite_a_tokenizer(trained, capsys):
    source = str(trained.parent / "corpus")
    assert main(["tokenizer", "train", source, "--vocab-size", "300", "--out", str(trained)]) == 2
    assert "already holds a tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["stdlib", "--vocab-size", "100"], 2, "vocab_size: 100 is below the least allowed, 272"),
        (["nowhere.txt", "--vocab-size", "300"], 2, "path: no such file or directory: nowhere.txt"),
        (["stdlib", "--vocab-size", "300", "--max-bytes", "0"], 2, "max_bytes: 0 must be above 0"),
    ],
)
def test_bad_options_are_one_line(options, code, complaint, tmp_path, capsys):
    assert main(["tokenizer", "train", *options, "--out", str(tmp_path / "made")]) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_encode_prints_ids_and_decode_gives_the_text_back(trained, capsys):
    text = "The quick fox\n<|eot_id|> héllo"
    assert main(["tokenizer", "encode", "--tokenizer", str(trained), "--bos", "--eos", text]) == 0
    printed = capsys.readouterr().out.split()
    tokenizer = load_tokenizer(trained)
    assert [int(word) for word in printed] == tokenizer.encode(text, bos=True, eos=True)
    assert main(["tokenizer", "decode", "--tokenizer", str(trained), *printed[1:-1]]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_the_byte_tokenizer_has_known_ids(capsys):
    assert main(["tokenizer", "encode", "--tokenizer", "byte", "--bos", "hé"]) == 0
    assert capsys.readouterr().out == "256 104 195 169\n"


@pytest.mark.parametrize("allowed", ["all", "<|eot_id|>"])
def test_special_text_becomes_special_only_when_allowed(allowed, capsys):
    command = ["tokenizer", "encode", "--tokenizer", "byte", "<|eot_id|>!"]
    assert main(command) == 0
    assert capsys.readouterr().out.split()[:2] == ["60", "124"]
    assert main([*command, "--allow-special", allowed, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ids": [265, 33], "tokens": 2, "bytes": 11}


def test_text_and_ids_are_read_from_stdin(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["tokenizer", "encode", "--tokenizer", "byte"]) == 0
    assert capsys.readouterr().out == "104 105 10\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("104 105\n256"))
    assert main(["tokenizer", "decode", "--tokenizer", "byte", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": "hi<|begin_of_text|>"}


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["decode", "--tokenizer", "byte", "5000"], 1, "token id 5000 is outside the vocabulary"),
        (["decode", "--tokenizer", "byte", "x"], 2, "invalid literal for int"),
        (["encode", "--tokenizer", "nowhere", "x"], 1, "nowhere: no such file"),
        (
            ["encode", "--tokenizer", "byte", "--allow-special", "eot", "x"],
            1,
            "'eot' is not a special token of this tokenizer",
        ),
    ],
)
def test_failures_are_one_line(arguments, code, complaint, capsys):
    assert main(["tokenizer", *arguments]) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
