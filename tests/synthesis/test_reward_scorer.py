"""Scores of a small reward model: read at the last token, whatever the padding and the batch."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from small_sessions import BYTE, CONFIG

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import ExecutionConfig, MeshConfig
from llama_jax.models.init import make_model
from llama_jax.sharding.mesh import make_mesh
from llama_jax.synthesis.prompts import SynthesisError
from llama_jax.synthesis.reward_scorer import RewardScorer
from llama_jax.tokenizers.chat import Message, make_chat_format

SCALAR = dataclasses.replace(CONFIG, head="scalar", init_std=0.3, max_seq_len=128)
F32 = ExecutionConfig(compute_dtype="float32")
CHAT = make_chat_format(BYTE)


def scorer(config=SCALAR, *, mesh=MeshConfig(), devices=1, batch_size=4):  # noqa: B008
    made = make_mesh(mesh, jax.devices()[:devices])
    model = make_model(config, F32, made, 0)
    return RewardScorer(model, BYTE, CHAT, made, name="rewards", batch_size=batch_size), model, made


def conversation(answer, question="which?"):
    return [Message("user", question), Message("assistant", answer)]


CONVERSATIONS = [conversation("a" * n, "?" * (7 - n)) for n in (1, 3, 2, 6, 5)]
CONVERSATIONS.append([*conversation("no"), *conversation("yes")])


def by_hand(model, mesh, messages):
    """Hidden states of the one unpadded row, times the head, at the end of the last turn."""
    encoded = CHAT.encode(messages)
    ids = encoded.ids[: int(np.flatnonzero(encoded.mask)[-1]) + 1]
    assert ids[-1] == BYTE.special["<|eot_id|>"]
    tokens_BT = np.array([ids], np.int32)
    places_BT = np.arange(len(ids), dtype=np.int32)[None]
    with jax.set_mesh(mesh):
        x_BTD = nnx.jit(lambda model: model.hidden(
            jax.numpy.asarray(tokens_BT), positions_BT=jax.numpy.asarray(places_BT),
            segment_ids_BT=jax.numpy.ones_like(tokens_BT)))(model)  # fmt: skip
        return float(np.asarray(x_BTD)[0, -1] @ np.asarray(model.reward_head[...]))


def test_the_score_is_the_heads_value_at_the_last_token_of_the_last_answer():
    score, model, mesh = scorer()
    found = score(CONVERSATIONS)
    wanted = [by_hand(model, mesh, messages) for messages in CONVERSATIONS]
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    assert len({round(value, 3) for value in found}) == len(found)


def test_scores_depend_neither_on_batch_nor_order_nor_mesh():
    score, _, _ = scorer()
    together = score(CONVERSATIONS)
    np.testing.assert_allclose(score(CONVERSATIONS[::-1])[::-1], together, atol=2e-5)
    one, _, _ = scorer(batch_size=1)
    np.testing.assert_allclose([one([c])[0] for c in CONVERSATIONS], together, atol=2e-5)
    sharded, _, _ = scorer(mesh=MeshConfig(data=2, fsdp=2), devices=4)
    np.testing.assert_allclose(sharded(CONVERSATIONS), together, atol=2e-5)


def test_what_has_no_reward_is_refused():
    score, _, _ = scorer()
    with pytest.raises(SynthesisError, match="end with an answer"):
        score([[Message("user", "hm")]])
    with pytest.raises(SynthesisError, match=r"has \d+ tokens; the model reads 128"):
        score([conversation("a" * 200)])
    with pytest.raises(ConfigError, match="rewards: is no reward model"):
        scorer(dataclasses.replace(SCALAR, head="vocab"))
    with pytest.raises(ConfigError, match=r"mesh\.context: scoring doesn't split sequences"):
        scorer(mesh=MeshConfig(fsdp=1, context=2), devices=2)
