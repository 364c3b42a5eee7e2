"""Rematerialisation by name: what a layer keeps for its backward pass, and what it computes again.

none   keeps everything: fastest, most memory.
dots   keeps the outputs of all projections and of attention: what is computed again, norms,
       rotations and activations, costs little (the reference backend also its scores).
block  keeps a layer's input, its q, k, v projections and its attention output.
full   keeps a layer's input alone: about one more forward pass of compute, least memory.
"""

from collections.abc import Callable
from typing import TypeVar

import jax

Function = TypeVar("Function", bound=Callable)
_policies = jax.checkpoint_policies
QKV = ("q_proj", "k_proj", "v_proj")

POLICIES = {
    # By name: a policy on matmuls doesn't see those inside a custom gradient.
    "dots": _policies.save_only_these_names(*QKV, "attention", "o_proj", "gate_proj", "up_proj"),
    "block": _policies.save_only_these_names(*QKV, "attention"),
    "full": _policies.nothing_saveable,
}


def rematerialized(function: Function, policy: str) -> Function:
    """`function` under the named policy; `prevent_cse` only matters outside a scan."""
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy])  # type: ignore[return-value]
