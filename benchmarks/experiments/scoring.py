"""What a model makes of answers that it was not trained on, and intervals of such figures.

E answers, B rows at once, T places.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.source import Source, source_chat_format
from llama_jax.losses.token_logps import token_logps
from llama_jax.sharding.mesh import make_mesh
from llama_jax.tokenizers.chat import Message

DRAWS = 2000  # of a bootstrap
ROW_MULTIPLE = 64  # tokens; each length compiles once


@dataclasses.dataclass(frozen=True)
class AnswerLogps:
    """Of each answer the log-probability and the tokens, the end of its turn included."""

    logps: np.ndarray  # [E]
    tokens: np.ndarray  # [E]

    @property
    def loss(self) -> float:
        """Nats a token of all answers together."""
        return float(-self.logps.sum() / self.tokens.sum())

    def loss_interval(self, other: "AnswerLogps | None" = None) -> tuple[float, float]:
        """95 % of a bootstrap over answers, of the loss or of how far `other`'s is below it."""

        def figure(picked: np.ndarray) -> float:
            tokens = self.tokens[picked].sum()
            mine = -self.logps[picked].sum() / tokens
            return mine + (other.logps[picked].sum() / tokens if other else 0.0)

        return bootstrap(figure, len(self.logps))


def answer_logps(
    checkpoint: str | Source, asked: Sequence[tuple[str, str]], *, rows: int = 8
) -> AnswerLogps:
    """Log-probabilities of answers to questions, in the checkpoint's chat format, in float32."""
    source = open_source(checkpoint) if isinstance(checkpoint, str) else checkpoint
    chat = source_chat_format(source, source.load_tokenizer())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    execution = ExecutionConfig(compute_dtype="float32", remat="none")
    graphdef, params = nnx.split(load_model(source, execution, mesh))

    @jax.jit
    def ask(params: nnx.State, tokens_BT: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        places_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        positions_BT = jnp.broadcast_to(places_T, tokens_BT.shape)
        segments_BT = jnp.ones_like(tokens_BT)
        x_BTD = model.hidden(tokens_BT, positions_BT=positions_BT, segment_ids_BT=segments_BT)
        x_BTD, head_DV = model.for_loss(x_BTD)
        # The last place of a row predicts its first token, which nobody counts.
        targets_BT = jnp.roll(tokens_BT, -1, axis=1)
        return token_logps(x_BTD, head_DV, targets_BT, chunk_size=1024)

    encoded = [
        chat.encode([Message("user", question), Message("assistant", answer)])
        for question, answer in asked
    ]
    logps_E, tokens_E = np.zeros(len(asked)), np.zeros(len(asked), int)
    order = sorted(range(len(asked)), key=lambda e: len(encoded[e].ids))
    with jax.set_mesh(mesh):
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            longest = max(len(encoded[e].ids) for e in chosen)
            tokens_BT = np.zeros((rows, -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE), np.int32)
            for row, e in enumerate(chosen):
                tokens_BT[row, : len(encoded[e].ids)] = encoded[e].ids
            logps_BT = np.asarray(ask(params, tokens_BT), np.float64)
            for row, e in enumerate(chosen):
                counts_T = np.array(encoded[e].mask[1:], bool)
                logps_E[e] = logps_BT[row, : len(counts_T)][counts_T].sum()
                tokens_E[e] = counts_T.sum()
    return AnswerLogps(logps_E, tokens_E)


def bootstrap(figure: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """The middle 95 % of a figure of `count` things, drawn again with replacement."""
    draw = np.random.default_rng(0)
    found = [figure(draw.integers(0, count, count)) for _ in range(DRAWS)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)
