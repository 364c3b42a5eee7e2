"""What a run reads again when it goes on is what it began with, wherever that lies by now."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from etils import epath

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.tensors import InterchangeError
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.training.networks import open_teacher
from llama_jax.training.origins import check_origins, note_origins, reference_identity

sys.path.append(str(Path(__file__).parents[1] / "interchange"))

from in_memory import CONFIG, random_source

ADAPTER = ("adapter.rank=4",)
CASES = {
    "init.path": ("debug/sft", *ADAPTER),
    "objective.path": ("debug/distill",),
}


def written(folder, seed):
    folder.mkdir(parents=True)
    write_hugging_face(random_source(seed=seed), folder, tokenizer=ByteTokenizer())
    return folder


def run_from(key, folder):
    name, *settings = CASES[key]
    return load_run_config(name, [*settings, f"{key}={folder}"])


@pytest.mark.parametrize("key", CASES)
def test_a_checkpoint_may_move_but_not_become_another(tmp_path, key):
    folder, run_dir = written(tmp_path / "a", seed=0), epath.Path(tmp_path)
    note_origins(run_from(key, folder), run_dir)
    moved = folder.rename(tmp_path / "b")
    check_origins(run_from(key, moved), run_dir)
    other = run_from(key, written(tmp_path / "a", seed=1))
    with pytest.raises(ConfigError, match=rf"^{key}: .*a holds another model now "):
        check_origins(other, run_dir)
    with pytest.raises(InterchangeError, match="gone"):
        check_origins(run_from(key, tmp_path / "gone"), run_dir)
    note_origins(other, run_dir)  # a run that begins again, from something else
    check_origins(other, run_dir)
    (tmp_path / "origins.json").unlink()
    check_origins(run_from(key, moved), run_dir)


@pytest.mark.parametrize(
    ("name", "settings", "keys"),
    [
        ("debug/sft", (), []),  # trained whole: its own checkpoints are all that it needs
        ("debug/dpo", ("objective.loss=simpo", "objective.gamma=1.0"), []),
        ("debug/dpo", (), ["init.path"]),
        ("debug/dpo", ("objective.reference=live",), ["init.path"]),
        ("debug/reward", ADAPTER, ["init.path"]),
    ],
)
def test_only_what_is_read_again_is_noted(tmp_path, name, settings, keys):
    folder = written(tmp_path / "a", seed=0)
    config = load_run_config(name, [f"init.path={folder}", *settings])
    note_origins(config, epath.Path(tmp_path))
    path = tmp_path / "origins.json"
    assert (sorted(json.loads(path.read_text())) if path.exists() else []) == keys


def test_a_stored_reference_is_compared_only_when_it_is_made_again(tmp_path):
    folder, run_dir = written(tmp_path / "a", seed=0), epath.Path(tmp_path)
    note_origins(load_run_config("debug/dpo", [f"init.path={folder}"]), run_dir)
    shutil.rmtree(folder)
    gone = load_run_config("debug/dpo", [f"init.path={folder}"])
    check_origins(gone, run_dir)
    other = load_run_config("debug/dpo", [f"init.path={written(tmp_path / 'b', seed=1)}"])
    check_origins(other, run_dir)
    with pytest.raises(ConfigError, match=r"^init\.path: "):
        check_origins(other, run_dir, remade=True)


def test_a_references_identity_is_the_model_not_where_it_lies(tmp_path):
    folder, other = written(tmp_path / "a", seed=0), written(tmp_path / "b", seed=1)

    def identity(path, *settings):
        return reference_identity(load_run_config("debug/dpo", [f"init.path={path}", *settings]))

    found = {identity(folder), identity(other), identity(folder, "init.special_rows=mean")}
    assert len(found) == 3
    assert identity(folder.rename(tmp_path / "c"), "training.steps=7") in found
    drawn = [reference_identity(load_run_config("debug/dpo", [f"seed={seed}"])) for seed in (0, 1)]
    assert len(found | set(drawn)) == 5


def test_a_reward_model_teaches_nothing(tmp_path):
    reward = random_source(dataclasses.replace(CONFIG, head="scalar"))
    write_hugging_face(reward, tmp_path / "a", tokenizer=ByteTokenizer())
    config = load_run_config("debug/distill", [f"objective.path={tmp_path / 'a'}"])
    with pytest.raises(ConfigError, match=r"^objective\.path: .*a is a reward model, which has no"):
        open_teacher(config.objective)
