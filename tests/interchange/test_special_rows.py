"""Rows of special tokens that were never trained: found by name, started at the others' mean."""

import dataclasses

import numpy as np
import pytest
from in_memory import CONFIG, random_source

from llama_jax.interchange.opening import open_source
from llama_jax.interchange.special_rows import find_untrained_rows, started_at_mean
from llama_jax.interchange.tensors import BFLOAT16
from llama_jax.tokenizers.byte import ByteTokenizer

TOKENIZER = ByteTokenizer()
SPECIAL = TOKENIZER.special
NAMES = list(SPECIAL)


def base(dtype=np.float32, config=CONFIG):
    """A model of which four tokens' rows were never trained: two zero, two alike."""
    source = random_source(config, dtype=dtype)
    zero, small, one, other = (SPECIAL[name] for name in NAMES[2:6])
    for name in ("embedding", "lm_head"):
        if name in source.arrays:
            rows = source.arrays[name]
            rows[zero] = 0
            rows[small] = rows[small] * np.asarray(1e-4, dtype)
            rows[other] = rows[one]
    return source


def test_trained_rows_are_not_found_nor_what_fills_the_matrix_up():
    source = random_source()
    source.arrays["embedding"][272:] = 0
    assert find_untrained_rows(source, TOKENIZER) == ()


def test_rows_near_zero_and_alike_are_found_by_name_in_both_matrices():
    found = find_untrained_rows(base(), TOKENIZER)
    assert [rows.tensor for rows in found] == ["embedding", "lm_head"]
    for rows in found:
        assert list(rows.near_zero) == NAMES[2:4]
        assert list(rows.alike) == NAMES[4:6]
        assert rows.ids == [SPECIAL[name] for name in NAMES[2:6]]
    assert str(found[0]) == (
        "embedding: rows of special tokens that were never trained: "
        f"{NAMES[2]}, {NAMES[3]} (near zero); {NAMES[4]}, {NAMES[5]} (alike)"
    )


def test_a_tied_head_has_no_rows_of_its_own_and_ids_past_the_matrix_are_left_out():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True, vocab_size=270)
    assert [rows.tensor for rows in find_untrained_rows(base(config=tied), TOKENIZER)] == [
        "embedding"
    ]


def test_many_are_told_by_a_few_names():
    source = random_source()
    source.arrays["embedding"][256:272] = 0
    (rows,) = find_untrained_rows(source, TOKENIZER)
    assert len(rows.ids) == 16
    assert str(rows).endswith(f"{NAMES[5]} and 10 more (near zero)")


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_they_start_at_the_mean_of_ordinary_rows_each_its_own(dtype):
    source = base(dtype)
    found = find_untrained_rows(source, TOKENIZER)
    changed = started_at_mean(source, found, TOKENIZER, seed=1)
    for name in ("embedding", "lm_head"):
        old = source.arrays[name].astype(np.float64)
        new = changed[name].read_all()
        assert new.dtype == dtype
        ids = found[0].ids
        np.testing.assert_array_equal(
            np.delete(new, ids, 0), np.delete(source.arrays[name], ids, 0)
        )
        mean, spread = old[:256].mean(0), old[:256].std(0)
        apart = (new[ids].astype(np.float64) - mean) / spread
        # A fiftieth of the spread, over 4 x 64 draws; bfloat16 rounds by up to a 256th of a value.
        assert apart.std() == pytest.approx(0.02, rel=0.15)
        assert abs(apart.mean()) < 0.005
        assert len(np.unique(new[ids].astype(np.float32), axis=0)) == 4
        # By slices as by the whole.
        part = (slice(ids[0] - 1, ids[1] + 1), slice(5, 20))
        np.testing.assert_array_equal(changed[name].read(part), new[part])
    assert (
        find_untrained_rows(
            dataclasses.replace(
                source, arrays={**source.arrays, **{n: t.read_all() for n, t in changed.items()}}
            ),
            TOKENIZER,
        )
        == ()
    )


def test_smollm2_has_eleven_rows_that_are_one(smollm2_gguf):
    source = open_source(smollm2_gguf)
    (rows,) = find_untrained_rows(source, source.load_tokenizer())
    assert (rows.stored_name, len(rows.near_zero), len(rows.alike)) == ("token_embd.weight", 0, 11)
    assert {"<file_sep>", "<gh_stars>", "<empty_output>"} <= rows.alike.keys()
    assert not {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} & rows.alike.keys()


def test_a_rows_noise_is_its_own_whatever_else_is_new():
    source = base()
    found = find_untrained_rows(source, TOKENIZER)[0]
    alone = dataclasses.replace(found, near_zero={NAMES[2]: SPECIAL[NAMES[2]]}, alike={})
    row = SPECIAL[NAMES[2]]
    both = [
        started_at_mean(source, [rows], TOKENIZER, seed=4)["embedding"].read_all()[row]
        for rows in (found, alone)
    ]
    np.testing.assert_array_equal(*both)
    other = started_at_mean(source, [found], TOKENIZER, seed=5)["embedding"].read_all()[row]
    assert np.abs(other - both[0]).max() > 0
