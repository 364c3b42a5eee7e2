"""The distillation objective: by hand, live and stored teachers, sharded, and what is refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from response_batches import MODEL, Table, assert_same_gradients, run, run_table

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import DistillConfig
from llama_jax.config.run import MeshConfig
from llama_jax.objectives.distillation import Distillation

RTOL = 1e-5
V = MODEL.vocab_size
# A teacher of another width and depth.
TEACHER = dataclasses.replace(MODEL, embed_dim=24, mlp_dim=40)


def objective(**fields):
    return Distillation(DistillConfig("teacher", **fields), chunk_size=5)


def batch_of(length=16, rows=4):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, (rows, length + 1)).astype(np.int32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_mask": (rng.random((rows, length)) < 0.7).astype(np.float32),
        "positions": np.ascontiguousarray(places),
        "segment_ids": np.ones((rows, length), np.int32),
    }


def with_stored(batch, logits_BTV, top):
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(logits_BTV), top)
    return {**batch, "teacher_ids": np.array(ids), "teacher_logps": np.array(logps)}


def table_logits(seed, batch):
    table = Table(seed)
    x_BTD = table.hidden(batch["tokens"], positions_BT=batch["positions"], segment_ids_BT=None)
    return np.asarray(x_BTD @ table.head[...], np.float64)


def test_the_loss_is_temperature_squared_times_the_divergence_of_logits():
    batch = batch_of()
    logits = [table_logits(seed, batch) for seed in (0, 1)]
    p, q = (np.exp(x / 2) / np.exp(x / 2).sum(-1, keepdims=True) for x in logits)
    by_hand = 4 * ((q * np.log(q / p)).sum(-1) * batch["loss_mask"]).sum()
    loss, sums = run_table(objective(temperature=2.0), batch)
    assert loss == pytest.approx(by_hand, rel=RTOL)
    assert sums["tokens"] == batch["loss_mask"].sum()
    log_z = np.log(np.exp(logits[0]).sum(-1))
    target = np.take_along_axis(logits[0], batch["targets"][..., None], -1)[..., 0]
    nll = ((log_z - target) * batch["loss_mask"]).sum()
    assert sums["nll"] == pytest.approx(nll, rel=RTOL)
    figures = objective().figures({**sums, "loss": loss})
    assert figures == pytest.approx({"loss": loss / sums["tokens"], "nll": nll / sums["tokens"]})


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(divergence):
    loss, sums = run_table(objective(divergence=divergence), batch_of(), frozen_seed=0)
    assert loss == pytest.approx(0.0, abs=1e-6 * sums["tokens"])


def test_a_teacher_stored_whole_is_the_live_one_and_one_cut_short_says_less():
    batch = batch_of()
    logits = table_logits(1, batch).astype(np.float32)
    live, _ = run_table(objective(divergence="jsd", beta=0.3), batch)
    stored = objective(divergence="jsd", beta=0.3, teacher="stored")
    assert stored.frozen == ()
    whole, _ = run_table(stored, with_stored(batch, logits, V))
    cut, _ = run_table(stored, with_stored(batch, logits, 4))
    assert whole == pytest.approx(live, rel=1e-5)
    assert 0.1 * live < cut < live


@functools.cache
def unsharded(teacher):
    batch = batch_of()
    if teacher == "stored":
        batch = with_stored(batch, table_logits(1, batch).astype(np.float32), 4)
    return batch, run(objective(teacher=teacher), batch, teacher=TEACHER)


# A context axis splits the length, so that rows are in zigzag order, stored teachers' too.
@pytest.mark.parametrize(
    ("mesh", "teacher"),
    [
        (MeshConfig(fsdp=2, context=2, tensor=2), "stored"),
        pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), "live", marks=pytest.mark.slow),
        pytest.param(MeshConfig(fsdp=4, context=2), "live", marks=pytest.mark.slow),
    ],
)
def test_sharded_is_unsharded(mesh, teacher):
    batch, (loss, sums, grads) = unsharded(teacher)
    other, other_sums, other_grads = run(
        objective(teacher=teacher), batch, teacher=TEACHER, mesh_config=mesh
    )
    assert other == pytest.approx(loss, rel=RTOL)
    assert other_sums == pytest.approx(sums, rel=1e-5)
    assert_same_gradients(other_grads, grads)


def test_a_teacher_of_another_vocabulary_or_one_that_is_not_there_is_refused():
    wrong = Table(1)
    wrong.head = nnx.Param(wrong.head[...][:, 1:])
    with pytest.raises(ConfigError, match=r"^objective\.teacher: the teacher has 47 tokens .* 48;"):
        objective()(Table(0), jax.tree.map(np.asarray, batch_of()), None, {"teacher": wrong})
    with pytest.raises(ConfigError, match=r"'stored', but the batch has no teacher_ids"):
        run_table(objective(teacher="stored"), batch_of())
