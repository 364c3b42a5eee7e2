"""Trained SentencePiece vocabularies: Llama 2's settings, the same bytes, nothing dropped."""

import pytest

from llama_jax.tokenizers import TokenizerError
from llama_jax.tokenizers.sentencepiece_training import train_sentencepiece


def pieces(tokenizer):
    return [piece.piece for piece in tokenizer.model.pieces]


def test_bytes_and_special_pieces_come_first(spm):
    names = pieces(spm)
    assert names[:3] == ["<unk>", "<s>", "</s>"]
    assert names[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert not any("\n" in name or "\t" in name for name in names)
    assert not any(len(name) > 1 and any(map(str.isdigit, name)) for name in names[259:])
    normalizer, trainer = spm.model.normalizer_spec, spm.model.trainer_spec
    assert (normalizer.name, normalizer.precompiled_charsmap) == ("identity", b"")
    assert (normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces) == (True, False)
    assert (trainer.byte_fallback, trainer.split_digits, trainer.pad_id) == (True, True, -1)


@pytest.mark.short
def test_the_same_text_gives_the_same_bytes(spm, training_texts):
    assert train_sentencepiece(training_texts, 420).proto == spm.proto


def test_merges_of_a_small_text_are_the_ones_worked_out_by_hand():
    # `ab` occurs twice a word, then it stands after the space as often as after itself.
    made = train_sentencepiece(["abab abab"] * 3, 259 + 2 + 3)
    assert pieces(made)[259:] == ["ab", "\u2581ab", "a", "b", "\u2581"]
    assert made.encode("abab ab") == [260, 259, 260]


def test_no_text_is_dropped_for_its_length_or_its_signs():
    # Lines of 6 MB, one with the sign that the trainer keeps for itself, one with NUL and tabs.
    long = "zyx " * 1_500_000
    signs = ["wvu\u2585wvu wvu", "tsr\0tsr\ttsr"] * 1000
    made = train_sentencepiece([long, *signs, long], 279)
    assert {"\u2581zyx", "\u2581wvu", "\u2581tsr"} <= set(pieces(made))
    assert not any("tsrt" in name or "\u2585" in name for name in pieces(made))


@pytest.mark.parametrize(
    ("texts", "vocab_size", "complaint"),
    [
        (["abab abab"], 4096, r"the text gives \d+ tokens, 4096 were asked for"),
        (["".join(map(chr, range(0x4E00, 0x4E00 + 500)))], 300, "need 760 tokens, 300 were asked"),
        ([], 300, "no text to train on"),
    ],
)
def test_a_size_that_does_not_fit_the_text_is_one_line(texts, vocab_size, complaint):
    with pytest.raises(TokenizerError, match=complaint):
        train_sentencepiece(texts, vocab_size)
