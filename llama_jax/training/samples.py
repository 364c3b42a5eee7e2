"""Continuations of a few prompts at the end of a run, to see what the numbers mean.

Each token takes a full forward pass at one shape, so there is one compilation and no cache: right
for a few dozen tokens, not for serving.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from llama_jax.config.run import RunConfig
from llama_jax.data.device import host_rows, to_device
from llama_jax.data.example_build import chat_format_of
from llama_jax.sharding.rules import axis_size, lay_out
from llama_jax.tokenizers.chat import Message
from llama_jax.tokenizers.chat.template_files import template_of_folder
from llama_jax.tokenizers.tokenizer import Tokenizer
from llama_jax.training.inputs import TOKENIZER, local_folder
from llama_jax.training.networks import Networks
from llama_jax.training.state import TrainState, best_params

# Below 1, so that a small model stays within what it is sure of.
TEMPERATURE = 0.7


def sample_text(
    networks: Networks,
    state: TrainState,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    max_seq_len: int,
    temperature: float,
    key: jax.Array,
    mesh: Mesh,
    encode: Callable[[str], list[int]] | None = None,
) -> list[str]:
    """Each prompt with up to `new_tokens` tokens after it; it ends early at an end mark.

    Args:
      networks: the run's.
      state: its parameters, on `mesh`.
      tokenizer: the run's.
      prompts: texts.
      encode: a prompt's ids; by default each begins a document.
      new_tokens: at most these many are added.
      max_seq_len: prompts are cut from the left so that all fits.
      temperature: 0 takes the likeliest token.
      key: for drawing.
      mesh: the run's.
    """
    limit = max(1, max_seq_len - new_tokens)
    encode = encode or functools.partial(tokenizer.encode, bos=True)
    encoded = [encode(prompt)[-limit:] for prompt in prompts]
    # No place sees what comes after it, and not every vocabulary has padding.
    tokens_BT = _rows(encoded, new_tokens, tokenizer.eos_id, mesh)
    ends_B = np.array([len(ids) for ids in encoded] + [1] * (len(tokens_BT) - len(encoded)))
    next_tokens = _make_next_tokens(networks, temperature)
    weights = (best_params(state), state.frozen)
    stops = set(tokenizer.special.values())
    for count in range(new_tokens):
        batch = _batch(tokens_BT, mesh)
        drawn_B = np.asarray(next_tokens(*weights, batch, ends_B, jax.random.fold_in(key, count)))
        tokens_BT[np.arange(len(ends_B)), ends_B] = drawn_B
        ends_B = ends_B + 1
    made = [row.tolist() for row in tokens_BT[: len(encoded)]]
    return [
        tokenizer.decode(_until(stops, ids[len(start) : len(start) + new_tokens], start))
        for ids, start in zip(made, encoded, strict=True)
    ]


def write_samples(
    config: RunConfig,
    networks: Networks,
    state: TrainState,
    tokenizer: Tokenizer,
    mesh: Mesh,
    path: epath.Path,
) -> None:
    """What the model makes of the run's `sample_prompts`, into a text file.

    Where the run learns from conversations, prompts are what a user says in one.
    """
    training, step = config.training, int(state.step)
    texts = sample_text(
        networks,
        state,
        tokenizer,
        training.sample_prompts,
        new_tokens=training.sample_tokens,
        max_seq_len=config.model.max_seq_len,
        temperature=TEMPERATURE,
        key=jax.random.fold_in(jax.random.key(config.seed), step),
        mesh=mesh,
        encode=_chat_prompt(config, tokenizer, local_folder(path.parent)),
    )
    if jax.process_index() == 0:
        title = f"{path.parent.name}, step {step}, temperature {TEMPERATURE}"
        text = format_samples(training.sample_prompts, texts, title)
        path.write_text(text, encoding="utf-8")


def _chat_prompt(
    config: RunConfig, tokenizer: Tokenizer, run_dir: Path
) -> Callable[[str], list[int]] | None:
    """By the chat format of the first source that has one; None where all are plain text."""
    records = config.data.first_records
    if records is None:
        return None
    chat, _ = chat_format_of(records, tokenizer, template_of_folder(run_dir / TOKENIZER))
    return lambda prompt: chat.prompt([Message("user", prompt)])


def format_samples(prompts: Sequence[str], texts: Sequence[str], title: str) -> str:
    """The text of `samples.txt`: each prompt, a mark, and what the model wrote after it."""
    blocks = [
        f"--- sample {number}, prompt {prompt!r}\n{text}\n"
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1)
    ]
    return f"{title}\n\n" + "\n".join(blocks)


def _make_next_tokens(networks: Networks, temperature: float) -> Any:
    @jax.jit
    def next_tokens(
        params: Any, frozen: Any, batch: Any, ends_B: jax.Array, key: jax.Array
    ) -> jax.Array:
        model = networks.model(params, frozen)
        logits_BTV = model(
            batch["tokens"],
            positions_BT=batch["positions"],
            segment_ids_BT=batch["segment_ids"],
        )
        # Replicated, so that a place in the sequence can be picked whatever axis splits it.
        logits_BTV = lay_out(logits_BTV, (None, None, None))
        logits_BV = jax.vmap(lambda row_TV, end: row_TV[end - 1])(logits_BTV, ends_B)
        if temperature == 0:
            return jnp.argmax(logits_BV, axis=-1)
        return jax.random.categorical(key, logits_BV / temperature)

    return next_tokens


def _rows(encoded: Sequence[Sequence[int]], new_tokens: int, filler: int, mesh: Mesh) -> np.ndarray:
    """[B, T] tokens with room for the new ones, both rounded up to what the mesh divides."""
    rows = _round_up(len(encoded), axis_size("batch", mesh))
    length = max(map(len, encoded)) + new_tokens
    # A multiple of 64 as well: the shapes that kernels like.
    tokens_BT = np.full((rows, _round_up(length, 64 * axis_size("length", mesh))), filler, np.int32)
    for row, ids in zip(tokens_BT, encoded, strict=False):
        row[: len(ids)] = ids
    return tokens_BT


def _batch(tokens_BT: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
    # What comes after the last token can't be seen by it, so all of a row may be one segment.
    here = tokens_BT[host_rows(mesh, len(tokens_BT))]
    positions_BT = np.broadcast_to(np.arange(here.shape[1], dtype=np.int32), here.shape)
    arrays = {
        "tokens": here,
        "positions": positions_BT,
        "segment_ids": np.ones_like(here),
    }
    return to_device(arrays, mesh)


def _until(stops: set[int], ids: list[int], start: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return [token for token in start if token not in stops] + ids[:end]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
