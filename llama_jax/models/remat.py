"""Rematerialisation: what a layer keeps for its backward pass, where, and what it computes again.

none       keeps everything: fastest, most memory.
dots       keeps the outputs of all projections and of attention: what is computed again, norms
           and activations, costs little (the reference backend also its scores).
block      keeps a layer's input, what attention reads and its output.
attention  keeps a layer's input and attention's output: its kernel runs forward once.
full       keeps a layer's input alone: about one more forward pass of compute, least memory.

`execution.remat_save` adds tensors to a preset, `execution.remat_offload` moves tensors (of the
preset or not) to the host's memory until the backward pass. The input is kept with any preset but
may be offloaded. A projection onto the residual stream is in the table where its layer reads it
again (`o_proj`); nothing in a backward pass reads `down_proj`'s output.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, get_args

import jax

from llama_jax.config.model import ModelConfig
from llama_jax.config.run import CheckpointName, ExecutionConfig

Function = TypeVar("Function", bound=Callable)
_QKV = ("q", "k", "v")

# `attention` is the output with the log-sum-exp of its scores: all that its backward pass needs.
PRESETS: dict[str, tuple[CheckpointName, ...]] = {
    "dots": (*_QKV, "attention", "o_proj", "gate_proj", "up_proj"),
    "block": (*_QKV, "attention"),
    "attention": ("attention",),
    "full": (),
}


def rematerialized(function: Function, execution: ExecutionConfig) -> Function:
    """One layer's `function` under the policy that a run's execution table asks for."""
    if execution.remat == "none":
        return function
    # Inside a scan nothing merges the recomputation with the forward pass; the barriers that
    # prevent it elsewhere would cost copies there.
    prevent_cse = not execution.scan_layers
    return jax.checkpoint(  # type: ignore[return-value]
        function, policy=_policy(execution), prevent_cse=prevent_cse
    )


def saved_names(execution: ExecutionConfig) -> tuple[CheckpointName, ...]:
    """Tensors that stay on the device, in order of the layer; with `none`, all."""
    if execution.remat == "none":
        return get_args(CheckpointName)
    wanted = {"layer_input", *PRESETS[execution.remat], *execution.remat_save}
    return _in_order(wanted - set(execution.remat_offload))


def offloaded_names(execution: ExecutionConfig) -> tuple[CheckpointName, ...]:
    """Tensors that go to host memory, in order of the layer."""
    return _in_order(execution.remat_offload)


def token_widths(config: ModelConfig) -> dict[CheckpointName, int]:
    """Elements a token and layer of each tensor, in the compute dtype, over the tensor axis.

    Without attention's log-sum-exp, one float32 a head, and copies of key-value heads.
    """
    D, F = config.embed_dim, config.mlp_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        **{"layer_input": D, "attn_norm": D, "q": queries, "k": keys, "v": keys},
        **{"attention": queries, "o_proj": D, "mlp_norm": D},
        **{"gate_proj": F, "up_proj": F, "swiglu": F},
    }


def _policy(execution: ExecutionConfig) -> Callable[..., Any]:
    # By name: a policy on matmuls doesn't see those inside a custom gradient. A layer's input,
    # which is read under its name alone, needs a place only when it leaves the device.
    saved = saved_names(execution)
    if not execution.remat_offload:
        return jax.checkpoint_policies.save_only_these_names(*saved)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved,
        names_which_can_be_offloaded=offloaded_names(execution),
        offload_src="device",
        offload_dst="pinned_host",
    )


def _in_order(names: Iterable[str]) -> tuple[CheckpointName, ...]:
    chosen = set(names)
    return tuple(name for name in get_args(CheckpointName) if name in chosen)
