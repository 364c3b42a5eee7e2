"""Mixtures: which source gives row i of the global stream, in fixed proportions of tokens.

The same for every host and after any resume: a formula of i, no random numbers and no state.
"""

import math
from collections.abc import Sequence

# Shares of the rows are taken in these units; a source's share is never less than one.
UNITS = 10**6


class Mixture:
    """An even interleaving of endless sources.

    Row j of a source with a share p of the rows is due at time (j + 1/2) / p; the global stream
    is all rows in order of due time, the earlier source first on a tie. So after i rows a source
    has given i * p of them, off by less than the number of sources: two sources with shares 3/4
    and 1/4 give a a b a a a b a ... All in integers: a rounding would repeat or skip a row.
    """

    def __init__(self, weights: Sequence[float], tokens_per_row: Sequence[float]) -> None:
        """Make the interleaving.

        Args:
          weights: tokens of each source relative to the others.
          tokens_per_row: mean tokens in a row of each source; padding is no token, so a source
            with emptier rows gives more of them.
        """
        rates = [weight / tokens for weight, tokens in zip(weights, tokens_per_row, strict=True)]
        self._units = [max(1, round(UNITS * rate / sum(rates))) for rate in rates]
        self._total = sum(self._units)
        whole = math.lcm(*self._units)
        self._intervals = [whole // units for units in self._units]

    def locate(self, row: int) -> tuple[int, int]:
        """Source and row within the source of row `row` of the global stream."""
        if len(self._units) == 1:
            return 0, row
        # By time t a source gave at most t * p + 1/2 rows, all together at most t plus half of
        # their number: starting this early, the walk below never starts past `row`.
        given = self._given_before(max(0, row - len(self._units)))
        for _ in range(row - sum(given)):
            given[self._next(given)] += 1
        source = self._next(given)
        return source, given[source]

    def _next(self, given: Sequence[int]) -> int:
        due = [(2 * n + 1) * interval for n, interval in zip(given, self._intervals, strict=True)]
        return due.index(min(due))

    def _given_before(self, time: int) -> list[int]:
        """Rows of each source due before `time`: those with j < time * p - 1/2."""
        total = self._total
        return [-(-(2 * time * units - total) // (2 * total)) for units in self._units]
