import pickle

import numpy as np

from llama_jax.data.documents import ChainedDocuments, InMemoryDocuments, RecentDocuments


class Counting(InMemoryDocuments):
    """Notes what is read."""

    def __init__(self, documents):
        super().__init__(documents)
        self.reads = []

    def read(self, numbers):
        self.reads.append(list(numbers))
        return super().read(numbers)


def test_chained_documents_are_numbered_on_and_read_once_a_part():
    parts = [Counting([[1], [2, 2]]), Counting([[3] * 3]), Counting([[4] * 4, [5] * 5])]
    chained = ChainedDocuments(parts)
    assert chained.lengths.tolist() == [1, 2, 3, 4, 5]
    assert [tokens.tolist() for tokens in chained.read([4, 0, 1, 4])] == [
        [5] * 5,
        [1],
        [2, 2],
        [5] * 5,
    ]
    assert [part.reads for part in parts] == [[[0, 1]], [], [[1, 1]]]
    assert [chained.home(number) for number in range(5)] == [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]


def test_a_chain_is_another_when_a_token_or_the_order_is():
    a, b, c = (
        InMemoryDocuments([[1, 2]]),
        InMemoryDocuments([[1, 3]]),
        InMemoryDocuments([[1], [2]]),
    )
    chains = [[a, b], [b, a], [a, c], [a], [a, a]]
    assert len({ChainedDocuments(parts).fingerprint for parts in chains}) == 5


def test_recent_documents_are_read_once_while_they_fit():
    documents = Counting([[number] * 10 for number in range(6)])  # 40 bytes each
    recent = RecentDocuments(documents, limit_bytes=120)
    for numbers in ([0, 1], [1, 2, 1], [0], [3], [0, 3], [1]):
        found = recent.read(numbers)
        assert [tokens.tolist() for tokens in found] == [[number] * 10 for number in numbers]
    # 3 drives out 1, the longest unused, which is read again at the end.
    assert documents.reads == [[0, 1], [2], [3], [1]]


def test_a_document_over_the_limit_is_given_and_not_kept():
    documents = Counting([[1] * 10, [2]])
    recent = RecentDocuments(documents, limit_bytes=20)
    for _ in range(2):
        assert [tokens.tolist() for tokens in recent.read([0, 1])] == [[1] * 10, [2]]
    assert documents.reads == [[0, 1], [0]]


def test_what_is_kept_does_not_travel_to_workers():
    recent = RecentDocuments(InMemoryDocuments([[1] * 100_000]), limit_bytes=10**9)
    before = len(pickle.dumps(recent))
    recent.read([0])
    assert len(pickle.dumps(recent)) == before
    assert np.array_equal(pickle.loads(pickle.dumps(recent)).read([0])[0], [1] * 100_000)
