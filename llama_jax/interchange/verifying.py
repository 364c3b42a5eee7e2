"""Two checkpoints compared by the logits of one prompt, in float32 at the highest precision.

B batch (1), T length, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.source import Source
from llama_jax.interchange.tensors import BFLOAT16
from llama_jax.models.init import abstract_model
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers import Tokenizer

PROMPT = (
    "The quick brown fox jumps over the lazy dog.\n\n"
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n\n"
    "Il était une fois 3 petits cochons : 12345 + 678 = 13023."
)
_MOST_TOKENS = 64
# Relative to the largest logit. The same values give the same logits; a format that keeps a
# frequency or an epsilon in float32 moves them by its rounding.
ROUNDING = 2e-5


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far the logits of two checkpoints lie apart.

    Attributes:
      tokens: T, length of the prompt.
      max_difference: largest absolute difference of a logit.
      largest_logit: the first one's, in absolute value.
      same_top: positions at which both have the same most likely token.
    """

    tokens: int
    max_difference: float
    largest_logit: float
    same_top: int

    @property
    def within_rounding(self) -> bool:
        """Whether the two are the same model up to float32 rounding."""
        # Written so that a NaN is no agreement.
        bound = ROUNDING * max(self.largest_logit, 1.0)
        return self.max_difference <= bound and self.same_top == self.tokens


def compare(source: Source, other: Source, ids: list[int]) -> Comparison:
    """The logits of both after `ids`, one model on the devices at a time."""
    ours_TV, theirs_TV = (prompt_logits(each, ids) for each in (source, other))
    return Comparison(
        tokens=len(ids),
        max_difference=float(np.abs(ours_TV - theirs_TV).max()),
        largest_logit=float(np.abs(ours_TV).max()),
        same_top=int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum()),
    )


def prompt_ids(tokenizer: Tokenizer | None, vocab_size: int, max_seq_len: int) -> list[int]:
    """The fixed prompt's ids; without a tokenizer, ids from all over the vocabulary."""
    count = min(_MOST_TOKENS, max_seq_len)
    if tokenizer is None:
        return [int(i) for i in np.random.default_rng(0).integers(0, vocab_size, count)]
    ids = tokenizer.encode(PROMPT, bos=tokenizer.adds_bos)[:count]
    # A tokenizer may know more ids than the model has rows.
    return [token_id for token_id in ids if token_id < vocab_size]


def prompt_logits(source: Source, ids: list[int]) -> np.ndarray:
    """float32 [T, V] of one row of tokens; of a reward model its rewards, [T, 1]."""
    all_16_bit = all(tensor.dtype == BFLOAT16 for tensor in source.tensors.values())
    # Values that are bfloat16 anyway are kept so, and widened at use: half the memory.
    execution = ExecutionConfig(
        param_dtype="bfloat16" if all_16_bit else "float32", compute_dtype="float32"
    )
    mesh = _mesh(source, execution)
    with jax.default_matmul_precision("highest"), jax.set_mesh(mesh):
        graphdef, params = nnx.split(load_model(source, execution, mesh))
        tokens_BT = jnp.asarray(ids, jnp.int32)[None]
        return np.asarray(_logits(graphdef, params, tokens_BT))[0].reshape(len(ids), -1)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, params: nnx.State, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    positions_BT = jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape
    )
    return model(
        tokens_BT, positions_BT=positions_BT, segment_ids_BT=jnp.ones_like(tokens_BT)
    ).astype(jnp.float32)


def _mesh(source: Source, execution: ExecutionConfig) -> Mesh:
    """All devices over the MLP's and heads' width where they divide the model, else one.

    The prompt is one row, so nothing is split over the batch.
    """
    try:
        mesh = make_mesh(MeshConfig(fsdp=1, tensor=-1))
        abstract_model(source.config, execution, mesh)
    except ConfigError:
        return make_mesh(MeshConfig(), jax.devices()[:1])
    return mesh
