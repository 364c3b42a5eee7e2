"""llama3 scaling as GGUF has it, a tensor of divisors, to and from the numbers it comes from.

The divisor of a pair is its plain frequency over the scaled one: 1 where kept, the factor where
divided. Several settings may give the same divisors; the released ones are tried first. R pairs.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np

from llama_jax.config.model import Llama3Scaling
from llama_jax.interchange.tensors import InterchangeError

# Factor and original length of Llama 3.1 and 3.3, and of 3.2 1B and 3B.
_RELEASED = (Llama3Scaling(8.0, 8192), Llama3Scaling(32.0, 8192))
# What float32 arithmetic of other writers leaves between two shares of a frequency.
_TOLERANCE = 5e-7


def divisors(scaling: Llama3Scaling, theta: float, head_dim: int) -> np.ndarray:
    """float32 [R], what llama.cpp divides each pair's frequency by."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns_R = scaling.original_max_seq_len * _frequencies(theta, head_dim) / (2 * math.pi)
    kept_R = np.clip((turns_R - low) / (high - low), 0, 1) if high > low else turns_R > high
    return (1 / ((1 - kept_R) / scaling.factor + kept_R)).astype(np.float32)


def scaling_of(
    given_R: np.ndarray, theta: float, head_dim: int, stated: Llama3Scaling | None = None
) -> Llama3Scaling | None:
    """The scaling with these divisors, None where all are 1.

    Args:
      given_R: the file's divisors.
      theta: the rotary base.
      head_dim: 2 R.
      stated: what the file says they come from; the only candidate then.

    Raises:
      InterchangeError: no llama3 scaling gives them.
    """
    if given_R.shape != (head_dim // 2,):
        raise InterchangeError(f"shape {given_R.shape} for {head_dim // 2} rotary pairs of a head")
    if not np.isfinite(given_R).all() or (given_R <= 0).any():
        raise InterchangeError("not all divisors are positive numbers")
    if (given_R == 1).all():
        return None
    shares_R = 1 / given_R.astype(np.float64)
    guesses = itertools.chain(_RELEASED, _solutions(shares_R, theta, head_dim))
    for scaling in guesses if stated is None else [stated]:
        ours_R = 1 / divisors(scaling, theta, head_dim).astype(np.float64)
        if np.allclose(ours_R, shares_R, rtol=1e-6, atol=_TOLERANCE):
            return scaling
    wanted = "no llama3 scaling gives" if stated is None else f"{stated} doesn't give"
    raise InterchangeError(f"{wanted} these divisors of the frequencies")


def _frequencies(theta: float, head_dim: int) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _solutions(shares_R: np.ndarray, theta: float, head_dim: int) -> Iterator[Llama3Scaling]:
    """Settings worth a try: a pair's share kept rises in a line with its rate, in a band of rates.

    A rate is in turns a position. With fewer than two pairs in the band its width is open.
    """
    least = shares_R.min()
    if least >= 1:
        return
    factor = _short(1 / least)
    kept_R = (shares_R - least) / (1 - least)
    rates_R = _frequencies(theta, head_dim) / (2 * math.pi)
    band = np.flatnonzero((kept_R > 1e-6) & (kept_R < 1 - 1e-6))
    if len(band) >= 2:
        slope, offset = np.polyfit(rates_R[band], kept_R[band], 1)
        bands = [(-offset / slope, (1 - offset) / slope)]
    elif len(band) == 1:
        bands = _bands_through(rates_R, kept_R, band[0])
    else:
        bands = _bands_between(rates_R, kept_R)
    for none_at, all_at in bands:
        if 0 < none_at <= all_at:
            yield from _rounded(factor, none_at, all_at)


def _bands_through(rates_R: np.ndarray, kept_R: np.ndarray, at: int) -> list[tuple[float, float]]:
    """Bands, as the rates where nothing and where all is kept, with one pair inside."""
    rate, kept = rates_R[at], kept_R[at]
    faster = rates_R[at - 1] if at else 2 * rate
    slower = rates_R[at + 1] if at + 1 < len(rates_R) else rate / 2
    released = rate / (1 + 3 * kept)
    return [
        (released, 4 * released),
        ((rate - kept * faster) / (1 - kept), faster),
        (slower, slower + (rate - slower) / kept),
    ]


def _bands_between(rates_R: np.ndarray, kept_R: np.ndarray) -> list[tuple[float, float]]:
    """Bands that no pair lies in: the releases' width from a power of two, or no width at all."""
    slower = rates_R[kept_R < 0.5].max()
    faster = rates_R[kept_R > 0.5].min(initial=2 * slower)
    step = math.sqrt(slower * faster)
    return [(2.0**-power, 4 * 2.0**-power) for power in range(4, 21)] + [(step, step)]


def _rounded(factor: float, none_at: float, all_at: float) -> Iterator[Llama3Scaling]:
    """A band as settings: low is 1, and where the length then isn't whole, near it."""
    length, high = 1 / none_at, all_at / none_at
    whole = max(round(length), 1)
    yield Llama3Scaling(factor, whole, high_freq_factor=round(high, 3))
    low = whole * none_at
    yield Llama3Scaling(factor, whole, low_freq_factor=low, high_freq_factor=high * low)


def _short(value: float) -> float:
    return float(str(np.float32(value)))
