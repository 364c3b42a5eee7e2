"""Text to tokenised shards, in worker processes, restartable.

A shard is the unit of work. Which documents go into which shard depends on the text alone, not on
the workers, and a finished shard is known by the hash of its text: a build that was killed reads
the text again, keeps the shards that fit, makes the others, and ends with the same bytes. Nothing
that the workers import brings in JAX.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from llama_jax.config.loading import to_table
from llama_jax.config.run import TextConfig
from llama_jax.data.corpus import Corpus
from llama_jax.data.documents import DataError
from llama_jax.data.files import SourceFile
from llama_jax.data.manifest import (
    FORMAT,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    Plan,
    ShardEntry,
    check_hashes,
    check_same,
    load_manifest,
    save_manifest,
    write_json,
)
from llama_jax.data.reading import Document, Problem, sha256_of
from llama_jax.data.shard_pool import (
    ShardPool,
    ShardTask,
    finished_shard,
    has_entries,
    is_whole,
    remove_entries,
    remove_temporary,
)
from llama_jax.tokenizers import Tokenizer

PLAN_FILE = "plan.json"
# The share of a source's size that a shard holds, within these bounds: enough shards for the
# workers of a small source, not too many files for a large one.
_SHARDS_WANTED = 64
_SHARD_BYTES = (2 * 2**20, 64 * 2**20)
# Below this, starting processes takes longer than tokenising.
_ALONE_BYTES = 16 * 2**20
_PROBLEMS_NAMED = 5


def build(
    source: TextConfig,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    workers: int,
    strict: bool,
    progress: bool,
    shard_bytes: int | None = None,
) -> Manifest:
    """Tokenise a source into `folder`; a finished build of the same source is returned at once.

    Args:
      source: the text.
      tokenizer: must be picklable; each document becomes begin token, ids, end token.
      folder: made if absent; on a local disk.
      workers: processes that tokenise; 0 and 1 use this one, as do small sources.
      strict: the first problem ends the build.
      progress: draw a bar on stderr.
      shard_bytes: text a shard; None chooses it, and whether to use workers, by the source's size.

    Raises:
      ConfigError: no text at the source's path.
      DataError: the folder belongs to another source or tokenizer; no document; a problem when
        strict.
    """
    corpus = Corpus(source)
    if shard_bytes is None and corpus.expected_bytes < _ALONE_BYTES:
        workers = 1
    plan = _make_plan(source, tokenizer, corpus.files, shard_bytes)
    finished = _finished(folder, plan, corpus.files, strict=strict)
    if finished is None:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, plan)
        finished = _build(corpus, plan, tokenizer, folder, workers, strict, progress)
        save_manifest(finished, folder)
    remove_entries(folder)
    return finished


def _build(
    corpus: Corpus,
    plan: Plan,
    tokenizer: Tokenizer,
    folder: Path,
    workers: int,
    strict: bool,
    progress: bool,
) -> Manifest:
    from llama_jax.data.build_progress import BuildProgress

    problems = Problems(strict=strict)
    with (
        ShardPool(folder, tokenizer, plan.dtype, workers) as pool,
        BuildProgress(corpus.expected_bytes, enabled=progress) as bar,
    ):
        for index, texts in enumerate(_shard_texts(corpus, plan.shard_bytes, problems)):
            task = ShardTask.of(index, texts)
            entry = finished_shard(folder, task)
            pool.keep(entry) if entry else pool.submit(task)
            bar.update(corpus.bytes_read, f"{index + 1} shards")
        shards = pool.finish()
        bar.finish()
    if not shards:
        raise DataError(f"{plan.source['path']} holds no document{problems.summary()}")
    return _make_manifest(plan, shards, problems, corpus.files[: corpus.opened])


def _shard_texts(corpus: Corpus, shard_bytes: int, problems: "Problems") -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for item in corpus:
        if isinstance(item, Document):
            texts.append(item.text)
            size += len(item.text.encode())
        else:
            problems.add(item)
        if size >= shard_bytes:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


class Problems:
    """Counts problems by reason and keeps the first few of each."""

    def __init__(self, *, strict: bool) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.named: list[str] = []
        self._strict = strict

    def add(self, problem: Problem) -> None:
        """Count a problem.

        Raises:
          DataError: when strict.
        """
        if self._strict:
            raise DataError(str(problem))
        self.counts[problem.reason] += 1
        if self.counts[problem.reason] <= _PROBLEMS_NAMED:
            self.named.append(str(problem))

    def summary(self) -> str:
        """`; skipped: 2 bad_json, 1 broken_utf8`, or nothing."""
        parts = [f"{count} {reason}" for reason, count in sorted(self.counts.items())]
        return "; skipped: " + ", ".join(parts) if parts else ""


def _make_plan(
    source: TextConfig, tokenizer: Tokenizer, files: list[SourceFile], shard_bytes: int | None
) -> Plan:
    if shard_bytes is None:
        least, most = _SHARD_BYTES
        shard_bytes = min(max(sum(file.size for file in files) // _SHARDS_WANTED, least), most)
    listing = json.dumps([[file.name, file.size] for file in files])
    return Plan(
        format=FORMAT,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        source=to_table(source),
        files=hashlib.sha256(listing.encode()).hexdigest(),
        shard_bytes=shard_bytes,
    )


def _claim(folder: Path, plan: Plan) -> None:
    """Write down what is built here; it has to be what was begun here, if a shard was finished."""
    remove_temporary(folder)
    path = folder / PLAN_FILE
    if path.exists() and has_entries(folder):
        try:
            before = Plan(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: not a plan of a build: {error}") from None
        check_same(before, plan, folder)
    write_json(path, dataclasses.asdict(plan))


def _finished(
    folder: Path, plan: Plan, files: list[SourceFile], *, strict: bool
) -> Manifest | None:
    if not (folder / MANIFEST_FILE).exists():
        return None
    manifest = load_manifest(folder)
    check_same(manifest.plan, plan, folder)
    check_hashes(manifest.files, files, folder)
    if strict and manifest.problems:
        raise DataError(manifest.problems[0])
    # A shard that was lost or damaged since is made again, with all the others.
    return manifest if all(is_whole(folder, shard) for shard in manifest.shards) else None


def _make_manifest(
    plan: Plan, shards: list[ShardEntry], problems: Problems, files: list[SourceFile]
) -> Manifest:
    return Manifest(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        dtype=plan.dtype,
        tokenizer=plan.tokenizer,
        skipped=dict(sorted(problems.counts.items())),
        problems=problems.named,
        plan=plan,
        files=[FileEntry(file.name, file.size, sha256_of(file)) for file in files],
        shards=shards,
    )
