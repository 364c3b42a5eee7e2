"""`llama-jax plan`: figures as JSON and text, compiled or remembered, and its refusals."""

import json

import pytest

from llama_jax.cli.main import main
from llama_jax.config.files import shipped_configs
from llama_jax.planning import compiling

TINY = f"""
base = "{(shipped_configs() / "runs/debug/tiny.toml").as_posix()}"
[model]
vocab_size = 512
embed_dim = 128
num_layers = 1
head_dim = 128
num_heads = 2
num_kv_heads = 1
mlp_dim = 256
[data]
seq_len = 128
[execution]
compute_dtype = "bfloat16"
attention = "reference"
[hardware]
slice = "v5e-1"
"""


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.toml"
    path.write_text(TINY)
    return str(path)


def output(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.short
def test_a_run_is_planned_once_and_then_remembered(run_file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("libtpu")
    plan = json.loads(output(capsys, run_file, "--json"))
    assert (plan["run"], plan["topology"], plan["num_chips"]) == ("small", "v5e:1x1", 1)
    assert plan["hbm_bytes"] == int(15.75 * 2**30)
    assert plan["argument_bytes"] < plan["peak_bytes"] < 2**27
    # 6 P + 6 L T N H for each of 8 x 128 tokens, P = V D + L (2 D H (N + K) + 3 D F).
    params = 512 * 128 + 2 * 128 * 128 * 3 + 3 * 128 * 256
    assert plan["model_flops"] == 8 * 128 * (6 * params + 6 * 128 * 2 * 128)
    assert 1.0 <= plan["executed_flops"] / plan["model_flops"] < 1.5
    assert plan["collectives"] == []
    assert plan["costs"]["steps"] == 60

    def compile_again(*arguments):
        raise AssertionError("compiled a second time")

    monkeypatch.setattr("llama_jax.planning.making.compile_lowered", compile_again)
    picture = tmp_path / "plan.png"
    text = output(capsys, run_file, "--picture", str(picture), "--price-per-chip-hour", "1.2")
    assert "at 1.2 a chip-hour" in text
    assert picture.stat().st_size > 10_000
    stored = tmp_path / "plan.json"
    stored.write_text(json.dumps(plan))
    assert "the same in every figure" in output(capsys, "--diff", str(stored), run_file)
    with pytest.raises(AssertionError, match="a second time"):
        main(["plan", "--debug", run_file, "--no-cache"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: give a run's TOML file"),
        (["tiny"], "--topology: give one, such as --topology v5e-16"),
        (["tiny", "--topology", "v5e-17"], "no slice is called 'v5e-17' (did you mean 'v5e-16'?)"),
        (["tiny", "--topology", "v5e-1", "--set", "mesh.fsdp=3"], "there are 1 devices"),
        (["--diff", "a.json", "b.json"], "a.json: no such file"),
        (["tiny", "--diff", "a.json", "b.json"], "run: --diff names both of its plans itself"),
        (["tiny", "--out", "x.toml"], "--out: only --search writes a run"),
        (["tiny", "--search", "--picture", "x.png"], "--picture: has no effect with --search"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, message, capsys):
    pytest.importorskip("libtpu")
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_machine_without_the_compiler_is_told_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda name: None)
    assert main(["plan", "tiny", "--topology", "v5e-1"]) == 1
    error = capsys.readouterr().err
    assert "pip install 'llama-jax[tpu]'" in error
    assert error.count("\n") == 1


def test_8_bit_products_on_a_chip_without_units_for_them_are_told(run_file, capsys, monkeypatch):
    pytest.importorskip("libtpu")

    def refuse(*arguments):
        raise compiling.PlanError("not compiled in this test")

    monkeypatch.setattr("llama_jax.planning.making.Planner.plan", refuse)
    for precision, told in (("fp8", True), ("int8", False)):
        assert main(["plan", run_file, "--set", f"execution.matmul_precision={precision}"]) == 1
        error = capsys.readouterr().err
        assert ("'fp8' gains no speed on v5e" in error) == told
        assert "not compiled in this test" in error
