"""Each notebook runs from top to bottom at toy size, in a kernel of its own."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from rich.console import Console

from llama_jax.config.files import load_run_config
from llama_jax.training.run import train

COLAB = Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(COLAB.glob("*.ipynb"))
TOY = {
    "01_pretrain": 'RUN, RUN_DIR, OVERRIDES = "tiny", "toy", ["training.steps=4", '
    '"schedule.warmup_steps=1", "checkpoint.every=2"]',
    "02_finetune": 'MODEL, LORA, FULL, DPO = "{model}", "debug/sft", "debug/sft", "debug/dpo"\n'
    'CHATS = "shipped:arithmetic_chats.jsonl"\n'
    'PREFERENCES = "shipped:arithmetic_preferences.jsonl"\n'
    'OVERRIDES = ["training.steps=4", "schedule.warmup_steps=1"]\n'
    'QUESTION = "What is 2 + 3?"',
    "02_generate": 'MODEL, QUESTION, NEW_TOKENS = "{model}", "Who?", 4',
}
pytestmark = pytest.mark.filterwarnings("default")  # Jupyter's own libraries warn


def execute(name, folder, **values):
    notebook = nbformat.read(COLAB / f"{name}.ipynb", as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = TOY[name].format(**values)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.slow
def test_the_pretraining_notebook_runs_at_toy_size(tmp_path):
    notebook = execute("01_pretrain", tmp_path)
    assert (tmp_path / "toy" / "plots" / "loss.png").stat().st_size > 1000
    figures = json.loads(notebook.cells[-1].outputs[0].text)
    assert figures["step"] == 4
    assert 0 < figures["held_out"]["bits_per_byte"] < 10


@pytest.mark.slow
def test_the_fine_tuning_notebook_runs_at_toy_size(tmp_path):
    quiet, base = Console(quiet=True), tmp_path / "base"
    train(
        load_run_config("debug/sft", ["training.steps=2", "schedule.warmup_steps=1"]), base, quiet
    )
    notebook = execute("02_finetune", tmp_path, model=base)
    said = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "logits of" in said
    assert (tmp_path / "aligned" / "model.safetensors").exists()
    assert (tmp_path / "dpo" / "plots" / "figures.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_generating_notebook_runs_on_a_real_model(tmp_path, smollm2_gguf):
    notebook = execute("02_generate", tmp_path, model=smollm2_gguf)
    said = "".join(output.get("text", "") for output in notebook.cells[-1].outputs)
    assert "logits of" in said
    assert (tmp_path / "converted" / "model.safetensors").stat().st_size > 100_000_000


def test_every_notebook_has_a_toy_size_and_no_stored_output():
    assert {path.stem for path in NOTEBOOKS} == set(TOY)
    for path in NOTEBOOKS:
        assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
