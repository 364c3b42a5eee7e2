"""Writing beside a place and renaming into it: there is the whole new thing there, or the old one.

What fails leaves nothing behind.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to; on leaving without an error it becomes `target`.

    What stood at `target` is there until then, and is removed after it.
    """
    target = target.absolute()
    missing = [folder for folder in target.parents if not folder.exists()]
    staging = target.parent / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        new = staging / target.name
        yield new
        _put(new, target, staging / "replaced")
        missing = []
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        # Folders that were made on the way, if the target isn't in them now.
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def _put(new: Path, target: Path, replaced: Path) -> None:
    if not os.path.lexists(target):
        new.rename(target)
        return
    target.rename(replaced)
    try:
        new.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
