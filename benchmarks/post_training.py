"""What packing conversations is worth: useful tokens a second, packed rows beside padded ones.

  python benchmarks/post_training.py DATA.jsonl --tokenizer PATH
  python benchmarks/post_training.py gsm8k.jsonl --prompt-field question --completion-field answer

The same step on the same conversations, once with as many as fit a row, each seeing only itself,
and once with one a row, the rest of it padding. Useful tokens are those of conversations; a step's
shape, and so its time, is the same. Medians over the steps after the first.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = {
    **{"embed_dim": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32},
    **{"mlp_dim": 768, "norm_eps": 1e-5, "tie_embeddings": True, "rope": {"theta": 10000.0}},
}


def main() -> None:
    """A line a way of laying rows out, and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--tokenizer", help="a tokenizer's file or folder; default: bytes")
    parser.add_argument("--prompt-field", default="prompt")
    parser.add_argument("--completion-field", default="completion")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {
            packing: measure(arguments, packing, Path(folder) / packing)
            for packing in ("none", "best_fit")
        }
    for packing, figures in found.items():
        print(
            f"{packing:9s} {figures.filled:6.1%} of places filled, {figures.step_s:.3f} s a step, "
            f"{figures.useful_per_s:,.0f} useful tokens/s"
        )
    ratio = found["best_fit"].useful_per_s / found["none"].useful_per_s
    print(f"packed / padded: {ratio:.2f}")


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one packing."""

    filled: float
    step_s: float
    useful_per_s: float


def measure(arguments: argparse.Namespace, packing: str, folder: Path) -> Figures:
    """Train a few steps."""
    import jax
    import numpy as np
    from etils import epath
    from flax import nnx

    from llama_jax.config.loading import from_table
    from llama_jax.config.run import RunConfig
    from llama_jax.data.device import to_device
    from llama_jax.models.init import make_model
    from llama_jax.sharding.mesh import make_mesh
    from llama_jax.training.assembly import assemble
    from llama_jax.training.inputs import prepare_inputs, start_batches
    from llama_jax.training.state import init_state

    config = from_table(RunConfig, run_table(arguments, packing), "benchmark")
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        assembly = assemble(config, mesh)
        inputs = prepare_inputs(config, epath.Path(folder), print)
        model = make_model(config.model, config.execution, mesh, config.seed)
        state = init_state(nnx.state(model), assembly.optimizer, jax.random.key(0))
        batches, times, filled = start_batches(config, inputs, mesh, None), [], []
        for _ in range(arguments.steps + 1):
            batch = next(batches)
            placed = to_device(batch, mesh)
            begun = time.perf_counter()
            state, metrics = assembly.train_step(state, placed)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begun)
            filled.append(float(np.mean(batch["segment_ids"] > 0)))
        batches.close()
    step_s = statistics.median(times[1:])
    share = statistics.mean(filled[1:])
    places = arguments.batch_size * arguments.seq_len
    return Figures(share, step_s, share * places / step_s)


def run_table(arguments: argparse.Namespace, packing: str) -> dict[str, Any]:
    """A small model's fine-tuning."""
    from llama_jax.tokenizers import load_tokenizer

    vocabulary = 272
    tokenizer: dict[str, Any] = {"kind": "byte"}
    if arguments.tokenizer:
        vocabulary = load_tokenizer(arguments.tokenizer).vocab_size
        tokenizer = {"kind": "file", "path": arguments.tokenizer}
    conversations = {
        "path": arguments.data,
        "prompt_field": arguments.prompt_field,
        "completion_field": arguments.completion_field,
        "form": "completion" if arguments.prompt_field != "prompt" else "auto",
        "truncate": "drop",
    }
    return {
        "model": {**MODEL, "vocab_size": vocabulary, "max_seq_len": arguments.seq_len},
        "tokenizer": tokenizer,
        "data": {
            "seq_len": arguments.seq_len,
            "batch_size": arguments.batch_size,
            "packing": packing,
            "sources": [{"name": "conversations", "conversations": conversations}],
        },
        "training": {"steps": 1000},
        "schedule": {"peak": 1e-4},
        "execution": {"compute_dtype": "float32"},
        "metrics": {"progress": False},
    }


if __name__ == "__main__":
    main()
