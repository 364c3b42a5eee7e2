"""`llama-jax data`: build and inspect."""

import json

import pytest

from llama_jax.cli.main import main
from llama_jax.data.shards import open_shards


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_text(
        '{"body": "Hello world"}\n{"body": 3}\n{"body": "Second doc"}\n'
    )
    return str(folder)


def build(source, out, *options):
    fixed = ["--text-field", "body", "--tokenizer", "byte", "--out", str(out), "--workers", "1"]
    return main(["data", "build", source, *fixed, *options])


def test_build_prints_what_was_made_and_what_was_skipped(source, tmp_path, capsys):
    assert build(source, tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "skipped a.jsonl:2: wrong type ('body' is a number)" in output
    documents = open_shards(tmp_path / "out")
    first, second = documents.read([0, 1])
    assert first.tolist() == [256, *b"Hello world", 257]
    assert second.tolist() == [256, *b"Second doc", 257]


def test_build_prints_figures_as_json(source, tmp_path, capsys):
    assert build(source, tmp_path / "out", "--json") == 0
    captured = capsys.readouterr()
    figures = json.loads(captured.out)
    assert captured.err == ""
    names = ("documents", "tokens", "bytes", "files", "shards", "dtype")
    assert [figures[name] for name in names] == [2, 25, 21, 1, 1, "<u2"]
    assert figures["skipped"] == {"wrong_type": 1}
    assert figures["plan"]["source"]["text_field"] == "body"


def test_build_draws_its_bar_on_stderr(source, tmp_path, capsys):
    assert build(source, tmp_path / "out") == 0
    assert "tokenising" in capsys.readouterr().err


def test_strict_fails_with_the_file_and_line(source, tmp_path, capsys):
    assert build(source, tmp_path / "out", "--strict", "--json") == 1
    assert capsys.readouterr().err == (
        "llama-jax: error: a.jsonl:2: wrong type ('body' is a number)\n"
    )


def test_suffixes_and_parts_are_passed_on(source, tmp_path, capsys):
    assert build(source, tmp_path / "out", "--suffix", ".txt") == 2
    assert "no file in" in capsys.readouterr().err
    options = ["--part", "held_out", "--held-out-fraction", "1.0", "--max-bytes", "1", "--json"]
    assert build(source, tmp_path / "out", *options) == 0
    assert json.loads(capsys.readouterr().out)["documents"] == 1
