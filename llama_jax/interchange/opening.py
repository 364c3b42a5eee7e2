"""Any checkpoint by its path: what it is, is said by what lies there."""

from pathlib import Path

from llama_jax.config import run_files
from llama_jax.interchange import orbax, run_checkpoint
from llama_jax.interchange.adapters import AdaptedSource, AdapterSource
from llama_jax.interchange.fingerprints import model_fingerprint
from llama_jax.interchange.hugging_face import CONFIG_FILE, HuggingFaceSource
from llama_jax.interchange.peft import PEFT_CONFIG_FILE, PeftAdapter
from llama_jax.interchange.source import InterchangeError, Source
from llama_jax.interchange.special_rows import StartedSource

HUB = "hf://"
# Everything of a repository that a source reads; its pickles and other frameworks' files stay.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
_LOOKED_FOR = (
    "config.json (Hugging Face), params.json (Meta), *.gguf, model.toml (converted), "
    "config.toml with checkpoints/ (a run), adapter_config.json (PEFT)"
)


def open_source(path: str | Path, *, adapter: str | Path | None = None) -> Source:
    """The checkpoint at `path`, merged with an adapter or not; reads headers and configs alone.

    Args:
      path: a Hugging Face folder, a Meta folder, a GGUF file or a folder with one, a folder that
        `convert --to orbax` made, a run's folder or one of its `checkpoints/step_N`, or
        `hf://org/name[@revision]`; a PEFT adapter whose own config names a checkpoint here;
        `run:NAME` is the folder of the run NAME.
      adapter: as `open_adapter` takes it.

    Raises:
      InterchangeError: nothing that is known lies there, or files at fault.
      ConfigError: a config that isn't a Llama's or can't be used.
    """
    if adapter is not None:
        return AdaptedSource(open_source(path), open_adapter(adapter))
    if str(path).startswith(HUB):
        path = _download(str(path))
    name, path = str(path), run_files.checkpoint_path(path)
    kind = recognise(path)
    if kind is None:
        raise InterchangeError(_absent(name, path) or f"{path}: looked for {_LOOKED_FOR}")
    return _open(kind, path)


def open_adapter(path: str | Path) -> AdapterSource:
    """The adapter at `path`: a PEFT folder, a run that trained one or its checkpoint, or `hf://`.

    Raises:
      InterchangeError: nothing that is known lies there, or files at fault.
      ConfigError: an adapter that can't be used.
    """
    if str(path).startswith(HUB):
        path = _download(str(path))
    name, path = str(path), run_files.checkpoint_path(path)
    kind = recognise(path)
    if kind == "run":
        adapter = run_checkpoint.RunAdapter(*_run_and_step(path))
        if adapter.starts_rows:
            raise InterchangeError(
                f"{path}: a run that also changed rows of special tokens (init.special_rows), "
                "which its adapter doesn't hold; the run itself is the model with both"
            )
        return adapter
    if (path / PEFT_CONFIG_FILE).is_file():
        return PeftAdapter(path)
    what = f"{path}: no adapter: neither adapter_config.json (PEFT) nor a run"
    raise InterchangeError(_absent(name, path) or what)


def _absent(name: str, path: Path) -> str | None:
    if path.exists():
        return None
    run = run_files.run_named(name)
    makes = f"; `llama-jax train {run}` makes it" if run else ""
    return f"{path}: no such file or folder{makes}"


def recognise(path: Path) -> str | None:
    """ "hf", "meta", "gguf", "orbax", "run" or "peft" by what lies at `path`; None for no such."""
    if path.is_file():
        return "gguf" if path.suffix == ".gguf" else None
    if run_checkpoint.run_of_checkpoint(path.absolute()) and (path / "state").is_dir():
        return "run"
    if (path / orbax.MODEL_FILE).is_file():
        return "orbax"
    config = path / run_files.CONFIG_FILE
    if config.is_file() and (path / run_files.CHECKPOINTS_FOLDER).is_dir():
        return "run"
    if (path / CONFIG_FILE).is_file():
        return "hf"
    if (path / "params.json").is_file() or any(path.glob("consolidated.*.pth")):
        return "meta"
    if (path / PEFT_CONFIG_FILE).is_file():
        return "peft"
    return "gguf" if any(path.glob("*.gguf")) else None


def _open(kind: str, path: Path) -> Source:
    # Readers that need further packages are imported when their files are met.
    if kind == "gguf":
        from llama_jax.interchange.gguf import open_gguf

        return open_gguf(path if path.is_file() else _only_gguf(path))
    if kind == "meta":
        from llama_jax.interchange.meta import open_meta

        return open_meta(path)
    if kind == "run":
        return _open_run(path)
    if kind == "peft":
        return _open_peft(path)
    return orbax.OrbaxSource(path) if kind == "orbax" else HuggingFaceSource(path)


def _run_and_step(path: Path) -> tuple[Path, int | None]:
    return run_checkpoint.run_of_checkpoint(path.absolute()) or (path, None)


def _open_run(path: Path) -> Source:
    run_dir, step = _run_and_step(path)
    about = run_checkpoint.RunCheckpoint(run_dir, step)
    if about.run.adapter is None:
        return run_checkpoint.RunSource(run_dir, step)
    adapter = run_checkpoint.RunAdapter(run_dir, step)
    if not (adapter.base.startswith(HUB) or Path(adapter.base).exists()):
        raise InterchangeError(
            f"{adapter.base}: no such file or folder; {run_dir} trained adapters on the checkpoint "
            f"there: set init.path in its {run_files.CONFIG_FILE} to where that is now, or name "
            "both, the run as --adapter"
        )
    base = open_source(adapter.base)
    _check_base(base, adapter)
    if adapter.starts_rows:
        base = StartedSource(base, adapter.load_tokenizer(), adapter.run.seed)
    return AdaptedSource(base, adapter, about=adapter)


def _check_base(base: Source, adapter: run_checkpoint.RunAdapter) -> None:
    """That the checkpoint is still the one that the adapters were trained beside.

    One that is itself merged isn't compared: its sums are rounded otherwise on another machine.
    """
    before = adapter.origins.get("init.path")
    if before is None or isinstance(base, AdaptedSource):
        return
    found = model_fingerprint(base)
    if found != before:
        raise InterchangeError(
            f"{adapter.base} holds another model now (fingerprint {found}) than when "
            f"{adapter.run_dir} trained adapters on it ({before}); set init.path in its "
            f"{run_files.CONFIG_FILE} to where that one is now, or name both, the run as --adapter"
        )


def _open_peft(path: Path) -> Source:
    adapter = PeftAdapter(path)
    if adapter.base is None or not Path(adapter.base).exists():
        named = f" ('{adapter.base}')" if adapter.base else ""
        raise InterchangeError(
            f"{path}: an adapter; name its checkpoint{named} too, with the adapter as --adapter"
        )
    return AdaptedSource(open_source(adapter.base), adapter)


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    # Of a split file any part stands for all of them.
    first = [file for file in files if "-of-" not in file.stem or "-00001-of-" in file.stem]
    if len(first) != 1:
        names = ", ".join(file.name for file in files)
        raise InterchangeError(f"{folder}: several GGUF files, name one of them: {names}")
    return first[0]


def _download(address: str) -> str:
    from huggingface_hub import snapshot_download

    name, _, revision = address.removeprefix(HUB).partition("@")
    if name.count("/") != 1:
        raise InterchangeError(
            f"{address}: not of the form hf://org/name or hf://org/name@revision"
        )
    try:
        return snapshot_download(
            name,
            revision=revision or None,
            allow_patterns=list(_HUB_FILES),
            ignore_patterns="*/*",
        )
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise InterchangeError(f"{address}: {type(error).__name__}: {line}") from error
