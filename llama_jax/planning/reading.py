"""From a compiled step to a record of its figures, a JAX device's and a step's, for JSON."""

import dataclasses
from typing import Any

from llama_jax.config.hardware import Slice
from llama_jax.planning.collectives import Layout
from llama_jax.planning.compiling import Compiled
from llama_jax.planning.estimate import estimate
from llama_jax.planning.program import Analysis, analyze


def read_step(compiled: Compiled, slice_: Slice) -> dict[str, Any]:
    """A device's figures from a compiled step, as JSON can hold them."""
    analysis = analyze(compiled.text, slice_.chip, Layout.of(compiled.mesh))
    memory, state = compiled.memory, compiled.state_bytes
    return {
        "peak_bytes": memory.peak_bytes,
        "argument_bytes": memory.argument_bytes,
        "temp_bytes": memory.temp_bytes,
        "code_bytes": memory.code_bytes,
        "host_bytes": memory.host_bytes,
        "params_bytes": state.params,
        "optimizer_bytes": state.optimizer,
        "gradient_bytes": state.gradients,
        "batch_bytes": state.batch,
        **dataclasses.asdict(compiled.held),
        "executed_flops": analysis.executed_flops,
        "hbm_traffic_bytes": analysis.hbm_traffic_bytes,
        "collectives": [
            {
                "kind": use.kind,
                "axis": use.axis,
                "count": use.count,
                "bytes": use.bytes,
                "overlapped": use.overlapped,
            }
            for use in analysis.collectives
        ],
        "kernel_calls": analysis.kernel_calls,
        "uncounted_kernels": analysis.uncounted_kernels,
        "time_s": _times(analysis, slice_),
        "compile_s": compiled.compile_s,
    }


def _times(analysis: Analysis, slice_: Slice) -> dict[str, float]:
    """Each bound, the estimate, and `exposed`: collectives that the schedule doesn't overlap."""
    waited_for = tuple(use for use in analysis.collectives if not use.overlapped)
    alone = estimate(dataclasses.replace(analysis, collectives=waited_for), slice_.chip, slice_)
    return {
        **dataclasses.asdict(estimate(analysis, slice_.chip, slice_)),
        "exposed": alone.ici + alone.dcn,
    }
