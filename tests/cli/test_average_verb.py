"""`llama-jax average`: figures and exit codes."""

import json
import sys
from pathlib import Path

import pytest

from llama_jax.cli.main import main

sys.path.append(str(Path(__file__).parents[1] / "interchange"))

from in_memory import CONFIG, random_source

from llama_jax.config.loading import to_table, to_toml
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


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A run of the two's model and tokenizer, with a text held out."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "held_out.txt").write_text("some text that nobody was trained on\n" * 4)
    text = {"name": "text", "text": {"path": str(folder / "held_out.txt")}}
    data = {"seq_len": 64, "batch_size": 8, "sources": [text], "held_out": [text]}
    table = {
        "model": to_table(CONFIG),
        "tokenizer": {"kind": "byte"},
        "data": data,
        "training": {"steps": 1},
        "schedule": {"peak": 1e-3},
        "execution": {"compute_dtype": "float32"},
        "metrics": {"progress": False},
    }
    (folder / "run.toml").write_text(to_toml(table))
    return str(folder / "run.toml")


def test_a_greedy_soup_names_each_ones_loss_and_what_became_of_it(two, run_file, tmp_path, capsys):
    out = str(tmp_path / "soup")
    assert main(["average", *two, two[1], "--greedy", run_file, "--out", out]) == 0
    printed = capsys.readouterr()
    told = json.loads((tmp_path / "soup" / "averaged.json").read_text())
    # Random models: about the loss of guessing; the same one twice has one loss.
    losses = [each["loss"] for each in told["ingredients"]]
    assert losses[1] == losses[2] != losses[0]
    assert 5.0 < min(losses) < 8.0
    by_place = sorted(told["ingredients"], key=lambda each: each["place"])
    assert [each["loss"] for each in by_place] == sorted(losses)
    lines = printed.out.splitlines()
    kept = sum(each["kept"] for each in told["ingredients"])
    assert lines[0].startswith(f"{out}: the average of {kept} of 3, 21 tensors")
    assert lines[0].endswith(f"held-out loss {told['loss']:.4f}")
    for line, each in zip(lines[1:], by_place, strict=True):
        verdict = "kept" if each["kept"] else "left out"
        assert line == (
            f"  {each['weight']:.4f}  {each['path']}  loss {each['loss']:.4f}, {verdict}: "
            f"the mean with it {each['soup_loss']:.4f}"
        )
    assert f"{two[0]}: held-out loss {losses[0]:.4f}" in printed.err


def test_greedy_excludes_weights_and_its_options_are_for_it_alone(two, run_file, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for options, complaint in {
        ("--greedy", run_file, "--weights", "1", "2"): "--weights: a greedy soup's weights are its",
        ("--set", "data.seq_len=8"): "--set: has no meaning without --greedy",
        ("--platform", "cpu"): "--platform: has no meaning without --greedy",
        ("--greedy", "debug/sfd"): "debug/sfd: no such file or shipped config",
        ("--greedy", run_file, "--set", "model.mlp_dim=64"): "model.mlp_dim: 64, but 96 in",
    }.items():
        assert main(["average", *two, *out, *options]) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
