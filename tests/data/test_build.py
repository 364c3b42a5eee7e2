"""Building shards: what they hold, that a killed build ends the same, and what is refused."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config.run import TextConfig
from llama_jax.data.build import build
from llama_jax.data.documents import DataError
from llama_jax.data.manifest import load_manifest
from llama_jax.data.shards import open_shards
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.training import train_tokenizer

QUIET = {"workers": 1, "strict": False, "progress": False}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(60):
        words = rng.integers(0, 10**6, size=rng.integers(1, 200)).astype(str)
        (folder / f"{number:03d}.txt").write_text(" ".join(words))
    return TextConfig(path=str(folder))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_record_is_begin_token_ids_end_token(tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "Hello world"}\n{"text": "é"}\n')
    manifest = build(TextConfig(path=str(source)), ByteTokenizer(), tmp_path / "out", **QUIET)
    assert (manifest.documents, manifest.tokens, manifest.bytes) == (2, 13 + 4, 11 + 2)
    documents = open_shards(tmp_path / "out")
    assert documents.lengths.tolist() == [13, 4]
    assert documents.text_bytes.tolist() == [11, 2]
    last, first = documents.read([1, 0])
    assert first.tolist() == [256, *b"Hello world", 257]
    assert last.tolist() == [256, 0xC3, 0xA9, 257]
    assert first.dtype == np.int32


def test_the_manifest_says_what_it_was_made_from(corpus, tmp_path):
    build(corpus, ByteTokenizer(), tmp_path / "out", **QUIET, shard_bytes=10_000)
    manifest = load_manifest(tmp_path / "out")
    files = sorted(Path(corpus.path).iterdir())
    assert [entry.name for entry in manifest.files] == [file.name for file in files]
    assert [entry.sha256 for entry in manifest.files] == [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    ]
    size = sum(file.stat().st_size for file in files)
    assert manifest.bytes == size
    assert manifest.tokens == size + 2 * 60
    assert manifest.tokenizer == ByteTokenizer().fingerprint
    assert manifest.dtype == "<u2"
    assert len(manifest.shards) > 2
    assert all(shard.bytes >= 10_000 for shard in manifest.shards[:-1])
    assert sum(shard.documents for shard in manifest.shards) == manifest.documents == 60


def test_documents_are_read_in_any_order_over_shards(corpus, tmp_path):
    build(corpus, ByteTokenizer(), tmp_path / "out", **QUIET, shard_bytes=5_000)
    documents = pickle.loads(pickle.dumps(open_shards(tmp_path / "out")))
    numbers = [59, 0, 31, 31, 7, 42]
    for number, ids in zip(numbers, documents.read(numbers), strict=True):
        text = (Path(corpus.path) / f"{number:03d}.txt").read_text()
        assert ids.tolist() == ByteTokenizer().encode(text, bos=True, eos=True)
        assert documents.lengths[number] == len(text) + 2
        assert documents.text_bytes[number] == len(text)


class WideTokenizer(ByteTokenizer):
    """Ids that don't fit 16 bits."""

    vocab_size = 2**16 + 300

    def encode(self, text, **options):
        return [70_000 - 1 - i for i in super().encode(text, **options)]


def test_ids_are_stored_wide_only_where_the_vocabulary_asks_for_it(corpus, tmp_path):
    manifest = build(corpus, WideTokenizer(), tmp_path / "out", **QUIET)
    assert manifest.dtype == "<u4"
    ids = open_shards(tmp_path / "out").read([0])[0]
    assert ids[0] == 70_000 - 1 - 256


def test_the_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path):
    tokenizer = train_tokenizer(["1234567890 " * 50], 276)
    options = {"strict": False, "progress": False, "shard_bytes": 4_000}
    build(corpus, tokenizer, tmp_path / "one", workers=1, **options)
    build(corpus, tokenizer, tmp_path / "three", workers=3, **options)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "three")
    assert sorted(one)[:2] == ["manifest.json", "plan.json"]
    assert not [name for name in one if "tmp" in name or "entry" in name]


KILLED = """
import sys, time
from pathlib import Path
from llama_jax.config.run import TextConfig
from llama_jax.data.build import build
from llama_jax.tokenizers.byte import ByteTokenizer

class SlowTokenizer(ByteTokenizer):
    def encode(self, text, **options):
        time.sleep(0.02)
        return super().encode(text, **options)

if __name__ == "__main__":
    build(TextConfig(path=sys.argv[1]), SlowTokenizer(), Path(sys.argv[2]),
          workers=int(sys.argv[3]), strict=False, progress=False, shard_bytes=3000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(corpus, tmp_path, workers):
    script = tmp_path / "build.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    command = [sys.executable, str(script), corpus.path, str(out), str(workers)]
    root = str(Path(__file__).parents[2])
    killed = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.entry.json"))) < 3:
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    if workers > 1:
        wait_until_still(out)
    assert not (out / "manifest.json").exists()
    made_before = {path: path.stat().st_mtime_ns for path in finished_records(out)}
    assert len(made_before) >= 3

    build(corpus, ByteTokenizer(), out, **QUIET, shard_bytes=3000)
    build(corpus, ByteTokenizer(), tmp_path / "whole", **QUIET, shard_bytes=3000)
    assert contents(out) == contents(tmp_path / "whole")
    # What was finished was kept, not made again.
    assert all(path.stat().st_mtime_ns == before for path, before in made_before.items())


def finished_records(folder):
    entries = folder.glob("*.entry.json")
    return [folder / entry.name.replace(".entry.json", ".array_record") for entry in entries]


def wait_until_still(folder):
    """Workers notice that their parent is gone and end; then nothing changes any more."""
    before = None
    for _ in range(100):
        now = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
        if now == before:
            return
        before = now
        time.sleep(0.3)
    raise AssertionError("workers of a killed build still write")


def test_a_finished_build_is_reused_untouched(corpus, tmp_path):
    first = build(corpus, ByteTokenizer(), tmp_path / "out", **QUIET)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert build(corpus, ByteTokenizer(), tmp_path / "out", **QUIET) == first
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_a_damaged_shard_is_made_again(corpus, tmp_path):
    out = tmp_path / "out"
    build(corpus, ByteTokenizer(), out, **QUIET, shard_bytes=5_000)
    before = contents(out)
    damaged = out / "shard-00001.array_record"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    build(corpus, ByteTokenizer(), out, **QUIET, shard_bytes=5_000)
    assert contents(out) == before


def test_another_tokenizer_is_refused(corpus, tmp_path):
    build(corpus, ByteTokenizer(), tmp_path / "out", **QUIET)
    other = train_tokenizer(["abab abab"], 274)
    with pytest.raises(DataError, match=r"was built with tokenizer .* not .*; delete it or build"):
        build(corpus, other, tmp_path / "out", **QUIET)


def test_another_source_is_refused(corpus, tmp_path):
    out = tmp_path / "out"
    build(corpus, ByteTokenizer(), out, **QUIET)
    other = TextConfig(path=corpus.path, text_field="body")
    with pytest.raises(DataError, match=r"built with source\.text_field 'text', not 'body'"):
        build(other, ByteTokenizer(), out, **QUIET)
    (Path(corpus.path) / "new.txt").write_text("one more")
    with pytest.raises(DataError, match="built from other files"):
        build(corpus, ByteTokenizer(), out, **QUIET)


def test_text_may_move_to_another_folder(corpus, tmp_path):
    out = tmp_path / "out"
    build(corpus, ByteTokenizer(), out, **QUIET)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    Path(corpus.path).rename(tmp_path / "moved")
    build(TextConfig(path=str(tmp_path / "moved")), ByteTokenizer(), out, **QUIET)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_text_that_changed_behind_its_size_is_noticed(corpus, tmp_path):
    out = tmp_path / "out"
    build(corpus, ByteTokenizer(), out, **QUIET)
    changed = Path(corpus.path) / "007.txt"
    changed.write_text(changed.read_text()[:-1] + "x")
    with pytest.raises(DataError, match=r"007.txt has changed since"):
        build(corpus, ByteTokenizer(), out, **QUIET)


def test_text_that_changed_while_a_build_was_interrupted_is_noticed(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr("llama_jax.data.build.save_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(corpus, ByteTokenizer(), out, **QUIET)
    changed = Path(corpus.path) / "007.txt"
    changed.write_text(changed.read_text()[:-1] + "x")
    with pytest.raises(DataError, match="was made of other text than the source has now"):
        build(corpus, ByteTokenizer(), out, **QUIET)


@pytest.fixture
def faulty(tmp_path):
    source = tmp_path / "faulty.jsonl"
    bad = [b'{"text": 1}'] * 7 + [b"{", b'{"text": ""}']
    source.write_bytes(b"\n".join([b'{"text": "good"}', *bad, b'{"text": "also good"}']))
    return TextConfig(path=str(source))


def test_problems_are_counted_by_reason_and_the_first_few_named(faulty, tmp_path):
    manifest = build(faulty, ByteTokenizer(), tmp_path / "out", **QUIET)
    assert manifest.documents == 2
    assert manifest.skipped == {"bad_json": 1, "empty_document": 1, "wrong_type": 7}
    assert manifest.problems == [
        *(f"faulty.jsonl:{n}: wrong type ('text' is a number)" for n in range(2, 7)),
        "faulty.jsonl:9: bad json (column 2: Expecting property name enclosed in double quotes)",
        "faulty.jsonl:10: empty document",
    ]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"] == (
        manifest.skipped
    )


def test_strict_fails_at_the_first_problem_even_when_built_before(faulty, tmp_path):
    strict = {**QUIET, "strict": True}
    with pytest.raises(DataError, match=r"faulty.jsonl:2: wrong type"):
        build(faulty, ByteTokenizer(), tmp_path / "new", **strict)
    build(faulty, ByteTokenizer(), tmp_path / "out", **QUIET)
    with pytest.raises(DataError, match=r"faulty.jsonl:2: wrong type"):
        build(faulty, ByteTokenizer(), tmp_path / "out", **strict)


def test_a_build_that_made_nothing_leaves_the_folder_to_the_next_try(faulty, tmp_path):
    wrong = TextConfig(path=faulty.path, text_field="body")
    with pytest.raises(DataError, match="holds no document"):
        build(wrong, ByteTokenizer(), tmp_path / "out", **QUIET)
    assert build(faulty, ByteTokenizer(), tmp_path / "out", **QUIET).documents == 2


def test_a_begun_build_refuses_another_source(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr("llama_jax.data.build.save_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(corpus, ByteTokenizer(), out, **QUIET)
    with pytest.raises(DataError, match=r"built with shard_bytes \d+, not 5000"):
        build(corpus, ByteTokenizer(), out, **QUIET, shard_bytes=5000)


def test_no_document_at_all_is_an_error_that_says_why(tmp_path):
    (tmp_path / "a.txt").write_text(" ")
    with pytest.raises(DataError, match=r"holds no document; skipped: 1 empty_document"):
        build(TextConfig(path=str(tmp_path / "a.txt")), ByteTokenizer(), tmp_path / "o", **QUIET)


def test_an_unfinished_or_foreign_folder_does_not_open(corpus, tmp_path):
    with pytest.raises(DataError, match="not a finished `data build`"):
        open_shards(tmp_path)
    build(corpus, ByteTokenizer(), tmp_path / "out", **QUIET)
    np.save(tmp_path / "out" / "shard-00000.npy", np.zeros((3, 2), np.int64))
    with pytest.raises(DataError, match=r"shard-00000.npy: doesn't fit the manifest"):
        open_shards(tmp_path / "out")


def test_the_fingerprint_follows_the_tokens(corpus, tmp_path):
    build(corpus, ByteTokenizer(), tmp_path / "one", **QUIET)
    build(corpus, ByteTokenizer(), tmp_path / "two", **QUIET)
    changed = Path(corpus.path) / "007.txt"
    changed.write_text(changed.read_text()[:-1] + "x")
    build(corpus, ByteTokenizer(), tmp_path / "three", **QUIET)
    one, two, three = (open_shards(tmp_path / name).fingerprint for name in ("one", "two", "three"))
    assert one == two != three


def test_workers_do_not_import_jax():
    code = "import sys, llama_jax.data.build; print('jax' in sys.modules, 'grain' in sys.modules)"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.split() == ["False", "False"]
