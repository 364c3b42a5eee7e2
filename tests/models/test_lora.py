"""Adapters: what they compute, what is differentiated, how they lie."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sharded_cases import CASES
from tiny_models import CONFIG, F32, forward, logits, packed_batch, params_of

from llama_jax.config.loading import ConfigError
from llama_jax.config.post_training import AdapterConfig
from llama_jax.config.run import MeshConfig
from llama_jax.models import accounting
from llama_jax.models.cache import init_cache
from llama_jax.models.init import abstract_model, make_model
from llama_jax.models.lora import Adapter, split_params
from llama_jax.optim.optimizer import decay_mask
from llama_jax.sharding.mesh import make_mesh

LORA = AdapterConfig(rank=4, alpha=8.0)
DORA = dataclasses.replace(LORA, dora=True)
flat = nnx.to_flat_state
TOLERANCE = 3e-6  # relative to the largest value: float32 sums in another order


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


@functools.cache
def trained(adapter, mesh=None, config=CONFIG, execution=F32):
    """A model whose adapters are no longer fresh: B and magnitudes drawn, the same on any mesh."""
    mesh = mesh or one_device()
    model = make_model(config, execution, mesh, 0, adapter)
    random = np.random.default_rng(1)
    for path, param in flat(nnx.state(model, Adapter)):
        if path[-1].endswith("_lora_a"):
            continue
        noise = 0.2 * random.standard_normal(param.shape).astype(np.float32)
        around = np.asarray(param[...])
        value = around * (1 + noise) if path[-1].endswith("_dora_scale") else noise
        param.set_value(jax.device_put(value, param[...].sharding))
    return model, mesh


def logits_and_grads(model, mesh, batch):
    """And the adapters' gradients by path, of a loss in every logit of real tokens."""
    graphdef, state = nnx.split(model)
    params, frozen = split_params(state)

    def loss(params, frozen, batch):
        logits_BTV = forward(nnx.merge(graphdef, params, frozen), batch)
        real_BT = batch["segment_ids"] != 0
        return (jax.nn.logsumexp(logits_BTV, axis=-1) ** 2 * real_BT).sum(), logits_BTV

    with jax.set_mesh(mesh):
        grads, logits_BTV = jax.jit(jax.grad(loss, has_aux=True))(params, frozen, batch)
    by_path = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat(grads)}
    return np.asarray(logits_BTV), by_path


@functools.cache
def unsharded(adapter):
    model, mesh = trained(adapter)
    batch = packed_batch(8, 16)
    return logits_and_grads(model, mesh, batch)


def close(got, wanted, name=""):
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE * np.abs(wanted).max(), err_msg=name)


def test_a_fresh_adapter_changes_no_bit_of_the_logits_and_no_weight():
    mesh = one_device()
    base, adapted = make_model(CONFIG, F32, mesh, 0), make_model(CONFIG, F32, mesh, 0, LORA)
    ours, theirs = params_of(adapted), params_of(base)
    assert theirs.keys() < ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    batch = packed_batch(2, 16)
    np.testing.assert_array_equal(logits(adapted, mesh, batch), logits(base, mesh, batch))


def test_fresh_magnitudes_are_the_norms_and_change_the_logits_by_rounding_alone():
    mesh = one_device()
    base, adapted = make_model(CONFIG, F32, mesh, 0), make_model(CONFIG, F32, mesh, 0, DORA)
    params = params_of(adapted)
    for name, axes in (("attention.q_proj", 1), ("attention.o_proj", (1, 2)), ("mlp.up_proj", 1)):
        norms = np.sqrt((params[f"layers.{name}"] ** 2).sum(axes))
        np.testing.assert_allclose(params[f"layers.{name}_dora_scale"], norms, rtol=1e-6)
    batch = packed_batch(2, 16)
    close(logits(adapted, mesh, batch), logits(base, mesh, batch))


def test_shapes_and_counts_of_the_adapters_by_hand():
    params = params_of(trained(DORA)[0])
    shapes = {name: value.shape for name, value in params.items() if "ra_" in name}
    attention, mlp = "layers.attention.", "layers.mlp."
    assert shapes[f"{attention}q_proj_lora_a"] == (2, 32, 4)
    assert shapes[f"{attention}q_proj_lora_b"] == (2, 4, 8, 16)
    assert shapes[f"{attention}o_proj_lora_a"] == (2, 8, 16, 4)
    assert shapes[f"{attention}o_proj_lora_b"] == (2, 4, 32)
    assert shapes[f"{attention}k_proj_dora_scale"] == (2, 2, 16)
    assert shapes[f"{mlp}down_proj_lora_a"] == (2, 48, 4)
    assert len(shapes) == 3 * 7
    ins_and_outs = (32 + 128) + 2 * (32 + 32) + (128 + 32) + 3 * (32 + 48)
    assert accounting.trainable_param_count(CONFIG, LORA) == 2 * 4 * ins_and_outs
    outs = 128 + 32 + 32 + 32 + 48 + 48 + 32
    assert accounting.trainable_param_count(CONFIG, DORA) == 2 * (4 * ins_and_outs + outs)
    base = accounting.param_count(CONFIG)
    assert accounting.param_count(CONFIG, LORA) == base + 2 * 4 * ins_and_outs
    assert accounting.trainable_param_count(CONFIG) == base
    frozen = 4 * accounting.matmul_params(CONFIG) + 6 * 2 * 4 * ins_and_outs
    attention_flops = accounting.flops_per_token(CONFIG, 16) - 6 * accounting.matmul_params(CONFIG)
    assert accounting.flops_per_token(CONFIG, 16, LORA) == frozen + attention_flops


def test_only_the_named_targets_get_adapters():
    adapter = dataclasses.replace(LORA, targets=("q_proj", "down_proj"))
    model = make_model(CONFIG, F32, one_device(), 0, adapter)
    names = {path[-1] for path, _ in flat(nnx.state(model, Adapter))}
    assert names == {f"{proj}_lora_{x}" for proj in adapter.targets for x in "ab"}


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_a_projection_is_the_formula_written_out(adapter):
    """x W + scale x A B, and for DoRA m / |W + scale A B| times it, by NumPy on one layer's up."""
    from llama_jax.models.lora import adapted
    from llama_jax.models.mlp import UP, WIDE

    model, mesh = trained(adapter)
    params = {name: value[1] for name, value in params_of(model).items() if "layers" in name}
    graphdef, state = nnx.split(model.layers)
    layer = nnx.merge(graphdef, jax.tree.map(lambda x: x[1], state))
    x_BTD = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    with jax.set_mesh(mesh):
        got = adapted(layer.mlp, "up_proj", "BTD,DF->BTF", jnp.asarray(x_BTD), UP, WIDE, "default")
    up = "layers.mlp.up_proj"
    whole = params[up] + 2.0 * params[f"{up}_lora_a"] @ params[f"{up}_lora_b"]
    if adapter.dora:
        whole *= params[f"{up}_dora_scale"] / np.sqrt((whole**2).sum(0))
    np.testing.assert_allclose(np.asarray(got), x_BTD @ whole, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_gradients_are_of_adapters_alone_and_of_each(adapter):
    grads = unsharded(adapter)[1]
    assert grads.keys() == {
        n for n in params_of(trained(adapter)[0]) if "lora_" in n or "dora_" in n
    }
    assert all(np.abs(grad).max() > 0 for grad in grads.values())


def test_gradients_are_the_loss_differentiated():
    """A central difference along a random direction in all adapters at once."""
    model, mesh = trained(LORA)
    batch = packed_batch(8, 16)
    graphdef, state = nnx.split(model)
    params, frozen = split_params(state)
    random = np.random.default_rng(2)
    direction = jax.tree.map(lambda x: random.standard_normal(x.shape).astype(np.float32), params)

    @jax.jit
    def loss(step):
        moved = jax.tree.map(lambda x, d: x + step * d, params, direction)
        logits_BTV = forward(nnx.merge(graphdef, moved, frozen), batch)
        return (jax.nn.logsumexp(logits_BTV, axis=-1) ** 2 * (batch["segment_ids"] != 0)).sum()

    with jax.set_mesh(mesh):
        slope = float(loss(1e-3) - loss(-1e-3)) / 2e-3
    grads = unsharded(LORA)[1]
    wanted = sum((grads[".".join(map(str, p))] * d[...]).sum() for p, d in flat(direction))
    assert slope == pytest.approx(float(wanted), rel=2e-2)


def test_the_norm_of_dora_is_not_differentiated():
    """Scaling W's adapter up changes the norm; with it constant, dL/dm is y / norm by hand."""
    from llama_jax.models.lora import adapted
    from llama_jax.models.mlp import UP, WIDE

    model, mesh = trained(DORA)
    graphdef, state = nnx.split(model.layers)
    one = jax.tree.map(lambda x: x[0], state)
    x_BTD = jnp.ones((1, 1, 32))

    def total(params):
        mlp = nnx.merge(graphdef, params).mlp
        return adapted(mlp, "up_proj", "BTD,DF->BTF", x_BTD, UP, WIDE, "default").sum()

    with jax.set_mesh(mesh):
        grads = jax.grad(total)(one)
    p = {n.removeprefix("layers.mlp."): v[0] for n, v in params_of(model).items() if "mlp" in n}
    whole = p["up_proj"] + 2.0 * p["up_proj_lora_a"] @ p["up_proj_lora_b"]
    ratio = p["up_proj_dora_scale"] / np.sqrt((whole**2).sum(0))
    wanted_b = 2.0 * np.outer(p["up_proj_lora_a"].sum(0), ratio)
    np.testing.assert_allclose(
        np.asarray(grads.mlp.up_proj_lora_b[...]), wanted_b, rtol=2e-5, atol=1e-5
    )


# DoRA's products are LoRA's and more.
MESHES = [
    ("fsdp 8", LORA),
    ("tensor 4, over the 2 kv heads", DORA),
    ("fsdp 2 x context 4, ring", DORA),
    ("fsdp 2 x context 2 x tensor 2", DORA),
]


@pytest.mark.parametrize(("name", "adapter"), MESHES, ids=lambda x: x if isinstance(x, str) else "")
def test_logits_and_gradients_on_meshes_are_those_of_one_device(name, adapter):
    case = CASES[name]
    execution = dataclasses.replace(F32, context_attention=case.context, remat="full")
    model, mesh = trained(adapter, make_mesh(case.mesh), execution=execution)
    batch = packed_batch(8, 16)
    wanted, wanted_grads = unsharded(adapter)
    real_BT = batch["segment_ids"] != 0
    found, grads = logits_and_grads(model, mesh, batch)
    close(found[real_BT], wanted[real_BT])
    assert grads.keys() == wanted_grads.keys()
    for key, grad in wanted_grads.items():
        np.testing.assert_allclose(
            grads[key], grad, atol=5 * TOLERANCE * np.abs(grad).max(), err_msg=key
        )


def test_adapters_lie_as_their_weights_with_the_rank_on_every_device():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    _, state = abstract_model(CONFIG, F32, mesh, DORA)
    specs = {path[-1]: tuple(leaf.get_value().sharding.spec) for path, leaf in flat(state)}
    assert specs["q_proj_lora_a"] == (None, "fsdp", None)
    assert specs["q_proj_lora_b"] == (None, None, "tensor", None)
    assert specs["k_proj_lora_b"] == (None, None, None, None)
    assert specs["o_proj_lora_a"] == (None, "tensor", None, None)
    assert specs["o_proj_lora_b"] == (None, None, "fsdp")
    assert specs["up_proj_dora_scale"] == (None, "tensor")
    assert specs["down_proj_lora_a"] == (None, "tensor", None)


@pytest.mark.parametrize(("remat", "scan"), [("none", True), ("dots", False)])
def test_remat_and_unrolled_layers_change_no_gradient(remat, scan):
    execution = dataclasses.replace(F32, remat=remat, scan_layers=scan)
    model, mesh = trained(LORA, execution=execution)
    grads = logits_and_grads(model, mesh, packed_batch(8, 16))[1]
    for key, grad in unsharded(LORA)[1].items():
        close(grads[key], grad, key)


def traced_gradient(model, mesh, split):
    """The gradient of a loss in what `split` gives first of the parameters, traced."""
    graphdef, state = nnx.split(model)
    batch = packed_batch(2, 8)

    def loss(params, frozen):
        return (forward(nnx.merge(graphdef, params, frozen), batch) ** 2).sum()

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).trace(*split(state))


def all_of(state):
    return state, nnx.State({})


def norms_of(state):
    return nnx.split_state(state, lambda path, _: path[-1] == "scale", ...)


def products(traced):
    """Matrix products in a traced program, loops' bodies once."""
    return len(re.findall(r"\bdot_general\[", str(traced.jaxpr)))


@pytest.mark.parametrize("remat", ["full", "none"])
def test_frozen_weights_have_no_gradient_products(remat):
    execution = dataclasses.replace(F32, attention="reference", remat=remat)
    mesh = one_device()
    base = make_model(CONFIG, execution, mesh, 0)
    whole, frozen = (traced_gradient(base, mesh, split) for split in (all_of, norms_of))
    # The head's and seven projections'.
    assert products(whole) - products(frozen) == 8
    # An adapter's own, a projection: two forward and four backward, and but for the down
    # projection's, which nothing backward reads, the two recomputed (the last one needn't be).
    lora = traced_gradient(trained(LORA, mesh, execution=execution)[0], mesh, split_params)
    again = 2 * 7 - 1 if remat == "full" else 0
    assert products(lora) - products(frozen) == 7 * 6 + again


@pytest.mark.slow
def test_nor_has_the_compiled_program():
    execution = dataclasses.replace(F32, attention="reference", remat="none")
    mesh = one_device()
    base = make_model(CONFIG, execution, mesh, 0)
    counts = []
    for split in (all_of, norms_of):
        with jax.set_mesh(mesh):
            text = traced_gradient(base, mesh, split).lower().compile().as_text()
        counts.append(len(re.findall(r" (?:dot|custom-call)\(", text)))
    assert counts[0] - counts[1] == 8


def test_what_only_a_frozen_weights_gradient_would_read_is_not_kept():
    """With `none`, which keeps all, layers keep less where only norms are trained."""
    execution = dataclasses.replace(F32, attention="reference", remat="none")
    mesh = one_device()
    graphdef, state = nnx.split(make_model(CONFIG, execution, mesh, 0))
    batch = packed_batch(2, 8)

    def kept(params, frozen):
        def vjp(params):
            return jax.vjp(lambda p: forward(nnx.merge(graphdef, p, frozen), batch), params)[1]

        with jax.set_mesh(mesh):
            return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(vjp, params)))

    # Attention's output and the MLP's wide rows, of each layer and token.
    assert kept(*all_of(state)) - kept(*norms_of(state)) >= 2 * (2 * 8) * (128 + 48)


@pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])
def test_extending_a_cache_token_by_token_gives_the_full_rows_logits(adapter):
    model, mesh = trained(adapter)
    batch = {k: v[:, :8] for k, v in packed_batch(2, 16).items()}
    batch["segment_ids"][:] = 1
    batch["positions"][:] = np.arange(8)
    wanted = logits(model, mesh, batch)
    graphdef, params = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="fresh")
    def extend(params, tokens_BT, positions_BT, cache, fresh):
        made = nnx.merge(graphdef, params)
        x_BTD, cache = made.extend(
            tokens_BT, cache, positions_BT=positions_BT,
            segment_ids_BT=jnp.ones_like(tokens_BT), fresh=fresh,
        )  # fmt: skip
        return made.logits(x_BTD), cache

    with jax.set_mesh(mesh):
        cache = jax.jit(lambda: init_cache(CONFIG, 2, 16, "float32", stacked=True))()
        got = []
        for part, fresh in ((slice(0, 5), True), (slice(5, 6), False), (slice(6, 8), False)):
            tokens, places = batch["tokens"][:, part], batch["positions"][:, part]
            found, cache = extend(params, tokens, places, cache, fresh)
            got.append(np.asarray(found))
    close(np.concatenate(got, axis=1), wanted)


def test_magnitudes_do_not_decay_and_matrices_of_adapters_do():
    params, _ = split_params(nnx.state(trained(DORA)[0]))
    mask = {path[-1]: leaf.get_value() for path, leaf in flat(decay_mask(params))}
    assert mask["q_proj_lora_a"]
    assert mask["q_proj_lora_b"]
    assert not mask["q_proj_dora_scale"]


def test_adapters_stay_float32_beside_bfloat16_weights():
    execution = dataclasses.replace(F32, param_dtype="bfloat16")
    mesh = one_device()
    dtypes = {
        path[-1]: leaf.dtype
        for path, leaf in flat(abstract_model(CONFIG, execution, mesh, DORA)[1])
    }
    assert {str(d) for n, d in dtypes.items() if "lora" in n or "dora" in n} == {"float32"}
    assert dtypes["q_proj"] == jnp.bfloat16


def test_scales_are_alpha_over_the_rank_or_its_root():
    assert AdapterConfig(rank=16, alpha=32.0).scale == 2.0
    assert AdapterConfig(rank=16, alpha=32.0, scaling="rslora").scale == 8.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank: 0 must be above 0"),
        ({"targets": ()}, "targets: at least one projection"),
        ({"targets": ("q_proj", "q_proj")}, "targets: 'q_proj' is named twice"),
    ],
)
def test_wrong_adapters_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        AdapterConfig(**changes)
