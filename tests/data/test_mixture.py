import numpy as np
import pytest

from llama_jax.data.mixture import Mixture
from llama_jax.data.packing import make_packing


def test_three_quarters_and_a_quarter():
    mixture = Mixture([3, 1], [512, 512])
    assert [mixture.locate(row) for row in range(8)] == [
        (0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [0.7, 0.2, 0.1], [5, 3, 3, 2, 1, 1, 0.5], [1, 1e-4], [1 / 3, 2 / 3]]
)
def test_each_source_gives_its_rows_in_order_and_none_twice(weights):
    mixture = Mixture(weights, [100.0] * len(weights))
    given = [0] * len(weights)
    shares = np.array(weights) / sum(weights)
    for row in range(20_000):
        source, row_of_source = mixture.locate(row)
        assert row_of_source == given[source]
        given[source] += 1
        # Even all along the way, not only in the end.
        assert np.max(np.abs(np.array(given) - shares * (row + 1))) < len(weights) + 0.05
    assert np.array(given) / 20_000 == pytest.approx(shares, abs=len(weights) / 20_000)


def test_far_rows_are_found_at_once():
    mixture = Mixture([2, 1], [1, 1])
    found = [mixture.locate(10**15 + row) for row in range(3)]
    assert sorted(source for source, _ in found) == [0, 0, 1]
    # In units of a millionth the shares are 666667 and 333333.
    assert found[0][1] in (10**9 * 666_667 - 1, 10**9 * 666_667, 10**9 * 333_333)


def test_best_fit_shares_are_of_tokens_not_of_rows():
    generator = np.random.default_rng(0)
    # 33 of 64 places filled in every row of the second source, nearly all in the first's.
    lengths = [generator.integers(1, 30, 2000), np.full(500, 33)]
    packings = [make_packing("best_fit", n, 64, str(s)) for s, n in enumerate(lengths)]
    fills = [packing.tokens_per_row for packing in packings]
    assert fills[1] == 33
    assert fills[0] > 63
    mixture = Mixture([0.6, 0.4], fills)
    tokens = [0, 0]
    for row in range(10_000):
        source, row_of_source = mixture.locate(row)
        pieces = packings[source].pieces(row_of_source)
        tokens[source] += sum(piece.stop - piece.start for piece in pieces)
    assert tokens[0] / sum(tokens) == pytest.approx(0.6, abs=1e-3)
