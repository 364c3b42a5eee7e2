"""Mismatched responses: with each preference one that was written for another prompt.

KTO's estimate of how far the policy is from the reference is a mean over such (arXiv 2402.01306).
"""

import dataclasses
from collections.abc import Iterable, Iterator

from llama_jax.data.documents import DataError
from llama_jax.data.records import Preference, Response


def alone(records: Iterable[Preference]) -> Iterator[tuple[Preference, None]]:
    """Each record without another's response."""
    return ((record, None) for record in records)


def with_mismatched(records: Iterable[Preference]) -> Iterator[tuple[Preference, Response]]:
    """Each record with a response of the next that asks something else; all by turns.

    Single responses to one prompt often follow each other. The last are given one of the first.

    Raises:
      DataError: all records ask the same.
    """
    waiting: list[Preference] = []  # all of one prompt
    begun: list[Preference] = []  # the first record, and the first that asks something else
    count = 0
    for record in records:
        if len(begun) < 2 and all(record.prompt != one.prompt for one in begun):
            begun.append(record)
        if waiting and waiting[0].prompt != record.prompt:
            for number, one in enumerate(waiting, count):
                yield one, _mismatched(record, number)
            count, waiting = count + len(waiting), []
        waiting.append(record)
    if not waiting:
        return
    other = next((one for one in begun if one.prompt != waiting[0].prompt), None)
    if other is None:
        raise DataError(f"{waiting[0].file}: mismatched responses need more than one prompt")
    for number, one in enumerate(waiting, count):
        yield one, _mismatched(other, number)


def _mismatched(record: Preference, count: int) -> Response:
    response = record.responses[count % len(record.responses)]
    return dataclasses.replace(response, role="mismatched")
