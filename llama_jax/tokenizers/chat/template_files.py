"""The chat template that comes with a tokenizer: beside its files, or in a GGUF file."""

from pathlib import Path
from typing import Any

from llama_jax.tokenizers.hugging_face import CONFIG_FILE
from llama_jax.tokenizers.json_files import read_table
from llama_jax.tokenizers.tokenizer import TokenizerError

TEMPLATE_FILE = "chat_template.jinja"
_OLDER_FILE, _GGUF_FIELD = "chat_template.json", "tokenizer.chat_template"


def find_chat_template(path: Path) -> str | None:
    """The template of the tokenizer at `path`, which is as `load_tokenizer` takes it.

    Raises:
      TokenizerError: as `template_of_folder`, or a GGUF file that can't be read.
    """
    if path.suffix == ".gguf":
        return _of_gguf(path)
    return template_of_folder(path if path.is_dir() else path.parent)


def template_of_folder(folder: Path) -> str | None:
    """The template in `chat_template.jinja`, `chat_template.json` or the tokenizer's config.

    In this order, as transformers does; of several named ones the one named "default".

    Raises:
      TokenizerError: a file that can't be read, a template that is no text, or none of several is
        the default.
    """
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    for name in (_OLDER_FILE, CONFIG_FILE):
        path = folder / name
        template = read_table(path).get("chat_template")
        if template is not None:
            return _default_template(template, path)
    return None


def _default_template(template: Any, path: Path) -> str:
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template}
        if "default" not in named:
            raise TokenizerError(
                f"{path}: chat_template: none of {', '.join(sorted(named))} is named default"
            )
        template = named["default"]
    if not isinstance(template, str):
        raise TokenizerError(f"{path}: chat_template: expected text, got {template!r}")
    return template


def _of_gguf(path: Path) -> str | None:
    import gguf

    try:
        found = gguf.GGUFReader(path).fields.get(_GGUF_FIELD)
    except (OSError, ValueError, IndexError) as error:
        raise TokenizerError(f"{path}: not a GGUF file: {error}") from None
    return None if found is None else str(found.contents())
