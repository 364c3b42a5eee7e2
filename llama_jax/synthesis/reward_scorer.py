"""A reward model as a scorer: the scalar of its head at the last token of the last answer.

B conversations at once, T places.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.data.encoding import written_spans
from llama_jax.inference.sessions import DType, default_dtype
from llama_jax.interchange.loading import Progress, load_model
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.source import source_chat_format
from llama_jax.models.llama import Llama
from llama_jax.sharding.mesh import make_mesh
from llama_jax.sharding.rules import axis_size, batch_sharding
from llama_jax.synthesis.prompts import SynthesisError
from llama_jax.synthesis.provenance import model_fingerprint
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.chat import ChatError, ChatFormat, Message

_SHORTEST = 32


class RewardScorer:
    """Scores conversations that end with an answer, as training of reward models reads them.

    Args:
      model: with a scalar head, on `mesh`.
      tokenizer: the model's.
      chat: its format.
      mesh: of the model; sequences aren't split.
      name: what records say.
      batch_size: conversations at once; changes no score but for float32's rounding of sums.

    Raises:
      ConfigError: a head of the vocabulary, or a mesh that splits sequences.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        chat: ChatFormat,
        mesh: Mesh,
        *,
        name: str,
        batch_size: int = 8,
    ) -> None:
        if model.config.head != "scalar":
            raise ConfigError("is no reward model: its head is the vocabulary's", source=name)
        if axis_size("length", mesh) > 1:
            raise ConfigError("scoring doesn't split sequences; it must be 1", key="mesh.context")
        self.name = name
        self._config, self._chat, self._mesh, self._rows = model.config, chat, mesh, batch_size
        self._pad = tokenizer.eos_id
        graphdef, self._params = nnx.split(model)
        self._run = jax.jit(functools.partial(_rewards, graphdef))

    def __call__(self, conversations: Sequence[Sequence[Message]]) -> list[float]:
        """One score each.

        Raises:
          SynthesisError: a conversation that the format can't express, that doesn't end with an
            answer, or that is longer than the model reads.
        """
        ids = [self._encode(conversation) for conversation in conversations]
        # Those of a length together: what is padded is paid for.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        scores = [0.0] * len(ids)
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            for i, score in zip(chosen, self._score([ids[i] for i in chosen]), strict=True):
                scores[i] = score
        return scores

    def _encode(self, conversation: Sequence[Message]) -> list[int]:
        if not conversation or conversation[-1].role != "assistant":
            raise SynthesisError("only conversations that end with an answer have a reward")
        try:
            encoded = self._chat.encode(conversation)
        except ChatError as error:
            raise SynthesisError(f"{self.name}: {error}") from None
        spans = written_spans(encoded.mask)
        if not spans:
            raise SynthesisError(f"{self.name}: the {self._chat.name} format shows no answer")
        ids = encoded.ids[: spans[-1][1]]
        if len(ids) > self._config.max_seq_len:
            raise SynthesisError(
                f"{self.name}: a conversation has {len(ids)} tokens; the model reads "
                f"{self._config.max_seq_len}"
            )
        return ids

    def _score(self, ids: Sequence[Sequence[int]]) -> list[float]:
        T = max(_SHORTEST, 1 << (max(map(len, ids)) - 1).bit_length())
        ways = axis_size("batch", self._mesh)
        shape = (-(-self._rows // ways) * ways, min(T, self._config.max_seq_len))
        tokens_BT, segment_ids_BT = np.full(shape, self._pad, np.int32), np.zeros(shape, np.int32)
        last_B = np.zeros(shape[0], np.int32)
        for row, each in enumerate(ids):
            tokens_BT[row, : len(each)], segment_ids_BT[row, : len(each)] = each, 1
            last_B[row] = len(each) - 1
        positions_BT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        with jax.set_mesh(self._mesh):
            arrays = (tokens_BT, positions_BT, segment_ids_BT)
            batch = jax.device_put(arrays, batch_sharding(self._mesh))
            rewards_BT = np.asarray(self._run(self._params, *batch))
        return rewards_BT[np.arange(len(ids)), last_B[: len(ids)]].tolist()


def open_reward_scorer(
    path: str,
    *,
    chat_format: str | None = None,
    dtype: DType | None = None,
    mesh: MeshConfig | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> RewardScorer:
    """The reward model at `path`, any checkpoint that interchange opens.

    Args:
      path: its scalar head is said by its config.
      chat_format: by name; by default as for generating.
      dtype: of parameters and computation; by default as for generating.
      mesh: where it is laid out; by default all devices share it.
      batch_size: conversations at once.
      progress: told the bytes read and those in all.

    Raises:
      ConfigError: no reward model.
      InterchangeError, TokenizerError, ChatError: one line each.
    """
    source = open_source(path)
    if source.config.head != "scalar":
        raise ConfigError("is no reward model: its head is the vocabulary's", source=path)
    tokenizer = source.load_tokenizer()
    chat = source_chat_format(source, tokenizer, name=chat_format)
    dtype = dtype or default_dtype()
    execution = ExecutionConfig(param_dtype=dtype, compute_dtype=dtype, remat="none")
    laid_out = make_mesh(mesh or MeshConfig())
    model = load_model(source, execution, laid_out, progress=progress)
    name = f"{source.path}@{model_fingerprint(source)}"
    return RewardScorer(model, tokenizer, chat, laid_out, name=name, batch_size=batch_size)


def _rewards(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> jax.Array:
    model = nnx.merge(graphdef, params)
    return model(tokens_BT, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT).astype(
        jnp.float32
    )
