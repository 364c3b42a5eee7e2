"""Filling rows with pieces of given sizes: best-fit decreasing, with one limit or with two."""

import bisect

import numpy as np


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: the fullest row that still has room, else a new one.

    Args:
      sizes: decreasing, each from 1 to capacity.
      capacity: T.

    All pieces of one size are placed together: the fullest row with room takes as many of them
    as fit before any other row takes one, because each that it takes makes it fuller still.
    """
    row_of = np.empty(len(sizes), np.int64)
    rows, place = _OpenRows(capacity), 0
    groups, counts = np.unique(sizes, return_counts=True)
    for size, count in zip(groups[::-1].tolist(), counts[::-1].tolist(), strict=True):
        end = place + count
        while place < end:
            room = rows.least_room(size)
            each = room // size
            chosen = rows.take(room, -(-(end - place) // each))
            taken = min(end - place, each * len(chosen))
            row_of[place : place + taken] = np.repeat(chosen, each)[:taken]
            filled, rest = divmod(taken, each)
            rows.give_back(room - each * size, chosen[:filled])
            rows.give_back(room - rest * size, chosen[filled:])
            place += taken
    return row_of


class _OpenRows:
    """Rows grouped by the room left in them; new ones are opened when none has enough."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._opened = capacity, 0
        self._by_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []  # the keys of `_by_room`, increasing

    def least_room(self, size: int) -> int:
        """The least room of at least `size` that a row has; that of a new row if none has."""
        at = bisect.bisect_left(self._rooms, size)
        return self._rooms[at] if at < len(self._rooms) else self._capacity

    def take(self, room: int, most: int) -> list[int]:
        """Up to `most` rows with exactly this room."""
        if room not in self._by_room:
            self._opened += most
            return list(range(self._opened - most, self._opened))
        rows = self._by_room[room]
        taken = rows[-most:]
        del rows[-most:]
        if not rows:
            del self._by_room[room]
            self._rooms.remove(room)
        return taken

    def give_back(self, room: int, rows: list[int]) -> None:
        """Rows that have this room now; full ones are done with."""
        if not room or not rows:
            return
        if room not in self._by_room:
            bisect.insort(self._rooms, room)
        self._by_room.setdefault(room, []).extend(rows)


def best_fit_with_slots(
    sizes: np.ndarray, needs: np.ndarray, capacity: int, slots: int
) -> np.ndarray:
    """The row of each piece where rows have room for `slots` of something else, too.

    The fullest row with room and slots enough; of equally full ones that with fewest slots left.

    Args:
      sizes: decreasing, each from 1 to capacity.
      needs: slots that each piece takes, each from 0 to `slots`.
      capacity: T.
      slots: R.
    """
    row_of, opened = np.empty(len(sizes), np.int64), 0
    rooms: list[list[int]] = [[] for _ in range(slots + 1)]  # by slots left, increasing
    rows: dict[tuple[int, int], list[int]] = {}
    pairs = zip(sizes.tolist(), needs.tolist(), strict=True)
    for piece, (size, need) in enumerate(pairs):
        fits = []
        for left in range(need, slots + 1):
            at = bisect.bisect_left(rooms[left], size)
            fits += [(rooms[left][at], left)] if at < len(rooms[left]) else []
        if fits:
            room, left = min(fits)
            row = rows[room, left].pop()
            if not rows[room, left]:
                del rows[room, left]
                rooms[left].remove(room)
        else:
            room, left, row, opened = capacity, slots, opened, opened + 1
        row_of[piece] = row
        room, left = room - size, left - need
        if room:
            if (room, left) not in rows:
                bisect.insort(rooms[left], room)
            rows.setdefault((room, left), []).append(row)
    return row_of
