"""The parts of a SentencePiece model file that are read or written here, as protobuf messages.

Declared in code because the classes that `sentencepiece` ships are tied to one protobuf release.
Numbers and names are those of SentencePiece's public `sentencepiece_model.proto`; fields that are
not declared pass through unchanged.
"""

import functools
from typing import Any

from llama_jax.tokenizers.tokenizer import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2
SPACE = "\u2581"

_PIECE = {"piece": (1, "string"), "score": (2, "float"), "type": (3, "int32")}
_TRAINER = {
    "model_type": (3, "int32"),
    "vocab_size": (4, "int32"),
    "split_digits": (25, "bool"),
    "byte_fallback": (35, "bool"),
    "unk_id": (40, "int32"),
    "bos_id": (41, "int32"),
    "eos_id": (42, "int32"),
    "pad_id": (43, "int32"),
    "unk_piece": (45, "string"),
    "bos_piece": (46, "string"),
    "eos_piece": (47, "string"),
    "pad_piece": (48, "string"),
}
_NORMALIZER = {
    "name": (1, "string"),
    "precompiled_charsmap": (2, "bytes"),
    "add_dummy_prefix": (3, "bool"),
    "remove_extra_whitespaces": (4, "bool"),
    "escape_whitespaces": (5, "bool"),
}
_MESSAGES = {"Piece": _PIECE, "Trainer": _TRAINER, "Normalizer": _NORMALIZER}
_DEFAULTS = {
    ("Piece", "type"): "1",
    ("Trainer", "model_type"): "1",
    ("Trainer", "bos_id"): "1",
    ("Trainer", "eos_id"): "2",
    ("Trainer", "pad_id"): "-1",
    ("Normalizer", "add_dummy_prefix"): "true",
    ("Normalizer", "remove_extra_whitespaces"): "true",
    ("Normalizer", "escape_whitespaces"): "true",
}


def parse_model(proto: bytes, source: str = "tokenizer.model") -> Any:
    """A model with `pieces`, `trainer_spec` and `normalizer_spec`.

    Raises:
      TokenizerError: not a SentencePiece model; names `source`.
    """
    from google.protobuf.message import DecodeError

    try:
        model = _model_class().FromString(proto)
    except DecodeError:
        model = None
    if model is None or not model.pieces:
        raise TokenizerError(f"{source}: not a SentencePiece model")
    return model


def new_model() -> Any:
    """An empty model."""
    return _model_class()()


@functools.cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(
        name="llama_jax/sentencepiece_model.proto", package="llama_jax", syntax="proto2"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            default = _DEFAULTS.get((name, field))
            _add_field(message, field, number, kind, default=default)
    model = file.message_type.add(name="Model")
    _add_field(model, "pieces", 1, "Piece", repeated=True)
    _add_field(model, "trainer_spec", 2, "Trainer")
    _add_field(model, "normalizer_spec", 3, "Normalizer")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("llama_jax.Model"))


def _add_field(
    message: Any,
    name: str,
    number: int,
    kind: str,
    *,
    repeated: bool = False,
    default: str | None = None,
) -> None:
    field = message.field.add(name=name, number=number)
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    if kind in _MESSAGES:
        field.type, field.type_name = field.TYPE_MESSAGE, f".llama_jax.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")
    if default is not None:
        field.default_value = default
