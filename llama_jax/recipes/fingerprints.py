"""What a file or folder holds, in sixteen hex digits: what a stage read, and what it wrote."""

import hashlib
from pathlib import Path

# Of a large file its size, beginning and end stand for the whole: weights are gigabytes, and no
# training leaves both ends as they were.
_WHOLE_BYTES, _END_BYTES = 64 * 2**20, 2**20


class RecipeError(ValueError):
    """Rounds that can't go on; `str(error)` is one line."""


def path_fingerprint(path: Path) -> str:
    """Of a file's content, or of a folder's files by their names and contents.

    Raises:
      RecipeError: nothing is there.
    """
    if not path.exists():
        raise RecipeError(f"{path}: no such file or folder")
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        _add(digest, file)
    return digest.hexdigest()[:16]


def _add(digest: "hashlib._Hash", file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE_BYTES:
            while chunk := stream.read(2**20):
                digest.update(chunk)
            return
        digest.update(stream.read(_END_BYTES))
        stream.seek(size - _END_BYTES)
        digest.update(stream.read())
