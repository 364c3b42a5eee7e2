"""Rematerialisation by name: what a layer keeps for its backward pass, and what it computes again.

none   keeps everything: fastest, most memory.
dots   keeps the outputs of matmuls that have no batch dims (all projections), and recomputes
       norms, activations and attention scores.
block  keeps a layer's input, its q, k, v projections and its attention output.
full   keeps a layer's input alone: about one more forward pass of compute, least memory.
"""

from collections.abc import Callable
from typing import TypeVar

import jax

Function = TypeVar("Function", bound=Callable)
_policies = jax.checkpoint_policies

POLICIES = {
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "block": _policies.save_only_these_names("q_proj", "k_proj", "v_proj", "attention"),
    "full": _policies.nothing_saveable,
}


def rematerialized(function: Function, policy: str) -> Function:
    """`function` under the named policy; `prevent_cse` only matters outside a scan."""
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=POLICIES[policy])  # type: ignore[return-value]
