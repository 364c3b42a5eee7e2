"""Each notebook runs from top to bottom at toy size, in a kernel of its own."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colab").glob("*.ipynb"))
TOY = {
    "01_pretrain": 'RUN, RUN_DIR, OVERRIDES = "tiny", "toy", ["training.steps=4", '
    '"schedule.warmup_steps=1", "checkpoint.every=2"]'
}


def execute(path, folder):
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = TOY[path.stem]
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own libraries warn
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_at_toy_size(path, tmp_path):
    notebook = execute(path, tmp_path)
    assert (tmp_path / "toy" / "plots" / "loss.png").stat().st_size > 1000
    figures = json.loads(notebook.cells[-1].outputs[0].text)
    assert figures["step"] == 4
    assert 0 < figures["held_out"]["bits_per_byte"] < 10


def test_every_notebook_has_a_toy_size_and_no_stored_output():
    assert {path.stem for path in NOTEBOOKS} == set(TOY)
    for path in NOTEBOOKS:
        assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells)
