"""Names and places of the special tokens: those of Llama 3.1 and later, after the ordinary ones."""

from collections.abc import Mapping

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
RIGHT_PAD = "<|finetune_right_pad_id|>"

_NAMED = (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    RIGHT_PAD,
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)

LLAMA3_SPECIAL_COUNT = 256
# Our own vocabularies: every named one, so that chat formats work, and 4 spare.
SMALL_SPECIAL_COUNT = 16


def special_tokens(first_id: int, count: int) -> dict[str, int]:
    """`count` special tokens with ids from `first_id`, in the order of Llama 3.1."""
    spare = (f"<|reserved_special_token_{i}|>" for i in range(2, 2 + count - len(_NAMED)))
    return {name: first_id + i for i, name in enumerate((*_NAMED, *spare))}


def pad_token(special: Mapping[str, int]) -> int | None:
    """The padding id, or None where no token is meant for it.

    Llama 3 of April 2024 had not named it yet: there the same id is the third reserved one.
    """
    return special.get(RIGHT_PAD, special.get("<|reserved_special_token_2|>"))
