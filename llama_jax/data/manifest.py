"""`manifest.json`: what a folder of tokenised shards holds and what it was made from.

It is written last, so its presence says that the build is complete.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.data.documents import DataError
from llama_jax.data.files import SourceFile
from llama_jax.data.reading import sha256_of

MANIFEST_FILE = "manifest.json"
FORMAT = 1
# Sources up to this size are hashed again before a finished build is taken for theirs; above it
# the names and sizes of the files have to do.
_REHASH_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides every byte of a build but the text itself, which each shard's entry hashes.

    Attributes:
      format: version of the folder's layout.
      tokenizer: fingerprint of the tokenizer.
      vocab_size: of the tokenizer; ids are stored as uint16 where they fit, else uint32.
      source: the `TextConfig` as a table.
      files: hash of the names and sizes of the source's files.
      shard_bytes: a shard is closed by the document that reaches so many bytes of text.
    """

    format: int
    tokenizer: str
    vocab_size: int
    source: dict[str, Any]
    files: str
    shard_bytes: int

    @property
    def dtype(self) -> str:
        """Little-endian NumPy type of the stored ids."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A source file: its name in the source, bytes on disk, and their hash."""

    name: str
    bytes: int
    sha256: str | None  # None: it couldn't be read


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """A shard: `<name>.array_record` and `<name>.npy`.

    Attributes:
      name: of both files, without suffix.
      documents: records.
      tokens: ids, begin and end tokens included.
      bytes: UTF-8 bytes of text.
      text_sha256: of the texts, which says whether a shard made before is still the right one.
      sha256: of the array_record file.
      lengths_sha256: of the npy file.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    text_sha256: str
    sha256: str
    lengths_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything about a finished build.

    Attributes:
      documents, tokens, bytes: sums over the shards.
      dtype: of the stored ids.
      tokenizer: its fingerprint.
      skipped: number of problems by reason; see `reading.Reason`.
      problems: the first few of each reason, with file and line.
      plan, files, shards: what it was made from, and of what it consists.
    """

    documents: int
    tokens: int
    bytes: int
    dtype: str
    tokenizer: str
    skipped: dict[str, int]
    problems: list[str]
    plan: Plan
    files: list[FileEntry]
    shards: list[ShardEntry]


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json` so that it is there whole or not at all."""
    write_json(folder / MANIFEST_FILE, dataclasses.asdict(manifest))


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a finished build.

    Raises:
      DataError: no manifest (the build is not finished), or one that isn't understood.
    """
    path = folder / MANIFEST_FILE
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            **{
                **table,
                "plan": Plan(**table["plan"]),
                "files": [FileEntry(**entry) for entry in table["files"]],
                "shards": [ShardEntry(**entry) for entry in table["shards"]],
            }
        )
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; not a finished `data build`") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a manifest of format {FORMAT}: {error}") from None


def write_json(path: Path, table: Any) -> None:
    """Write JSON under a temporary name, then rename."""
    text = json.dumps(table, indent=1) + "\n"
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def check_same(before: Any, now: Any, folder: Path) -> None:
    """Whether two plans of one kind are of the same build.

    Where the source lies is no part of it: a folder that was moved holds the same files, whose
    names, sizes and hashes are compared.

    Raises:
      DataError: naming the first field that isn't the same.
    """
    for field in dataclasses.fields(before):
        old, new = (_placeless(getattr(plan, field.name)) for plan in (before, now))
        if old != new:
            raise DataError(_mismatch(folder, field.name, old, new))


def _placeless(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else value


def _mismatch(folder: Path, name: str, old: object, new: object) -> str:
    """The message for a folder that was built from something else."""
    if isinstance(old, dict) and isinstance(new, dict):
        key = next(k for k in sorted({*old, *new}) if old.get(k) != new.get(k))
        name, old, new = f"source.{key}", old.get(key), new.get(key)
    remedy = "delete it or build into another folder"
    if name == "files":
        return f"{folder} was built from other files than the source has now; {remedy}"
    return f"{folder} was built with {name} {old!r}, not {new!r}; {remedy}"


def check_hashes(entries: Sequence[FileEntry], files: Sequence[SourceFile], folder: Path) -> None:
    """Whether a build's files still hold what it was built from.

    Raises:
      DataError: one that doesn't.
    """
    if sum(file.size for file in files) > _REHASH_BYTES:
        return
    by_name = {file.name: file for file in files}
    for entry in entries:
        if sha256_of(by_name[entry.name]) != entry.sha256:
            raise DataError(
                f"{entry.name} has changed since {folder} was built from it; "
                "delete the folder or build into another one"
            )
