"""`llama-jax convert`: figures, notes, exit codes."""

import json
import sys
from pathlib import Path

import pytest

from llama_jax.cli.main import main

sys.path.append(str(Path(__file__).parents[1] / "interchange"))

from in_memory import random_source

from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.tokenizers.byte import ByteTokenizer


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_hugging_face(random_source(), folder, tokenizer=ByteTokenizer())
    return str(folder)


def test_convert_tells_the_difference_of_the_logits(src, tmp_path, capsys):
    assert main(["convert", src, str(tmp_path / "o"), "--to", "orbax"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{src} (hf) to {tmp_path / 'o'} (orbax): 21 tensors, 0.09M para")
    assert printed[1] == "note: the tokenizer has 272 ids, the embedding 288 rows"
    assert printed[2].startswith("logits of 64 tokens (same values): largest difference 0 of ")
    assert printed[2].endswith("most likely token the same at 64 of 64")


def test_json_holds_the_figures_alone(src, tmp_path, capsys):
    options = ["--to", "hf", "--dtype", "float16", "--shard-size", "100KB", "--json"]
    assert main(["convert", src, str(tmp_path / "h"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dst_format"], report["exact"], report["tensors"]) == ("hf", False, 21)
    assert set(report["kinds"]) == {"F16"}
    assert 0 < report["comparison"]["max_difference"] < 0.1
    assert (tmp_path / "h" / "model.safetensors.index.json").is_file()


def test_no_verify_skips_the_comparison(src, tmp_path, capsys):
    options = ["--to", "hf", "--no-verify", "--no-tokenizer"]
    assert main(["convert", src, str(tmp_path / "h"), *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:] == ["note: no tokenizer was written", "logits: not compared"]


@pytest.mark.parametrize(
    ("options", "code", "complaint"),
    [
        (["--to", "onnx"], 2, "--to: unknown format 'onnx'"),
        (["--to", "hf", "--shard-size", "big"], 2, "--shard-size: 'big' is not a size"),
        (["--to", "hf", "--dtype", "int4"], 2, "--dtype: 'int4' can't be written as hf"),
    ],
)
def test_bad_options_are_one_line(src, options, code, complaint, tmp_path, capsys):
    assert main(["convert", src, str(tmp_path / "x"), *options]) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dst_that_is_there_and_a_src_that_is_not_are_one_line(src, tmp_path, capsys):
    assert main(["convert", src, src, "--to", "hf"]) == 2
    assert "is there already; --overwrite replaces it" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "no"), str(tmp_path / "x"), "--to", "hf"]) == 1
    assert (
        capsys.readouterr().err == f"llama-jax: error: {tmp_path / 'no'}: no such file or folder\n"
    )
