"""A plan with round figures, and a planner that makes plans by formula. No tests here."""

import dataclasses

from llama_jax.config.hardware import find_slice
from llama_jax.planning.analytic import memory_model, sizes_of, time_model
from llama_jax.planning.compiling import Held, OutOfMemoryError
from llama_jax.planning.memory_report import Buffer
from llama_jax.planning.plan import CollectiveUse, Plan

GIB = 2**30
HELD = Held(
    {"parameters": 2 * GIB, "saved_activations": 20 * GIB},
    (
        Buffer("jvp()/while", "bf16[32,8192,4096]", 4 * GIB, "saved_activations"),
        Buffer("cross_entropy/dot", "f32[1024,128256]", GIB // 2, "loss"),
    ),
)

PLAN = Plan(
    run="made-up",
    topology="v5e:4x4",
    slice_name="v5e-16",
    num_slices=1,
    num_chips=16,
    devices_per_chip=1,
    mesh={"data": 1, "fsdp": 16, "context": 1, "tensor": 1},
    settings={"batch_size": 16, "seq_len": 1000, "microbatches": 1, "remat": "full"},
    tokens_per_step=16_000,
    hbm_bytes=16 * GIB,
    peak_bytes=12 * GIB,
    argument_bytes=6 * GIB,
    temp_bytes=6 * GIB,
    code_bytes=0,
    host_bytes=0,
    params_bytes=2 * GIB,
    optimizer_bytes=4 * GIB,
    gradient_bytes=2 * GIB,
    batch_bytes=0,
    memory={
        "parameters": 2 * GIB,
        "optimizer_state": 4 * GIB,
        "gradients": 2 * GIB,
        "temporaries": 3 * GIB,
    },
    buffers=HELD.buffers,
    model_flops=197e12,
    executed_flops=220e12,
    hbm_traffic_bytes=1e12,
    collectives=(
        CollectiveUse("all-gather", "fsdp", 64, 15_000_000_000, True),
        CollectiveUse("all-gather", "fsdp", 2, 1_000_000_000, False),
        CollectiveUse("all-reduce", "fsdp", 32, 7_000_000_000, False),
    ),
    kernel_calls={"splash": 96},
    time_s={
        "compute": 1.1,
        "hbm": 1.2,
        "ici": 0.3,
        "dcn": 0.0,
        "host": 0.0,
        "estimate": 2.0,
        "exposed": 0.25,
    },
    peak_flops=197e12,
    checkpoint_bytes=96_000_000_000,
    compile_s=60.0,
    flags={},
    program="0123456789abcdef",
    versions={"jax": "0", "libtpu": "0"},
)


@dataclasses.dataclass
class FormulaPlanner:
    """Stands for a `Planner`, but instead of compiling it believes the analytic model.

    `factor` times what the model says is the peak; `planned` are the runs asked for.
    """

    slice_: object = find_slice("v5e-16")
    num_slices: int = 1
    factor: float = 1.0
    planned: list = dataclasses.field(default_factory=list)

    @property
    def num_devices(self):
        return self.slice_.num_devices * self.num_slices

    def plan(self, config, name):
        self.planned.append(config)
        sizes = sizes_of(config, self.num_devices, self.num_slices)
        memory, time = memory_model(config, sizes), time_model(config, sizes, self.slice_)
        peak = round(self.factor * memory.peak_bytes)
        limit = self.slice_.chip.device_usable_hbm_bytes
        if peak > limit:
            raise OutOfMemoryError(peak, limit, HELD)
        times = {**dataclasses.asdict(time), "estimate": time.estimate, "exposed": 0.0}
        return dataclasses.replace(
            PLAN,
            run=name,
            slice_name=self.slice_.name,
            peak_bytes=peak,
            hbm_bytes=limit,
            time_s=times,
            tokens_per_step=config.data.batch_size * config.data.seq_len,
        )
