"""Which format lies at a path."""

import huggingface_hub
import pytest
from tiny_checkpoints import CASES, write_folder

from llama_jax.interchange.opening import open_source, recognise
from llama_jax.interchange.tensors import InterchangeError


def made(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["config.json", "model.safetensors"], "hf"),
        (["params.json", "consolidated.00.pth"], "meta"),
        (["consolidated.00.pth"], "meta"),
        (["model.Q4_1.gguf"], "gguf"),
        (["model.toml", "params/_METADATA"], "orbax"),
        (["config.toml", "checkpoints/step_3/state/_METADATA"], "run"),
        # A repository that ships a GGUF file too is what its config says.
        (["config.json", "model.safetensors", "model.gguf"], "hf"),
        (["config.toml"], None),
        (["README.md"], None),
        ([], None),
    ],
)
def test_a_folder_is_what_lies_in_it(names, kind, tmp_path):
    assert recognise(made(tmp_path, *names)) == kind


def test_a_file_is_gguf_by_its_name(tmp_path):
    made(tmp_path, "a.gguf", "a.safetensors")
    assert recognise(tmp_path / "a.gguf") == "gguf"
    assert recognise(tmp_path / "a.safetensors") is None


def test_what_is_no_checkpoint_is_told_with_what_was_looked_for(tmp_path):
    with pytest.raises(InterchangeError, match="nowhere: no such file or folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(InterchangeError, match=r"looked for config\.json \(Hugging Face\), para"):
        open_source(made(tmp_path, "README.md"))


def test_of_several_gguf_files_one_has_to_be_named(tmp_path):
    made(tmp_path, "m.Q4_1.gguf", "m.F16.gguf")
    with pytest.raises(InterchangeError, match=r"name one of them: m\.F16\.gguf, m\.Q4_1\.gguf"):
        open_source(tmp_path)


def test_a_hub_address_is_downloaded_first(tmp_path, monkeypatch):
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["revision"], options["ignore_patterns"]))
        return str(write_folder(tmp_path, CASES["linear"]))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert open_source("hf://meta-llama/Llama-3.2-1B@main").config == CASES["linear"]
    assert open_source("hf://meta-llama/Llama-3.2-1B").path == tmp_path
    name = "meta-llama/Llama-3.2-1B"
    assert asked == [(name, "main", "*/*"), (name, None, "*/*")]


def test_a_failed_download_is_one_line(monkeypatch):
    def snapshot(name, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(InterchangeError, match="hf://a/b: ConnectionError: no network"):
        open_source("hf://a/b")
    with pytest.raises(InterchangeError, match="hf://a: not of the form hf://org/name"):
        open_source("hf://a")
