"""The models that settings name, opened."""

import datetime
from collections.abc import Callable

from llama_jax.config.loading import to_table
from llama_jax.inference.sessions import Session, open_session
from llama_jax.interchange.loading import Progress
from llama_jax.synthesis.reward_scorer import RewardScorer, open_reward_scorer
from llama_jax.synthesis.scoring import Scorer
from llama_jax.synthesis.settings import ModelTable


def open_model(
    table: ModelTable,
    *,
    batch_size: int = 8,
    date: datetime.date | None = None,
    progress: Progress | None = None,
) -> Session:
    """A model to sample from. Errors as `open_session`.

    Args:
      table: which, and how.
      batch_size: samples at once.
      date: today, for the chat formats that tell it; None keeps theirs, so that samples of other
        days are the same.
      progress: of loading.
    """
    axes = to_table(table.mesh)
    return open_session(
        table.path,
        chat=table.chat,
        chat_format=table.chat_format,
        date=date,
        dtype=table.dtype,
        overrides=[f"mesh.{name}={size}" for name, size in axes.items()],
        batch_size=batch_size,
        progress=progress,
    )


def scorer_opener(table: ModelTable | None, *, batch_size: int = 8) -> Callable[[], Scorer] | None:
    """What opens a reward model when it is needed, and once; None where there is none."""
    if table is None:
        return None
    opened: list[RewardScorer] = []

    def open_once() -> Scorer:
        if not opened:
            opened.append(
                open_reward_scorer(
                    table.path,
                    chat_format=table.chat_format,
                    dtype=table.dtype,
                    mesh=table.mesh,
                    batch_size=batch_size,
                )
            )
        return opened[0]

    return open_once
