"""SentencePiece models of every setting as `tokenizer.json`: the same ids in `tokenizers`."""

import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from llama_jax.tokenizers import TokenizerError
from llama_jax.tokenizers import sentencepiece_proto as protos
from llama_jax.tokenizers.merges import merges_of
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from llama_jax.tokenizers.sentencepiece_json import make_definition

IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SETTINGS = {
    "llama": {**IDENTITY, "split_digits": True, "allow_whitespace_only_pieces": True},
    "normalised": {},
    "no_prefix": {**IDENTITY, "add_dummy_prefix": False},
    "user_defined": {**IDENTITY, "user_defined_symbols": ["<sep>", "ab"]},
    "no_fallback": {**IDENTITY, "byte_fallback": False},
    "unsplit": {**IDENTITY, "split_by_whitespace": False, "split_by_unicode_script": False},
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def models(request, training_texts):
    written = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 430, "byte_fallback": True, "minloglevel": 2}
    lines = [line for text in training_texts for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        **{**options, **SETTINGS[request.param]},
    )
    ours = SentencePieceTokenizer(written.getvalue())
    made = Tokenizer.from_str(json.dumps(make_definition(ours)))
    made.encode_special_tokens = True
    return ours, made, sentencepiece.SentencePieceProcessor(model_proto=ours.proto)


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.sampled_from("abthe ou  wis\n\t12éß你🙂\u2581<sep>①ｈ\0")).map("".join),
    st.text("ab ", max_size=60),
)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS)
def test_three_ways_give_the_same_ids(models, text):
    ours, made, library = models
    ids = library.encode(text)
    assert ours.encode(text) == ids
    assert made.encode(text, add_special_tokens=False).ids == ids


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(3, 429), max_size=12))
def test_ids_have_the_text_of_the_library(models, ids):
    ours, _, library = models
    assert ours.decode(ids) == library.decode(ids)


def test_overlapping_pairs_of_one_token_are_listed_from_the_left():
    # In  ab a ba  both pairs make `aba`; SentencePiece joins the left one.
    known = {"a", "b", "ab", "ba", "aba"}
    assert merges_of(["aba"], known) == [("ab", "a"), ("a", "ba")]
    assert merges_of(["ab", "aba"], known - {"ba"}) == [("a", "b"), ("ab", "a")]
    assert set(merges_of(["aaa"], {"a", "aa"})) == {("a", "aa"), ("aa", "a")}


def test_unused_pieces_that_merging_can_reach_are_refused(spm):
    model = protos.parse_model(spm.proto)
    longest = max(model.pieces, key=lambda piece: len(piece.piece) * (piece.type == protos.NORMAL))
    longest.type = protos.UNUSED
    with pytest.raises(TokenizerError, match="unused pieces"):
        make_definition(SentencePieceTokenizer(model.SerializeToString()))
    model.pieces.remove(longest)
    model.pieces.add(piece="[PAD419]", type=protos.UNUSED)
    definition = make_definition(SentencePieceTokenizer(model.SerializeToString()))
    assert definition["model"]["vocab"]["[PAD419]"] == 419
