"""Tokens a second of one training step: ours against PyTorch's, and what the inputs could feed.

    python benchmarks/train_step.py --models 10m smollm2-135m --dtypes float32 bfloat16
    python benchmarks/train_step.py --device gpu --models llama3.2-1b llama3.1-8b:8 \
        --dtypes bfloat16 --seq-len 4096

A name may end in a number of layers, where the whole model has no room. Each figure comes from a
process of its own, one after another: random weights, random tokens, AdamW with clipping at 1, the
same shapes. PyTorch is transformers' Llama with its default (sdpa) attention, eager and under
`torch.compile`; its bfloat16 is autocast over float32 parameters, as ours is bfloat16 compute over
float32 parameters. Engines that aren't installed are left out.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENGINES = ("llama_jax", "torch-eager", "torch-compile")
# A model of about ten million parameters; others are names of shipped configs.
TEN_MILLION = {
    "vocab_size": 4096,
    "embed_dim": 320,
    "num_layers": 8,
    "num_heads": 5,
    "num_kv_heads": 5,
    "head_dim": 64,
    "mlp_dim": 832,
    "max_seq_len": 2048,
    "norm_eps": 1e-5,
    "rope": {"theta": 10000.0},
    "tie_embeddings": True,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One process's work."""

    device: str
    engine: str
    model: str
    dtype: str
    batch_size: int
    seq_len: int
    repeats: int
    chunk_size: int
    remat: str


def model_config(name: str):
    """The shape by name, `NAME` or `NAME:LAYERS`; the same one builds every engine's model."""
    from llama_jax.config.files import load_model_config
    from llama_jax.config.loading import from_table
    from llama_jax.config.model import ModelConfig

    name, _, layers = name.partition(":")
    config = (
        from_table(ModelConfig, TEN_MILLION, name) if name == "10m" else load_model_config(name)
    )
    return dataclasses.replace(config, num_layers=int(layers)) if layers else config


def measure(case: Case, step: Callable[[], float], device_kind: str, peak: Callable) -> dict:
    """Times of a step; the first call, which compiles, is told apart.

    Args:
      device_kind: as JAX names it; gives the peak that MFU is a share of.
      peak: called at the end, the most bytes that were held on the device.
    """
    from llama_jax.metrics.throughput import peak_flops
    from llama_jax.models.accounting import flops_per_token

    start = time.perf_counter()
    first_loss = step()
    first_s = time.perf_counter() - start
    step()  # caches, allocator pools and lazily made optimizer state
    times, processor_times = [], []
    for _ in range(case.repeats):
        start, processor_start = time.perf_counter(), time.process_time()
        step()
        times.append(time.perf_counter() - start)
        processor_times.append(time.process_time() - processor_start)
    median_s = statistics.median(times)
    flops = flops_per_token(model_config(case.model), case.seq_len)
    most = peak_flops(device_kind)
    return {
        **dataclasses.asdict(case),
        "device_kind": device_kind,
        "mfu": most and flops * case.batch_size * case.seq_len / median_s / most,
        "tokens_per_s": case.batch_size * case.seq_len / median_s,
        "step_s": median_s,
        "slowest_s": max(times),
        # Over all cores: what a step costs even when other processes share the machine.
        "processor_s": statistics.median(processor_times),
        "compile_s": first_s - median_s,
        "peak_memory_gib": peak() / 2**30,
        "first_loss": first_loss,
    }


def resident_bytes() -> int:
    """The most memory that this process has held; includes the compiler's own."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def run_llama_jax(case: Case) -> dict:
    """Our step on one device."""
    import jax
    import numpy as np
    from flax import nnx

    from llama_jax.config.run import (
        AdamWConfig,
        ExecutionConfig,
        MeshConfig,
        NextTokenConfig,
        ScheduleConfig,
        TrainingConfig,
    )
    from llama_jax.models.init import make_model
    from llama_jax.objectives.objective import make_objective
    from llama_jax.optim.optimizer import make_optimizer
    from llama_jax.optim.schedule import make_schedule
    from llama_jax.sharding.mesh import make_mesh
    from llama_jax.sharding.rules import batch_sharding
    from llama_jax.training.networks import Networks
    from llama_jax.training.state import init_state
    from llama_jax.training.step import make_train_step

    config = model_config(case.model)
    execution = dataclasses.replace(
        ExecutionConfig(),
        compute_dtype=case.dtype,
        loss_chunk_size=case.chunk_size,
        remat=case.remat,
    )
    training = TrainingConfig(steps=1000)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1))
    schedule = make_schedule(ScheduleConfig(peak=1e-4, kind="constant"), training.steps)
    optimizer = make_optimizer(AdamWConfig(), schedule)
    objective = make_objective(NextTokenConfig(), execution)
    graphdef, params = nnx.split(make_model(config, execution, mesh, 0))
    train_step = make_train_step(Networks(graphdef), objective, optimizer, schedule, training)

    ids = np.random.default_rng(0).integers(
        0, config.vocab_size, (case.batch_size, case.seq_len + 1), dtype=np.int32
    )
    ones = np.ones((case.batch_size, case.seq_len), np.int32)
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "loss_mask": ones.astype(np.float32),
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
        "segment_ids": ones,
    }
    with jax.set_mesh(mesh):
        batch = jax.device_put(batch, batch_sharding(mesh))
        state = init_state(params, optimizer, jax.random.key(0))
        del params

        def step() -> float:
            nonlocal state
            state, metrics = train_step(state, batch)
            return float(jax.block_until_ready((state, metrics))[1]["loss"])

        device = jax.local_devices()[0]
        on_cpu = device.platform == "cpu"

        def peak() -> int:
            return resident_bytes() if on_cpu else device.memory_stats()["peak_bytes_in_use"]

        return measure(case, step, device.device_kind, peak)


def run_torch(case: Case) -> dict:
    """The step of transformers' Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = model_config(case.model)
    model = LlamaForCausalLM(
        LlamaConfig(
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
        )
    )
    cuda = case.device == "gpu"
    device = torch.device("cuda" if cuda else "cpu")
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(model) if case.engine == "torch-compile" else model
    ids = torch.randint(0, config.vocab_size, (case.batch_size, case.seq_len), device=device)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()  # the update too, not only what the loss waits for
        return float(loss)

    kind = torch.cuda.get_device_name() if cuda else "cpu"
    return measure(case, step, kind, torch.cuda.max_memory_allocated if cuda else resident_bytes)


def run_inputs(case: Case) -> dict:
    """Batches a second with the step taken out: standard library sources, byte tokens."""
    from etils import epath

    from llama_jax.config.files import load_run_config
    from llama_jax.sharding.mesh import make_mesh
    from llama_jax.training.inputs import prepare_inputs, start_batches

    overrides = [f"data.seq_len={case.seq_len}", f"data.batch_size={case.batch_size}"]
    config = load_run_config("tiny", [*overrides, f"model.max_seq_len={case.seq_len}"])
    with tempfile.TemporaryDirectory() as folder:
        inputs = prepare_inputs(config, epath.Path(folder), lambda line: None)
        batches = start_batches(config, inputs, make_mesh(config.mesh), None)
        rates = []
        for _ in range(case.repeats):
            start = time.perf_counter()
            for _ in range(50):
                next(batches)
            rates.append(50 / (time.perf_counter() - start))
        batches.close()
    return {**dataclasses.asdict(case), "batches_per_s": statistics.median(rates)}


RUNNERS = {
    "llama_jax": run_llama_jax,
    "torch-eager": run_torch,
    "torch-compile": run_torch,
    "inputs": run_inputs,
}


def environment_apart(device: str) -> dict[str, str]:
    """Variables of a process that is measured."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    if device == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
    environment.pop("XLA_FLAGS", None)  # emulated devices would share the cores
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # a hit would hide the compile time
    return environment


def run_apart(case: Any, script: str = __file__) -> dict[str, Any]:
    """The case in a fresh process: no engine's threads, caches or memory reach another's figure."""
    environment = environment_apart(getattr(case, "device", "cpu"))
    command = [sys.executable, script, "--case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**dataclasses.asdict(case), "error": reason}
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict:
    """What the figures were measured on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: installed(package) for package in packages},
    }


def print_result(result: dict) -> None:
    """One line of the table."""
    name = f"{result['model']:<14} {result['dtype']:<9} {result['engine']:<14}"
    if "error" in result:
        print(f"{name} failed: {result['error']}")
    elif "batches_per_s" in result:
        print(f"{name} {result['batches_per_s']:.1f} batches/s")
    else:
        mfu = "" if result["mfu"] is None else f"MFU {100 * result['mfu']:.1f} %  "
        print(
            f"{name} {result['tokens_per_s']:>9.1f} tokens/s {result['step_s']:>7.3f} s a step  "
            f"{mfu}processor {result['processor_s']:>7.3f} s  "
            f"compile {result['compile_s']:>6.1f} s  peak {result['peak_memory_gib']:>5.2f} GiB  "
            f"loss {result['first_loss']:.3f}"
        )
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["10m", "smollm2-135m"])
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--engines", nargs="+", default=[*ENGINES, "inputs"], choices=RUNNERS)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5, help="timed steps; the median is shown")
    parser.add_argument("--chunk-size", type=int, default=1024, help="of our cross entropy")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--remat", default="dots", help="our remat policy")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run every case, or, as a child process, one."""
    args = parse_arguments()
    if args.case:
        case = Case(**json.loads(args.case))
        print(json.dumps(RUNNERS[case.engine](case)))
        return
    has_torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    engines = [e for e in args.engines if has_torch or not e.startswith("torch")]
    shape = (args.batch_size, args.seq_len, args.repeats, args.chunk_size, args.remat)
    cases = [
        Case(args.device, engine, model, dtype, *shape)
        for model in args.models
        for dtype in args.dtypes
        for engine in engines
        if engine != "inputs"
    ]
    if "inputs" in engines:
        cases.append(Case(args.device, "inputs", "bytes", "-", *shape))
    results = []
    for case in cases:
        results.append(run_apart(case))
        if not args.json:
            print_result(results[-1])
    if args.json:
        print(json.dumps({"machine": machine(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
