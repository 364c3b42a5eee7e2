"""Checkpoints: bit-equal on any mesh, never evicting the newest, honest about damage."""

import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.path import atomicity

from llama_jax.checkpoint.manager import CheckpointError, Checkpoints
from llama_jax.config.run import CheckpointConfig

# A restore that fails leaves Orbax's event loop with work that Python reports when it is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

LAYOUT = {"w": P("fsdp", "tensor"), "moments": {"w": P("tensor", "fsdp")}, "step": P(), "key": P()}


@pytest.fixture(autouse=True)
def collect_garbage():
    yield
    gc.collect()


def make_mesh(fsdp, tensor):
    devices = np.array(jax.devices()[: fsdp * tensor]).reshape(fsdp, tensor)
    return jax.sharding.Mesh(devices, ("fsdp", "tensor"))


def make_state(mesh, step, *, rows=16):
    values = {
        "w": jax.random.normal(jax.random.key(step), (rows, 8)),
        "moments": {"w": jax.random.normal(jax.random.key(100 + step), (8, rows))},
        "step": jnp.int32(step),
        "key": jax.random.fold_in(jax.random.key(7), step),
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), LAYOUT)
    return jax.device_put(values, shardings)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def as_numpy(leaf):
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(as_numpy(a), as_numpy(b))


def save_steps(directory, steps, config=None, losses=None):
    mesh = make_mesh(2, 4)
    with Checkpoints(directory, config or CheckpointConfig(keep_last=10)) as checkpoints:
        for step in steps:
            loss = None if losses is None else losses.get(step)
            state = make_state(mesh, step)
            checkpoints.save(step, state, {"next_step": step}, held_out_loss=loss)
        checkpoints.wait()
        return checkpoints.steps()


@pytest.mark.parametrize("shape", [(8, 1), (1, 1), (4, 2), (1, 4)])
def test_a_state_saved_on_2x4_is_bit_equal_on_another_mesh_and_laid_out_for_it(tmp_path, shape):
    save_steps(tmp_path, [3])
    expected = make_state(make_mesh(*shape), 3)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        restored = checkpoints.restore_latest(abstract(expected))
    assert restored.step == 3
    assert restored.position == {"next_step": 3}
    assert_same(restored.state, expected)
    for leaf, wanted in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(expected), strict=True
    ):
        assert leaf.sharding == wanted.sharding
    # The key is a typed key that goes on as the saved one would have.
    assert jax.random.normal(restored.state["key"]) == jax.random.normal(expected["key"])


def test_an_empty_directory_restores_nothing(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        assert checkpoints.restore_latest(abstract(make_state(make_mesh(1, 1), 0))) is None
        assert checkpoints.best_step() is None


def test_a_save_holds_the_values_of_its_step_though_the_buffers_are_donated_meanwhile(tmp_path):
    add_one = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    sharding = NamedSharding(make_mesh(2, 4), P("fsdp", "tensor"))
    state = {"w": jax.device_put(jnp.zeros((1024, 1024)), sharding)}
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(0, state, {})
        for _ in range(20):
            state = add_one(state)
        checkpoints.wait()
        restored = checkpoints.restore_latest(abstract(state))
    assert np.unique(np.asarray(restored.state["w"])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("config", "losses", "kept"),
    [
        (CheckpointConfig(keep_last=2, keep_best=False), {}, [5, 6]),
        (CheckpointConfig(keep_last=1, keep_every=3, keep_best=False), {}, [3, 6]),
        (CheckpointConfig(keep_last=1), {1: 3.0, 2: 1.0, 3: 2.0}, [2, 6]),
        # The newest is the worst, and stays.
        (CheckpointConfig(keep_last=1), {s: float(s) for s in range(1, 7)}, [1, 6]),
        # The newest is the best, and is kept once.
        (CheckpointConfig(keep_last=1), {s: -float(s) for s in range(1, 7)}, [6]),
    ],
)
def test_eviction_keeps_the_last_every_nth_and_the_best(tmp_path, config, losses, kept):
    assert save_steps(tmp_path, range(1, 7), config, losses) == kept


def test_the_best_survives_a_restart(tmp_path):
    config = CheckpointConfig(keep_last=1)
    save_steps(tmp_path, [1, 2], config, {1: 1.0, 2: 2.0})
    save_steps(tmp_path, [3, 4], config, {3: 3.0})
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.steps() == [1, 4]
        assert checkpoints.best_step() == 1
        assert checkpoints.held_out_loss(4) is None


def stored_files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("harm", ["missing", "truncated", "empty"])
@pytest.mark.slow
def test_harm_to_any_file_of_the_newest_gives_the_state_before_it_or_the_right_one(tmp_path, harm):
    save_steps(tmp_path / "whole", [1, 2], losses={1: 1.0, 2: 2.0})
    names = stored_files(tmp_path / "whole" / "step_2")
    assert len(names) > 8
    fell_back = 0
    for number, name in enumerate(names):
        directory = tmp_path / str(number) / "checkpoints"
        shutil.copytree(tmp_path / "whole", directory)
        file = directory / "step_2" / name
        data = file.read_bytes()
        if harm == "missing":
            file.unlink()
        else:
            file.write_bytes(data[: len(data) // 2] if harm == "truncated" else b"")
        notices = []
        with Checkpoints(directory, CheckpointConfig(), notices.append) as checkpoints:
            restored = checkpoints.restore_latest(abstract(make_state(make_mesh(2, 4), 0)))
        assert_same(restored.state, make_state(make_mesh(2, 4), restored.step))
        assert restored.position == {"next_step": restored.step}, name
        fell_back += restored.step == 1
    assert fell_back >= 4


def test_a_damaged_newest_checkpoint_is_named_put_aside_and_saved_again(tmp_path):
    directory = tmp_path / "checkpoints"
    save_steps(directory, [1, 2])
    shutil.rmtree(directory / "step_2" / "state" / "d")
    notices = []
    state = make_state(make_mesh(2, 4), 2)
    with Checkpoints(directory, CheckpointConfig(), notices.append) as checkpoints:
        assert checkpoints.restore_latest(abstract(state)).step == 1
        assert len(notices) == 1
        assert notices[0].startswith("checkpoint of step 2 is damaged (")
        assert notices[0].endswith("going on from step 1")
        assert (tmp_path / "damaged" / "step_2").is_dir()
        assert checkpoints.save(2, state, {"next_step": 2})
        checkpoints.wait()
        assert checkpoints.restore_latest(abstract(state)).step == 2


def test_when_none_can_be_read_nothing_is_moved_and_the_cause_is_said(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in (1, 2):
        shutil.rmtree(tmp_path / f"step_{step}" / "state" / "d")
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(CheckpointError, match=r"none of 2 checkpoints .* step 2:"),
    ):
        checkpoints.restore_latest(abstract(make_state(make_mesh(2, 4), 0)))
    assert (tmp_path / "step_2").is_dir()


def test_a_checkpoint_of_another_model_is_not_taken_for_a_damaged_one(tmp_path):
    save_steps(tmp_path, [1, 2])
    other = abstract(make_state(make_mesh(2, 4), 0, rows=32))
    with (
        Checkpoints(tmp_path, CheckpointConfig()) as checkpoints,
        pytest.raises(CheckpointError, match=r"moments\.w is \(8, 16\) there and \(8, 32\) here"),
    ):
        checkpoints.restore_latest(other)
    assert (tmp_path / "step_2").is_dir()


def test_a_failure_in_the_background_is_raised(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    state = make_state(make_mesh(2, 4), 1)
    checkpoints.save(1, state, {})
    checkpoints.wait()

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    # What the background thread calls last; a full disk would fail there or earlier.
    monkeypatch.setattr(atomicity, "on_commit_callback", fail)
    checkpoints.save(2, state, {})
    with pytest.raises(CheckpointError, match="no space left on device"):
        checkpoints.wait()
