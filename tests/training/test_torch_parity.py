"""Twenty steps beside PyTorch: transformers' Llama and torch's AdamW from the same weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_llama import EXECUTION, MODEL, ONE

from llama_jax.config.model import Llama3Scaling, RopeConfig
from llama_jax.config.run import AdamWConfig, NextTokenConfig, ScheduleConfig, TrainingConfig
from llama_jax.models.init import make_model
from llama_jax.objectives.objective import make_objective
from llama_jax.optim.optimizer import make_optimizer
from llama_jax.optim.schedule import make_schedule
from llama_jax.sharding.mesh import make_mesh
from llama_jax.training.networks import Networks
from llama_jax.training.state import init_state
from llama_jax.training.step import make_train_step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LOSS_RTOL = 1e-4
STEPS, ROWS, LENGTH = 20, 4, 24
PEAK, WARMUP = 3e-3, 5
# Every feature that has two conventions: grouped heads, head_dim not D / N, scaled frequencies.
SCALING = Llama3Scaling(factor=8.0, original_max_seq_len=16)
TIED = dataclasses.replace(
    MODEL, embed_dim=48, head_dim=16, rope=RopeConfig(theta=5e5, scaling=SCALING)
)
UNTIED = dataclasses.replace(TIED, tie_embeddings=False, num_kv_heads=8)


def torch_model(config):
    scaling = config.rope.scaling
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.mlp_dim,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": config.rope.theta,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_seq_len,
            },
            attn_implementation="eager",
            pad_token_id=None,
        )
    )


def ours_from(theirs, config, mesh):
    """Our model with their weights: transposed, heads split, layers stacked."""
    weights = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    D, H = config.embed_dim, config.head_dim
    shapes = {
        "attention.q_proj": ("self_attn.q_proj", (D, -1, H)),
        "attention.k_proj": ("self_attn.k_proj", (D, -1, H)),
        "attention.v_proj": ("self_attn.v_proj", (D, -1, H)),
        "attention.o_proj": ("self_attn.o_proj", (-1, H, D)),
        "mlp.gate_proj": ("mlp.gate_proj", (D, -1)),
        "mlp.up_proj": ("mlp.up_proj", (D, -1)),
        "mlp.down_proj": ("mlp.down_proj", (-1, D)),
        "attn_norm.scale": ("input_layernorm", (D,)),
        "mlp_norm.scale": ("post_attention_layernorm", (D,)),
    }
    values = {
        "embedding": weights["model.embed_tokens.weight"],
        "final_norm.scale": weights["model.norm.weight"],
        "lm_head": weights["lm_head.weight"].T,
    }
    for ours, (name, shape) in shapes.items():
        layers = [
            weights[f"model.layers.{i}.{name}.weight"].T.reshape(shape)
            for i in range(config.num_layers)
        ]
        values[f"layers.{ours}"] = np.stack(layers)

    graphdef, params = nnx.split(make_model(config, EXECUTION, mesh, 0))

    def fill(path, param):
        value = jnp.array(values[".".join(map(str, path))])
        assert value.shape == param.shape
        return param.replace(jax.device_put(value, param[...].sharding))

    return graphdef, nnx.map_state(fill, params)


def batches(config):
    rng = np.random.default_rng(1)
    return rng.integers(0, config.vocab_size, (STEPS, ROWS, LENGTH + 1), dtype=np.int32)


def masks():
    """Different numbers of targets in each step and row."""
    return (np.random.default_rng(2).random((STEPS, ROWS, LENGTH)) < 0.8).astype(np.float32)


def their_losses(model, config):
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    matrices = [p for name, p in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}],
        lr=PEAK,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / WARMUP, 1.0))
    losses = []
    for ids, mask in zip(batches(config), masks(), strict=True):
        ids = torch.tensor(ids, dtype=torch.long)
        labels = torch.where(torch.tensor(mask) > 0, ids[:, 1:], -100)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        losses.append(loss.item())
    return losses


def our_losses(graphdef, params, config, mesh):
    schedule = make_schedule(ScheduleConfig(peak=PEAK, kind="constant", warmup_steps=WARMUP), STEPS)
    optimizer = make_optimizer(AdamWConfig(weight_decay=0.1), schedule)
    objective = make_objective(NextTokenConfig(), EXECUTION)
    training = TrainingConfig(steps=STEPS, clip_norm=1.0, microbatches=2)
    step = make_train_step(Networks(graphdef), objective, optimizer, schedule, training)
    state = init_state(params, optimizer, jax.random.key(0))
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    losses = []
    with jax.set_mesh(mesh):
        for ids, mask in zip(batches(config), masks(), strict=True):
            batch = {
                "tokens": ids[:, :-1],
                "targets": ids[:, 1:],
                "loss_mask": mask,
                "positions": positions,
                "segment_ids": np.ones_like(positions),
            }
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied, grouped heads", "untied"])
def test_twenty_losses_are_pytorchs(config):
    mesh = make_mesh(ONE, jax.devices()[:1])
    theirs = torch_model(config)
    graphdef, params = ours_from(theirs, config, mesh)
    ours = our_losses(graphdef, params, config, mesh)
    np.testing.assert_allclose(ours, their_losses(theirs, config), rtol=LOSS_RTOL)
    assert ours[-1] != pytest.approx(ours[0], rel=1e-3)  # it did move
