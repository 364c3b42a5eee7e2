"""Expected calibration error of pairs' order, from sums that batches and devices can add up.

A model that leads by d says that its order is right with probability sigmoid(|d|), from 1/2 to 1.
Bins of equal width cut that range; the error is the bins' mean distance between what was said and
what was so, weighted by their pairs.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

# Sums a bin: pairs, probabilities said, right orders; a tie is half right.
_PAIRS, _SAID, _RIGHT = "bins_pairs_", "bins_said_", "bins_right_"


def bin_sums(lead: jax.Array, is_pair: jax.Array, bins: int) -> dict[str, jax.Array]:
    """Scalars by name, three a bin, of the chosen response's lead in each pair."""
    said = jax.nn.sigmoid(jnp.abs(lead))
    right = jnp.where(lead == 0, 0.5, (lead > 0).astype(jnp.float32))
    place = jnp.clip(jnp.floor((said - 0.5) * 2 * bins), 0, bins - 1)
    sums = {}
    for number in range(bins):
        is_here = is_pair & (place == number)
        sums[f"{_PAIRS}{number}"] = is_here.sum(dtype=jnp.float32)
        sums[f"{_SAID}{number}"] = jnp.where(is_here, said, 0.0).sum()
        sums[f"{_RIGHT}{number}"] = jnp.where(is_here, right, 0.0).sum()
    return sums


def calibration_error(sums: Mapping[str, float], bins: int) -> float:
    """The error, from 0 to 1, of `bin_sums` added up over batches; 0 of no pairs."""
    pairs = sum(sums[f"{_PAIRS}{number}"] for number in range(bins))
    gaps = (abs(sums[f"{_SAID}{number}"] - sums[f"{_RIGHT}{number}"]) for number in range(bins))
    return sum(gaps) / max(pairs, 1.0)
