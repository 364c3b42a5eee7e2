"""Which files a source of text means, and which part of them is kept aside.

A `TextConfig.path` is a file, a directory, a glob, `stdlib`: this Python's own library, or
`shipped:NAME`: a small file that comes with the package. Any fsspec URL works, such as
`gs://bucket/folder`.
"""

import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llama_jax.config.data import RecordsConfig, TextConfig
from llama_jax.config.files import shipped_configs
from llama_jax.config.loading import ConfigError, nearest

STDLIB = "stdlib"
# Before the name of a file of `configs/data/`, wherever the package is installed.
SHIPPED = "shipped:"
# Installed packages, tests (they repeat what they test) and bytecode are not the library.
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
# Written when Python was built on this machine, not the same elsewhere.
_MACHINE_MADE = ("_sysconfigdata", "config-", "sitecustomize", "usercustomize")


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
      name: its path within the source, with `/`.
      url: what fsspec opens.
      size: bytes on disk.
      group: files of one group fall into the same part; the part is a hash of this name.
    """

    name: str
    url: str
    size: int
    group: str


def list_files(config: TextConfig) -> list[SourceFile]:
    """The files of `config.path` in the order of their names, before any part is chosen.

    In a directory, names that start with a dot are left out, and links to folders are not followed.

    Raises:
      ConfigError: nothing there, or no file with one of the suffixes.
    """
    if config.path == STDLIB:
        return sorted(_library_files(), key=lambda file: file.name)
    if config.path.startswith(SHIPPED):
        config = dataclasses.replace(config, path=_shipped(config.path.removeprefix(SHIPPED)))
    files = sorted(_files_at(config), key=lambda file: file.name)
    if not files:
        wanted = " ".join(config.suffixes)
        raise ConfigError(f"no file in {config.path} ends in one of: {wanted}", key="path")
    return files


def in_part(name: str, config: TextConfig | RecordsConfig) -> bool:
    """Whether what is called `name` belongs to `config.part`; the same on every machine."""
    if config.part == "all":
        return True
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "replace")).digest()[:8], "big")
    held_out = number < config.held_out_fraction * 2**64
    return held_out == (config.part == "held_out")


def module_group(name: str) -> str:
    """The top-level module or package of a library file.

    An accelerator's Python twin goes with its module: `_pydecimal.py` belongs to `decimal`.
    """
    top = PurePosixPath(name).parts[0].removesuffix(".py")
    if top.startswith("__"):
        return top
    return top.removeprefix("_py").removeprefix("_") or top


def local_path(path: str) -> Path:
    """A path as it is given, or that of a shipped file by `shipped:NAME`.

    Raises:
      ConfigError: no such shipped file, with the nearest.
    """
    if path.startswith(SHIPPED):
        return Path(_shipped(path.removeprefix(SHIPPED)))
    return Path(path)


def _shipped(name: str) -> str:
    folder = shipped_configs() / "data"
    if not (folder / name).is_file():
        known = sorted(path.name for path in folder.iterdir())
        raise ConfigError(f"no shipped file '{name}'{nearest(name, known)}", key="path")
    return str(folder / name)


def _library_files() -> Iterator[SourceFile]:
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, names in os.walk(root):
        # In place, so that a large site-packages is not walked.
        folders[:] = sorted(set(folders) - _NOT_LIBRARY)
        for path in (Path(folder) / name for name in names if name.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if not name.startswith(_MACHINE_MADE):
                yield SourceFile(name, str(path), path.stat().st_size, module_group(name))


def _files_at(config: TextConfig) -> Iterator[SourceFile]:
    file_system, root = _file_system(config.path)
    unstrip = file_system.unstrip_protocol if "://" in config.path else str
    if file_system.isfile(root):
        name = PurePosixPath(root).name
        yield SourceFile(name, unstrip(root), int(file_system.size(root)), name)
    elif file_system.isdir(root):
        for path, size in _find(file_system, root):
            name = _relative(path, root)
            if name.endswith(config.suffixes):
                yield SourceFile(name, unstrip(path), size, name)
    elif any(sign in root for sign in "*?["):
        folder = _folder_of_glob(root)
        for path, info in file_system.glob(root, detail=True).items():
            if _is_file(file_system, info):
                name = _relative(path, folder)
                yield SourceFile(name, unstrip(path), int(info["size"]), name)
    else:
        raise ConfigError(f"no such file or directory: {config.path}", key="path")


def _file_system(path: str) -> tuple[Any, str]:
    import fsspec

    try:
        file_system, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{path}: {error}", key="path") from None
    return file_system, root


def _find(file_system: Any, root: str) -> Iterator[tuple[str, int]]:
    for _, folders, files in file_system.walk(root, detail=True):
        for name in [name for name in folders if name.startswith(".")]:
            del folders[name]  # in place: not walked
        for name, info in files.items():
            if not name.startswith(".") and _is_file(file_system, info):
                yield info["name"], int(info["size"] or 0)


def _is_file(file_system: Any, info: dict[str, Any]) -> bool:
    # A link to nothing counts: reading will name it. Pipes and devices would block.
    is_link = info.get("islink", False)
    return info["type"] == "file" or (is_link and not file_system.isdir(info["name"]))


def _folder_of_glob(pattern: str) -> str:
    parts = pattern.split("/")
    plain = next(i for i, part in enumerate(parts) if any(sign in part for sign in "*?["))
    return "/".join(parts[:plain])


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root.rstrip("/")).lstrip("/")
