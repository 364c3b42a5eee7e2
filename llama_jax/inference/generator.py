"""Completions of prompts: requests checked, rows batched, tokens turned into text.

The device is given its next steps before the host looks at the last ones, so it doesn't wait.
"""

import collections
import dataclasses
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.inference.buckets import plan_shapes
from llama_jax.inference.completions import Completion, InferenceError, Piece, Row
from llama_jax.inference.decoding import STEPS, Decoding, Emitted
from llama_jax.inference.engine import Engine
from llama_jax.inference.sampling import Sampling
from llama_jax.models.llama import Llama
from llama_jax.sharding.rules import axis_size
from llama_jax.tokenizers import Tokenizer

__all__ = ["Completion", "Generator", "InferenceError", "Piece"]


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """One row: the prompt's number in the request, its ids, and which sample of it."""

    prompt: int
    ids: tuple[int, ...]
    sample: int


class Generator:
    """A model and its tokenizer, ready for requests.

    A prompt's n-th sample depends on the prompt, the settings and n alone: neither on the other
    prompts of a call nor on how lengths are rounded, but for float32's rounding of sums.

    Args:
      model: its parameters on `mesh`; kept in the compute dtype, as it is made for generation
        (`models.unstacking`). Drop your reference to it to free what this doesn't share.
      tokenizer: for texts; ids of the model's vocabulary beyond the tokenizer's are never drawn.
      mesh: batch over data and fsdp, heads, MLP and vocabulary over tensor.
      batch_size: rows (prompts times samples) that are made at once.
      stacked: run the layers as one scanned program, which compiles sooner and is right for
        accelerators; by default so on all but CPUs, where unrolled layers are faster.

    Raises:
      ConfigError: the mesh splits sequences over its context axis; a reward model.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        batch_size: int = 32,
        stacked: bool | None = None,
    ) -> None:
        if axis_size("length", mesh) > 1:
            raise ConfigError(
                f"generating doesn't split sequences, so the axis must be 1, not "
                f"{axis_size('length', mesh)}; use data, fsdp or tensor",
                key="mesh.context",
            )
        if model.config.head != "vocab":
            raise ConfigError("a reward model scores text, it doesn't generate", key="model.head")
        if batch_size < 1:
            raise ConfigError(f"{batch_size} rows at once; at least 1", key="batch_size")
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self.config, self.tokenizer, self.mesh = model.config, tokenizer, mesh
        self._batch_size = batch_size
        self._engine = Engine(model, mesh, stacked=not on_cpu if stacked is None else stacked)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, n: int = 1
    ) -> list[list[Completion]]:
        """`n` completions of each prompt: `result[prompt][sample]`.

        Args:
          prompts: token ids, at least one each.
          sampling: for all of them.
          n: samples of each prompt, different ones unless sampling is greedy.

        Raises:
          ConfigError: a prompt, a stop id or a length that the model can't have; before anything
            is run.
          InferenceError: the model's logits hold NaN or infinity.
        """
        if n < 1:
            raise ConfigError(f"{n} samples of a prompt; at least 1", key="n")
        self._check(prompts, sampling)
        wanted = [
            _Wanted(number, tuple(map(int, ids)), sample)
            for number, ids in enumerate(prompts)
            for sample in range(n)
        ]
        made: list[Completion] = []
        for start in range(0, len(wanted), self._batch_size):
            made += self._complete(wanted[start : start + self._batch_size], sampling)
        return [made[start : start + n] for start in range(0, len(made), n)]

    def stream(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """The completion of one prompt as it comes: `generate`'s, in pieces.

        Raises: as `generate`, before the first piece.
        """
        self._check([prompt], sampling)
        return self._pieces(_Wanted(0, tuple(map(int, prompt)), 0), sampling)

    def _pieces(self, wanted: _Wanted, sampling: Sampling) -> Iterator[Piece]:
        row, told = Row(wanted.ids, sampling, self.tokenizer), 0
        # One step a dispatch: a token is told as soon as it is there.
        for tokens_BC, logprobs_BC in self._run([wanted], [row], sampling, steps=1):
            text = row.take_all(tokens_BC[0], logprobs_BC[0])
            if text or row.completion is not None:
                yield Piece(text, tuple(row.ids[told:]), row.completion)
                told = len(row.ids)

    def _complete(self, wanted: list[_Wanted], sampling: Sampling) -> list[Completion]:
        rows = [Row(one.ids, sampling, self.tokenizer) for one in wanted]
        for tokens_BC, logprobs_BC in self._run(wanted, rows, sampling, steps=STEPS):
            for row, tokens_C, logprobs_C in zip(rows, tokens_BC, logprobs_BC, strict=False):
                row.take_all(tokens_C, logprobs_C)
        return [row.completion for row in rows if row.completion is not None]

    def _run(
        self, wanted: list[_Wanted], rows: list[Row], sampling: Sampling, *, steps: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What each dispatch emits, until the caller's `rows` are all complete."""
        decoding = self._start(wanted, sampling)
        left = sampling.max_new_tokens
        under_way: collections.deque[Emitted] = collections.deque()
        while any(row.completion is None for row in rows):
            # The next dispatch goes out before the last one's tokens are looked at. Rows that the
            # host ends (stop strings) run on until then, and what they add is dropped.
            while left and len(under_way) < 2:
                ended_B = np.ones(decoding.rows, bool)
                ended_B[: len(rows)] = [row.completion is not None for row in rows]
                now = min(steps, left)
                under_way.append(decoding.step(now, ended_B))
                left -= now
            emitted = under_way.popleft()
            yield np.asarray(emitted.tokens), np.asarray(emitted.logprobs)

    def _start(self, wanted: list[_Wanted], sampling: Sampling) -> Decoding:
        """Every prompt's cache filled once, and a row for each sample."""
        prompts = {one.prompt: one.ids for one in wanted}
        shapes = plan_shapes(
            [len(ids) for ids in prompts.values()],
            len(wanted),
            sampling.max_new_tokens,
            axis_size("batch", self.mesh),
        )
        cache = self._engine.prefill(
            list(prompts.values()), shapes.prompts, shapes.chunks, shapes.cache_len
        )
        if len(wanted) > len(prompts):
            numbers = list(prompts)
            sources = np.zeros(shapes.rows, np.int32)
            sources[: len(wanted)] = [numbers.index(one.prompt) for one in wanted]
            cache = self._engine.fan_out(cache, sources)
        return self._engine.begin(
            cache,
            [one.ids for one in wanted],
            [_stream(one) for one in wanted],
            sampling,
            vocab_size=min(self.tokenizer.vocab_size, self.config.vocab_size),
            filled=sum(shapes.chunks),
        )

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        V, limit = self.config.vocab_size, self.config.max_seq_len
        for stop_id in sorted(sampling.stop_ids):
            if not 0 <= stop_id < V:
                raise ConfigError(
                    f"{stop_id} is outside the model's vocabulary of {V}", key="stop_ids"
                )
        for number, ids in enumerate(prompts):
            name = f"prompt {number}"
            if not len(ids):
                raise ConfigError(f"{name} has no tokens; begin with the tokenizer's bos_id")
            wrong = next((i for i in ids if not 0 <= i < V), None)
            if wrong is not None:
                raise ConfigError(f"{name}: token id {wrong} is outside the vocabulary of {V}")
            total = len(ids) + sampling.max_new_tokens
            if total > limit:
                raise ConfigError(
                    f"{name} has {len(ids)} tokens, {sampling.max_new_tokens} more make {total}; "
                    f"the model's max_seq_len is {limit}",
                    key="max_new_tokens",
                )


def _stream(one: _Wanted) -> int:
    """The number of the noise that a sample is drawn with: by its prompt, and which of it it is.

    By the sample's number alone prompts of one length would share their noise.
    """
    content = np.asarray([one.sample, *one.ids], np.int64).tobytes()
    return zlib.crc32(content) & 0x7FFFFFFF
