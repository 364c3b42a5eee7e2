"""Our side of `post_training_beside_trl.py`, and what all sides share: steps of one batch.

All sides start from the same checkpoint and take the same ids: S sequences of T tokens, the first
quarter of each a prompt. DPO pairs sequences 2i (chosen) and 2i + 1, which share their prompt; ours
lays a pair into one row of 2 T, TRL into two rows of T.
"""

import dataclasses
import json
import os
import sys
import time
from typing import Any, Literal

import numpy as np
from train_step import model_config, resident_bytes

# What both sides are told; the rest is AdamW as Llama has it, and float32 all through.
RATE, B2, DECAY, CLIP_NORM, BETA, NLL_WEIGHT = 1e-4, 0.95, 0.1, 1.0, 0.1, 0.2
PAD, UNKNOWN, END = 0, 1, 2  # ids


@dataclasses.dataclass(frozen=True)
class Case:
    """One process's work; `weights` is a checkpoint's folder, "" where ours alone draws them."""

    engine: str
    stage: str
    model: str
    sequences: int
    seq_len: int
    steps: int
    reference: Literal["cached", "live"]
    weights: str


class Turns:
    """Steps when the parent asks for one, each answered with its figures."""

    def __init__(self) -> None:
        # Libraries print what they like; standard output is the parent's.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._begun = self._processor_begun = 0.0

    def wait(self) -> None:
        """Until it is this side's turn; its time begins then."""
        if not sys.stdin.readline():
            raise SystemExit("nobody is asking for steps")
        self._begun, self._processor_begun = time.perf_counter(), time.process_time()

    def answer(self, loss: float) -> None:
        """How long the step took, its loss, and the most memory held up to now."""
        step_s = time.perf_counter() - self._begun
        processor_s = time.process_time() - self._processor_begun
        peak_gib = resident_bytes() / 2**30
        figures = {"step_s": step_s, "processor_s": processor_s}
        self.tell({**figures, "loss": loss, "peak_memory_gib": peak_gib})

    def tell(self, figures: dict[str, float]) -> None:
        """A line to the parent."""
        print(json.dumps(figures), file=self._answers, flush=True)


def sequences(case: Case) -> np.ndarray:
    """int32 [S, T], random, each ending with `END`."""
    random = np.random.default_rng(0)
    ids_ST = random.integers(
        END + 1, model_config(case.model).vocab_size, (case.sequences, case.seq_len), np.int32
    )
    if case.stage == "dpo":
        ids_ST[1::2, : prompt_len(case)] = ids_ST[::2, : prompt_len(case)]
    ids_ST[:, -1] = END
    return ids_ST


def prompt_len(case: Case) -> int:
    """Tokens of each sequence that nothing is learned from."""
    return case.seq_len // 4


def run_llama_jax(case: Case, turns: Turns) -> None:
    """Our step, as `train` assembles it, on one device."""
    import jax

    from llama_jax.data.device import to_device
    from llama_jax.sharding.mesh import make_mesh
    from llama_jax.tokenizers.byte import ByteTokenizer
    from llama_jax.training.assembly import assemble, needs_reference
    from llama_jax.training.starting import starting_params
    from llama_jax.training.state import init_state

    config = run_config(case)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        assembly = assemble(config, mesh)
        start = starting_params(config, assembly, ByteTokenizer(), mesh, print)
        host_batch = lay_out(case, config)
        if needs_reference(config):
            placed = to_device(host_batch, mesh)
            host_batch["reference_logps"] = reference_logps(config, assembly, start, placed)
        state = init_state(start[0], assembly.optimizer, jax.random.key(0), start[1])
        del start
        batch = to_device(host_batch, mesh)
        turns.tell({})
        for _ in range(case.steps):
            turns.wait()
            state, metrics = jax.block_until_ready(assembly.train_step(state, batch))
            turns.answer(float(metrics["loss"]))


def run_config(case: Case) -> Any:
    """Our run; its data's path is never read."""
    from llama_jax.config import run

    model, batch_size, row_len = model_config(case.model), case.sequences, case.seq_len
    source = run.SourceConfig("random", conversations=run.ConversationsConfig("unread.jsonl"))
    objective = run.NextTokenConfig()
    if case.stage == "dpo":
        batch_size, row_len = batch_size // 2, 2 * row_len
        source = run.SourceConfig("random", preferences=run.PreferencesConfig("unread.jsonl"))
        objective = run.DPOConfig(beta=BETA, nll_weight=NLL_WEIGHT, reference=case.reference)
    return run.RunConfig(
        model=dataclasses.replace(model, max_seq_len=max(model.max_seq_len, row_len)),
        data=run.DataConfig(
            row_len, batch_size, (source,), packing="best_fit", responses_per_row=2
        ),
        training=run.TrainingConfig(steps=1000, clip_norm=CLIP_NORM),
        schedule=run.ScheduleConfig(peak=RATE, kind="constant"),
        tokenizer=run.ByteTokenizer(),
        optimizer=run.AdamWConfig(b2=B2, weight_decay=DECAY),
        objective=objective,
        init=run.InitConfig(case.weights) if case.weights else None,
        execution=run.ExecutionConfig(compute_dtype="float32"),
    )


class Examples:
    """The sequences, or pairs of them, as what rows are packed of."""

    def __init__(self, case: Case) -> None:
        self._case, self._ids_ST = case, sequences(case)

    def read(self, numbers: Any) -> list[Any]:
        """These."""
        return [self._example(number) for number in numbers]

    def _example(self, number: int) -> Any:
        from llama_jax.data.examples import Example

        count = 2 if self._case.stage == "dpo" else 1
        ids_RT = self._ids_ST[count * number : count * (number + 1)]
        segments_RT = np.arange(1, count + 1, dtype=np.uint8)[:, None].repeat(ids_RT.shape[1], 1)
        counts_RT = np.zeros_like(ids_RT, bool)
        counts_RT[:, prompt_len(self._case) - 1 : -1] = True
        paired = np.arange(1, count + 1, dtype=np.uint8) if count == 2 else np.zeros(0, np.uint8)
        return Example(
            tokens=ids_RT.reshape(-1),
            segments=segments_RT.reshape(-1),
            counts=counts_RT.reshape(-1),
            responses=np.where(counts_RT, segments_RT, 0).astype(np.uint8).reshape(-1),
            roles=paired,
            lasts=paired.astype(np.int32) * ids_RT.shape[1] - 1,
            pairs=np.array([[1, 2, 2]] if count == 2 else np.zeros((0, 3)), np.uint8),
        )


def lay_out(case: Case, config: Any) -> dict[str, np.ndarray]:
    """Our batch, without what a reference says."""
    from llama_jax.data.fields import batch_fields
    from llama_jax.data.packing import Piece
    from llama_jax.data.rows import pack_rows

    rows = [[Piece(number, 0, config.data.seq_len)] for number in range(config.data.batch_size)]
    documents: Any = Examples(case)
    return pack_rows(rows, documents, batch_fields(config.data))


def reference_logps(config: Any, assembly: Any, start: Any, batch: Any) -> np.ndarray:
    """float32 [B, R] under the model at step 0, as `train` computes them once."""
    import jax

    from llama_jax.objectives.responses import response_logps

    @jax.jit
    def ask(params: Any, frozen: Any, batch: Any) -> jax.Array:
        model = assembly.networks.model(params, frozen)
        return response_logps(model, batch, config.execution.loss_chunk_size)

    return np.asarray(ask(*start, batch))
