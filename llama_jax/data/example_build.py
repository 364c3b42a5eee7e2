"""Conversations and preferences to stored examples, once, in a run's folder.

A build that was killed leaves no manifest and is made anew: encoding is quick beside training.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from llama_jax.config.data import ConversationsConfig, DataConfig, PreferencesConfig
from llama_jax.config.loading import ConfigError, to_table
from llama_jax.data.build_progress import BuildProgress
from llama_jax.data.documents import DataError
from llama_jax.data.encoding import Encoder, Made
from llama_jax.data.example_files import (
    EXAMPLES,
    FORMAT,
    SIZES,
    ExampleManifest,
    ExamplePlan,
    load_example_manifest,
    save_example_manifest,
)
from llama_jax.data.examples import Example
from llama_jax.data.files import SourceFile
from llama_jax.data.manifest import MANIFEST_FILE, FileEntry, check_hashes, check_same
from llama_jax.data.mismatched import alone, with_mismatched
from llama_jax.data.reading import Problem, sha256_of
from llama_jax.data.record_files import record_files
from llama_jax.data.record_source import read_conversations, read_preferences
from llama_jax.data.record_summary import Tally
from llama_jax.data.records import Preference, RecordError
from llama_jax.data.shard_pool import remove_temporary
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.chat import ChatError, ChatFormat, make_chat_format

RecordsSource = ConversationsConfig | PreferencesConfig
_WRITER_OPTIONS = "group_size:1,zstd:3,max_parallelism:1"


def build_examples(
    source: RecordsSource,
    config: DataConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    progress: bool,
    template: str | None = None,
) -> ExampleManifest:
    """Encode a source into `folder`; a finished build of the same source is returned at once.

    Args:
      source: the records.
      config: the run's `data` table, for the sizes of rows.
      tokenizer: the run's.
      folder: made if absent; on a local disk.
      progress: draw a bar on stderr.
      template: the tokenizer's chat template, for sources that name no format.

    Raises:
      ConfigError: no file at the source's path, or a chat format that isn't there.
      DataError: the folder belongs to another source, or no record can be used.
    """
    chat, plan, files = _plan(source, config, tokenizer, template)
    finished = _finished(folder, plan, files)
    if finished is not None:
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    encoder = Encoder(tokenizer, chat, config.seq_len, source.truncate)
    tally = Tally("preferences" if isinstance(source, PreferencesConfig) else "conversations")
    with _progress(files, progress) as on_bytes:
        if isinstance(source, ConversationsConfig):
            made = _conversations(source, encoder, tally, on_bytes)
        else:
            made = _preferences(source, encoder, tally, on_bytes, config.responses_per_row)
        digest = _write(folder, made, tokenizer)
    if digest is None:
        raise DataError(
            f"{source.path} holds no record that can be used"
            f"{tally.skipped()}{tally.first_problem()}"
        )
    entries = [FileEntry(file.name, file.size, sha256_of(file)) for file in files]
    manifest = ExampleManifest(tokenizer.fingerprint, digest, tally.summary(), plan, entries)
    save_example_manifest(manifest, folder)
    return manifest


def _conversations(
    source: ConversationsConfig, encoder: Encoder, tally: Tally, on_bytes: Callable[[int], None]
) -> Iterator[Made]:
    for record in read_conversations(source, on_bytes):
        if isinstance(record, Problem):
            tally.skip(record)
            continue
        try:
            made = encoder.conversation(record, source.train_on)
        except RecordError as error:
            tally.skip(error.problem(record))
            continue
        tally.keep(made, f"{record.file}:{record.line}")
        yield made


def _preferences(
    source: PreferencesConfig,
    encoder: Encoder,
    tally: Tally,
    on_bytes: Callable[[int], None],
    slots: int,
) -> Iterator[Made]:
    wanted = _wanted(source, tally, on_bytes, slots)
    for record, other in with_mismatched(wanted) if source.mismatched else alone(wanted):
        try:
            made = encoder.preference(
                record,
                shared_prompt=source.shared_prompt,
                mask_formatting=source.mask_formatting,
                mismatched=other,
            )
        except RecordError as error:
            tally.skip(error.problem(record))
            continue
        tally.keep(made, f"{record.file}:{record.line}")
        tally.count_responses((r.role, r.model) for r in record.responses)
        tally.count_pairs(pair.strength for pair in record.pairs)
        if other is not None:
            tally.count_responses([(other.role, other.model)])
        yield made


def _wanted(
    source: PreferencesConfig, tally: Tally, on_bytes: Callable[[int], None], slots: int
) -> Iterator[Preference]:
    """The preferences with pairs of the wanted strengths, which fit a row's responses."""
    for record in read_preferences(source, on_bytes):
        if isinstance(record, Problem):
            tally.skip(record)
            continue
        try:
            yield _checked(record, source, slots)
        except RecordError as error:
            tally.skip(error.problem(record))


def _checked(record: Preference, source: PreferencesConfig, slots: int) -> Preference:
    pairs = tuple(pair for pair in record.pairs if pair.strength in source.strengths)
    if not record.pairs and not source.mismatched:
        detail = "a single response, which only loss 'kto' reads, with mismatched = true"
        raise RecordError("no_pair", detail)
    if record.pairs and not pairs:
        raise RecordError("other_strength", record.pairs[0].strength)
    most = max(len(record.responses) + source.mismatched, len(pairs))
    if most > slots:
        raise RecordError(
            "too_many_responses",
            f"{len(record.responses)} responses, {len(pairs)} pairs; data.responses_per_row is"
            f" {slots}",
        )
    return dataclasses.replace(record, pairs=pairs)


def _write(folder: Path, made: Iterable[Made], tokenizer: Tokenizer) -> str | None:
    """Store the examples and their sizes; the hash of the former, or None where there is none."""
    from array_record.python.array_record_module import ArrayRecordWriter

    bytes_of = np.array([len(piece) for piece in tokenizer.spelling.pieces], np.int64)
    records, sizes_path = folder / f".tmp-{EXAMPLES}", folder / f".tmp-{SIZES}"
    digest, sizes = hashlib.sha256(), []
    writer = ArrayRecordWriter(str(records), _WRITER_OPTIONS)
    try:
        for one in made:
            data = one.example.to_bytes()
            writer.write(data)
            digest.update(len(data).to_bytes(8, "little") + data)
            sizes.append(_sizes(one.example, bytes_of))
    finally:
        writer.close()
    if not sizes:
        return None
    np.save(sizes_path, np.array(sizes, np.int64))
    records.replace(folder / EXAMPLES)
    sizes_path.replace(folder / SIZES)
    return digest.hexdigest()


def _sizes(example: Example, bytes_of: np.ndarray) -> tuple[int, ...]:
    targets = example.tokens[np.flatnonzero(example.counts) + 1]
    text_bytes = int(bytes_of[targets].sum())
    counts = len(example.roles), len(example.pairs), len(targets)
    return len(example), text_bytes, *counts


def _plan(
    source: RecordsSource, config: DataConfig, tokenizer: Tokenizer, template: str | None
) -> tuple[ChatFormat, ExamplePlan, list[SourceFile]]:
    chat, name = chat_format_of(source, tokenizer, template)
    files = record_files(source.path)
    listing = json.dumps([[file.name, file.size] for file in files])
    plan = ExamplePlan(
        format=FORMAT,
        tokenizer=tokenizer.fingerprint,
        chat_format=name,
        seq_len=config.seq_len,
        responses_per_row=config.responses_per_row,
        source=to_table(source),
        files=hashlib.sha256(listing.encode()).hexdigest(),
    )
    return chat, plan, files


def chat_format_of(
    source: RecordsSource, tokenizer: Tokenizer, template: str | None
) -> tuple[ChatFormat, str]:
    """How a source's conversations are written, and a name that changes when that does.

    Args:
      source: its own format or template goes first.
      tokenizer: the run's.
      template: the one that lies with the tokenizer; None leaves it to the vocabulary.

    Raises:
      ConfigError: no such format, or no way to tell which one.
    """
    if source.chat_template is not None:
        try:
            template = Path(source.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            detail = f"{source.chat_template}: {error.strerror}"
            raise ConfigError(detail, key="chat_template") from None
        except UnicodeDecodeError as error:
            detail = f"{source.chat_template}: not UTF-8, byte {error.start}: {error.reason}"
            raise ConfigError(detail, key="chat_template") from None
    try:
        chat = make_chat_format(tokenizer, name=source.chat_format, template=template)
    except ChatError as error:
        raise ConfigError(str(error), key="chat_format") from None
    if template is None or chat.name != "template":
        return chat, chat.name
    return chat, f"{chat.name} {hashlib.sha256(template.encode()).hexdigest()}"


def _finished(folder: Path, plan: ExamplePlan, files: list[SourceFile]) -> ExampleManifest | None:
    if not (folder / MANIFEST_FILE).exists():
        return None
    manifest = load_example_manifest(folder)
    check_same(manifest.plan, plan, folder)
    check_hashes(manifest.files, files, folder)
    # What was lost since is made again.
    return manifest if all((folder / name).exists() for name in (EXAMPLES, SIZES)) else None


@contextlib.contextmanager
def _progress(files: list[SourceFile], enabled: bool) -> Iterator[Callable[[int], None]]:
    """What is to be told of bytes read."""
    read = 0

    def on_bytes(size: int) -> None:
        nonlocal read
        read += size
        bar.update(read, "")

    with BuildProgress(sum(file.size for file in files), enabled=enabled) as bar:
        yield on_bytes
        bar.finish()
