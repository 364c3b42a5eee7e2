"""`llama-jax average`: figures and exit codes."""

import json
import sys
from pathlib import Path

import pytest

from llama_jax.cli.main import main

sys.path.append(str(Path(__file__).parents[1] / "interchange"))

from in_memory import random_source

from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.opening import open_source
from llama_jax.tokenizers.byte import ByteTokenizer


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    for seed in (0, 1):
        write_hugging_face(random_source(seed=seed), root / str(seed), tokenizer=ByteTokenizer())
    return [str(root / "0"), str(root / "1")]


def test_average_writes_the_mean_and_says_what_went_in(two, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["average", *two, "--out", out, "--weights", "3", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(
        f"{out}: the average of 2, 21 tensors, 0.09M parameters in float32"
    )
    assert printed[1:] == [f"  0.7500  {two[0]}", f"  0.2500  {two[1]}"]
    a, b, mean = (open_source(path).tensors["embedding"].read_all() for path in (*two, out))
    assert abs(mean - (0.75 * a + 0.25 * b)).max() < 1e-7


def test_json_holds_the_figures_alone(two, tmp_path, capsys):
    options = ["--to", "orbax", "--dtype", "bfloat16", "--json"]
    assert main(["average", *two, "--out", str(tmp_path / "out"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dtype"], [e["weight"] for e in report["ingredients"]]) == (
        "bfloat16",
        [0.5] * 2,
    )


def test_wrong_wishes_exit_with_2_and_wrong_checkpoints_with_1(two, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["average", two[0], *out]) == 2
    assert "of at least two checkpoints" in capsys.readouterr().err
    assert main(["average", *two, *out, "--weights", "1"]) == 2
    assert "--weights: 1 weights for 2 checkpoints" in capsys.readouterr().err
    assert main(["average", two[0], str(tmp_path / "no"), *out]) == 1
    assert "no such file or folder" in capsys.readouterr().err
