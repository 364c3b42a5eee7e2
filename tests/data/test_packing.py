import time

import numpy as np
import pytest

from llama_jax.data.documents import DataError, InMemoryDocuments
from llama_jax.data.fields import FIELDS, Field
from llama_jax.data.packing import (
    OnePass,
    Piece,
    TokenStream,
    best_fit_decreasing,
    cut,
    make_packing,
    permutation,
)
from llama_jax.data.rows import pack_rows, text_bytes


def text_fields(seq_len):
    return {name: Field((1, seq_len), dtype) for name, dtype in FIELDS.items()}


pytestmark = pytest.mark.short


def places(pieces):
    """Every (document, place within it) that the pieces hold."""
    return [(p.document, at) for p in pieces for at in range(p.start, p.stop)]


def every_place(lengths):
    return [(document, at) for document, n in enumerate(lengths) for at in range(n)]


def test_two_documents_in_a_row_look_like_the_picture():
    a, b, c, d, e = 1, 2, 3, 4, 5
    documents = InMemoryDocuments([[a, b, c, e], [d, e]])
    batch = pack_rows([[Piece(0, 0, 4), Piece(1, 0, 2)]], documents, text_fields(8))
    assert batch["tokens"].tolist() == [[a, b, c, e, d, e, 0, 0]]
    assert batch["targets"].tolist() == [[b, c, e, 0, e, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1, 0, 1, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 0, 0]]
    assert {name: array.dtype.name for name, array in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "loss_mask": "float32",
        "positions": "int32",
        "segment_ids": "int32",
    }


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_documents_that_fill_a_row_have_no_target_across_the_border(kind):
    # B18: [A B C E] and [D E'] in one row of 6.
    documents = InMemoryDocuments([[11, 12, 13, 2], [14, 2]])
    packing = make_packing(kind, documents.lengths, 6, "seed 2")
    batch = pack_rows([packing.pieces(0)], documents, text_fields(6))
    assert batch["tokens"].tolist() == [[11, 12, 13, 2, 14, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2]]
    trained = batch["loss_mask"] > 0
    pairs = list(zip(batch["tokens"][trained], batch["targets"][trained], strict=True))
    assert pairs == [(11, 12), (12, 13), (13, 2), (14, 2)]


def test_a_document_cut_by_the_row_end_keeps_its_target_there_and_restarts_in_the_next():
    documents = InMemoryDocuments([[1, 2, 3, 4, 5]])
    packing = OnePass(documents.lengths, 3)
    batch = pack_rows(
        [packing.pieces(row) for row in range(packing.rows)], documents, text_fields(3)
    )
    assert batch["tokens"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch["targets"].tolist() == [[2, 3, 4], [5, 0, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_stream_steps_over_empty_documents():
    stream = TokenStream(np.array([0, 3, 0, 0, 2, 0]), np.arange(6))
    assert list(stream.pieces(0, 5)) == [Piece(1, 0, 3), Piece(4, 0, 2)]
    assert list(stream.pieces(2, 4)) == [Piece(1, 2, 3), Piece(4, 0, 1)]
    assert list(stream.pieces(3, 3)) == []


@pytest.mark.parametrize("seq_len", [1, 7, 16, 50, 1000])
def test_concat_holds_every_token_once_an_epoch_and_drops_no_remainder(seq_len):
    lengths = np.array([5, 0, 17, 1, 3, 40, 8])  # 74 tokens
    packing = make_packing("concat", lengths, seq_len, "seed")
    epochs = 2 * seq_len  # 2 * seq_len * 74 tokens: a whole number of rows and of epochs
    rows = [packing.pieces(row) for row in range(2 * 74)]
    assert all(sum(p.stop - p.start for p in row) == seq_len for row in rows)
    counted = sorted(place for row in rows for place in places(row))
    assert counted == sorted(every_place(lengths) * epochs)


def test_concat_epochs_are_in_order_and_shuffled_anew():
    lengths = np.full(103, 16)
    packing = make_packing("concat", lengths, 16, "seed")
    first, second = (
        [packing.pieces(row)[0].document for row in range(begin, begin + 103)] for begin in (0, 103)
    )
    assert sorted(first) == sorted(second) == list(range(103))
    assert first != second
    assert first != sorted(first)


def test_concat_spreads_the_rows_of_a_long_document():
    packing = make_packing("concat", np.array([6400, 6400]), 64, "seed")
    followers = sum(
        packing.pieces(row + 1)[0].start == packing.pieces(row)[0].start + 64 for row in range(199)
    )
    assert followers < 10  # 199 if the rows came in the order of the stream


@pytest.mark.parametrize("kind", ["concat", "best_fit"])
def test_a_row_is_the_same_whenever_and_in_whatever_order_it_is_asked_for(kind):
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    walked = make_packing(kind, lengths, 32, "seed")
    forward = [walked.pieces(row) for row in range(900)]
    seeking = make_packing(kind, lengths, 32, "seed")
    for row in np.random.default_rng(1).permutation(900):
        assert seeking.pieces(int(row)) == forward[row]
    other = make_packing(kind, lengths, 32, "another seed")
    assert [other.pieces(row) for row in range(50)] != forward[:50]


def test_best_fit_holds_every_token_once_an_epoch_and_cuts_only_long_documents():
    lengths = np.random.default_rng(0).integers(0, 80, 300)
    packing = make_packing("best_fit", lengths, 32, "seed")
    rows_an_epoch = round(lengths.sum() / packing.tokens_per_row)
    for epoch in range(3):
        rows = [packing.pieces(epoch * rows_an_epoch + row) for row in range(rows_an_epoch)]
        assert sorted(p for row in rows for p in places(row)) == every_place(lengths)
        assert max(sum(p.stop - p.start for p in row) for row in rows) <= 32
        for piece in (p for row in rows for p in row):
            assert piece.start % 32 == 0
            assert piece.stop in (piece.start + 32, lengths[piece.document])


def naive_best_fit(sizes, capacity):
    """One piece at a time into the fullest row with room: the definition."""
    room = []
    for size in sizes:
        fits = [(left, row) for row, left in enumerate(room) if left >= size]
        if fits:
            room[min(fits)[1]] -= size
        else:
            room.append(capacity - size)
    return sorted(room)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("most", "count"), [(64, 400), (20, 400), (64, 1), (3, 100)])
def test_best_fit_fills_rows_as_the_definition_does(seed, most, count):
    sizes = np.sort(np.random.default_rng(seed).integers(1, most + 1, count))[::-1]
    row_of = best_fit_decreasing(sizes, 64)
    room = 64 - np.bincount(row_of, weights=sizes)
    assert sorted(room.tolist()) == naive_best_fit(sizes.tolist(), 64)


def test_best_fit_plans_100k_documents_in_seconds_and_leaves_little_padding():
    lengths = np.random.default_rng(0).lognormal(6, 1.2, 100_000).astype(np.int64) + 2
    start = time.process_time()
    packing = make_packing("best_fit", lengths, 2048, "seed")
    assert time.process_time() - start < 5
    assert packing.tokens_per_row / 2048 > 0.999


def test_cut_numbers_the_pieces_of_long_documents():
    documents, starts = cut(np.array([3, 0, 9, 4]), 4)
    assert documents.tolist() == [0, 2, 2, 2, 3]
    assert starts.tolist() == [0, 0, 4, 8, 0]


def test_permutation_is_pinned():
    # A checkpoint's position has a meaning only while these stay what they are.
    assert permutation(8, "0/text/documents/0").tolist() == [5, 4, 3, 6, 0, 7, 2, 1]
    assert sorted(permutation(1000, "a").tolist()) == list(range(1000))
    assert permutation(1000, "a").tolist() != permutation(1000, "b").tolist()


def test_no_tokens_is_an_error():
    with pytest.raises(DataError, match="not one token"):
        make_packing("concat", np.array([0, 0]), 8, "seed")


def test_bytes_of_text_add_up_to_the_documents_bytes():
    documents = InMemoryDocuments([[1] * 5, [2] * 12, [3]], text_bytes=[9, 30, 0])
    packing = OnePass(documents.lengths, 4)
    counts = [text_bytes([packing.pieces(row)], documents) for row in range(packing.rows + 1)]
    assert sum(counts) == pytest.approx(39, abs=1e-9)
    assert counts[0] == pytest.approx(9)  # all 4 targets of the first document stand in row 0
    assert counts[-1] == 0
