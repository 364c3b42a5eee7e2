"""What a batch holds: names, shapes and dtypes of its arrays, from the config alone.

B: rows, T: places in a row, R: responses, and pairs of them, that a row has room for, C: tokens of
a teacher's distribution that are stored.
"""

from typing import Any, NamedTuple

import numpy as np

from llama_jax.config.data import DataConfig

# Of every batch, [B, T].
FIELDS: dict[str, Any] = {
    "tokens": np.int32,
    "targets": np.int32,
    "loss_mask": np.float32,
    "positions": np.int32,
    "segment_ids": np.int32,
}
# Of preference batches, [B, R] but the first; see `rows`.
RESPONSE_IDS = "response_ids"
PAIR_FIELDS: dict[str, Any] = {"chosen": np.int32, "rejected": np.int32, "strength": np.int32}
ROLES = "roles"
REFERENCE_LOGPS = "reference_logps"
# By response or pair, not by place: these aren't split over the length.
BY_RESPONSE = frozenset({*PAIR_FIELDS, ROLES, REFERENCE_LOGPS})
# Of distillation from stored logits, [B, T, C].
TEACHER_FIELDS: dict[str, Any] = {"teacher_ids": np.int32, "teacher_logps": np.float32}


class Field(NamedTuple):
    """An array of the global batch. `zeros` of it is what padding rows hold."""

    shape: tuple[int, ...]
    dtype: Any


def batch_fields(
    config: DataConfig, *, reference_logps: bool = False, teacher_top_k: int = 0
) -> dict[str, Field]:
    """The arrays of every global batch of a run, held-out batches included.

    Args:
      config: the run's `data` table.
      reference_logps: whether preference batches carry log-probabilities under the reference.
      teacher_top_k: C; 0 where no teacher's logits are stored.

    Raises:
      ValueError: reference log-probabilities asked for where there are no preferences.
    """
    B, T, R, C = config.batch_size, config.seq_len, config.responses_per_row, teacher_top_k
    fields = {name: Field((B, T), dtype) for name, dtype in FIELDS.items()}
    if config.kind == "preferences":
        fields[RESPONSE_IDS] = Field((B, T), np.int32)
        fields |= {name: Field((B, R), dtype) for name, dtype in PAIR_FIELDS.items()}
        fields[ROLES] = Field((B, R), np.int32)
        if reference_logps:
            fields[REFERENCE_LOGPS] = Field((B, R), np.float32)
    elif reference_logps:
        raise ValueError(f"reference log-probabilities are of preferences, not of {config.kind}")
    if C:
        fields |= {name: Field((B, T, C), dtype) for name, dtype in TEACHER_FIELDS.items()}
    return fields
