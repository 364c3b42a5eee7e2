"""Reading text: what is taken, what is skipped and why, and which part is kept aside."""

import ast
import collections
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import TextConfig
from llama_jax.data.corpus import Corpus, can_split, texts
from llama_jax.data.files import module_group
from llama_jax.data.reading import Document, Problem


def read(path, **options):
    """Documents as (file, line, text); problems as (file, line, reason)."""
    items = list(Corpus(TextConfig(path=str(path), **options)))
    documents = [tuple(item) for item in items if isinstance(item, Document)]
    problems = [tuple(item)[:3] for item in items if isinstance(item, Problem)]
    return documents, problems


def json_lines(*values):
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


def test_a_directory_is_read_in_the_order_of_names_and_by_suffix(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "one.py").write_text("x = 1\r\n", newline="")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "notes.txt").write_text("hidden")
    documents, problems = read(tmp_path)
    assert documents == [("a.txt", None, "first"), ("b/one.py", None, "x = 1\r\n")]
    assert problems == []
    assert read(tmp_path, suffixes=(".py",))[0] == [("b/one.py", None, "x = 1\r\n")]


@pytest.mark.parametrize("pattern", ["", "/*.txt"])
def test_links_to_files_are_read_and_dead_ones_named_and_folders_not_followed(tmp_path, pattern):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("linked")
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.txt").symlink_to("../real/a.txt")
    (links / "dead.txt").symlink_to("nowhere")
    (links / "loop.txt").symlink_to(".")
    documents, problems = read(f"{links}{pattern}")
    assert documents == [("a.txt", None, "linked")]
    assert problems == [("dead.txt", None, "unreadable_file")]


def test_a_glob_takes_what_it_matches(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [file for file, _, _ in read(tmp_path / "*.txt")[0]] == ["a.txt", "b.txt"]
    assert list(texts(TextConfig(path=f"file://{tmp_path}/*.md"))) == ["c.md"]


def test_a_url_of_another_file_system_works():
    import fsspec

    with fsspec.open("memory://corpus/a.txt", "w") as stream:
        stream.write("in memory")
    assert list(texts(TextConfig(path="memory://corpus"))) == ["in memory"]


@pytest.mark.parametrize("end", ["", ".gz", ".zst"])
def test_json_lines_are_read_plain_and_compressed(tmp_path, end):
    data = json_lines("one", "two\nlines", "dr\u00e9i")
    half = len(data) // 2
    # Both formats may be several streams one after the other.
    parts = {
        "": data,
        ".gz": gzip.compress(data[:half]) + gzip.compress(data[half:]) + b"\0" * 9,
        ".zst": zstandard.compress(data[:half]) + zstandard.compress(data[half:]),
    }
    (tmp_path / f"a.jsonl{end}").write_bytes(parts[end])
    documents, problems = read(tmp_path)
    name = f"a.jsonl{end}"
    assert documents == [(name, 1, "one"), (name, 2, "two\nlines"), (name, 3, "dr\u00e9i")]
    assert problems == []


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_is_read_by_column(tmp_path, kind):
    table = pa.table({"id": [1, 2, 3], "body": pa.array(["one", None, "drei"], kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    documents, problems = read(tmp_path, text_field="body")
    assert documents == [("a.parquet", 1, "one"), ("a.parquet", 3, "drei")]
    assert problems == [("a.parquet", 2, "wrong_type")]
    assert read(tmp_path)[1] == [("a.parquet", None, "missing_field")]


def test_parquet_with_broken_utf_8_loses_that_row_alone(tmp_path):
    broken = pa.array([b"fine", b"\xff", b"also"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    documents, problems = read(tmp_path)
    assert [text for _, _, text in documents] == ["fine", "also"]
    assert problems == [("a.parquet", 2, "broken_utf8")]


def test_every_bad_line_is_named_with_its_reason_and_the_rest_is_read(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "unfinished',
        b'{"body": "no text"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'["text"]',
        b'{"text": " \\n"}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud83d"}',
        b"",
        b"[" * 100_000,
        b'{"text": "\\ud83d\\ude42"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    documents, problems = read(tmp_path / "a.jsonl")
    assert documents == [("a.jsonl", 1, "good"), ("a.jsonl", 12, "\U0001f642")]
    assert [(line, reason) for _, line, reason in problems] == [
        (2, "bad_json"),
        (3, "missing_field"),
        (4, "wrong_type"),
        (5, "wrong_type"),
        (6, "wrong_type"),
        (7, "empty_document"),
        (8, "broken_utf8"),
        (9, "broken_utf8"),
        (10, "empty_document"),
        (11, "bad_json"),
    ]


def test_broken_and_empty_text_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (tmp_path / "e.parquet").write_bytes(b"not parquet")
    documents, problems = read(tmp_path)
    assert documents == [("d.txt", None, "with a mark")]
    assert problems == [
        ("a.txt", None, "broken_utf8"),
        ("b.txt", None, "empty_document"),
        ("c.jsonl", None, "empty_document"),
        ("e.parquet", None, "unreadable_file"),
    ]


@pytest.mark.parametrize(
    ("end", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_truncated_and_damaged_compression_keeps_the_lines_before(tmp_path, end, compress):
    lines = [f"{i} " + "x" * (i * 7919 % 97) for i in range(20_000)]
    whole = compress(json_lines(*lines))
    name = f"a.jsonl{end}"
    (tmp_path / name).write_bytes(whole[: len(whole) * 3 // 4])
    documents, problems = read(tmp_path)
    kept = len(documents)
    assert 0 < kept < 20_000
    assert [text for _, _, text in documents] == lines[:kept]
    assert problems == [(name, kept + 1, "truncated_file")]

    (tmp_path / name).write_bytes(compress(json_lines("good")) + b"garbage after the stream")
    documents, problems = read(tmp_path)
    assert documents == [(name, 1, "good")]
    assert problems == [(name, 2, "damaged_file")]


def test_a_file_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("gone soon")
    (tmp_path / "b.txt").write_text("stays")
    corpus = Corpus(TextConfig(path=str(tmp_path)))
    (tmp_path / "a.txt").unlink()
    problem, document = corpus
    assert str(problem) == "a.txt: unreadable file (No such file or directory)"
    assert document.text == "stays"


def test_reading_ends_after_the_document_that_reaches_the_limit(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines("12345", "\u00e9\u00e9", "x", "y"))
    assert [text for _, _, text in read(tmp_path, max_bytes=9)[0]] == ["12345", "\u00e9\u00e9"]
    assert [text for _, _, text in read(tmp_path, max_bytes=10)[0]] == [
        "12345",
        "\u00e9\u00e9",
        "x",
    ]
    assert len(read(tmp_path, max_bytes=10**9)[0]) == 4


def test_parts_are_disjoint_and_whole_and_of_about_the_size_asked_for(tmp_path):
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text(f"text {number}")
    every, train, held_out = (
        {file for file, _, _ in read(tmp_path, part=part, held_out_fraction=0.25)[0]}
        for part in ("all", "train", "held_out")
    )
    assert train | held_out == every
    assert train & held_out == set()
    assert 75 <= len(held_out) <= 125


def test_a_single_file_of_records_is_split_by_text(tmp_path):
    values = [f"text {number % 100}" for number in range(400)]
    (tmp_path / "a.jsonl").write_bytes(json_lines(*values))
    train, held_out = (
        [text for _, _, text in read(tmp_path, part=part, held_out_fraction=0.3)[0]]
        for part in ("train", "held_out")
    )
    assert collections.Counter(train + held_out) == collections.Counter(values)
    assert set(train) & set(held_out) == set()
    assert 15 <= len(set(held_out)) <= 45


def test_a_single_text_can_not_be_split(tmp_path):
    (tmp_path / "a.txt").write_text("one text")
    assert not can_split(TextConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"part: .* is one text, which can't be split"):
        Corpus(TextConfig(path=str(tmp_path), part="train"))


def test_a_wrong_path_or_no_matching_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="path: no such file or directory"):
        Corpus(TextConfig(path=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match="path: no file in"):
        Corpus(TextConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"path: .*nosuchprotocol"):
        Corpus(TextConfig(path="nosuchprotocol://x"))


def test_the_standard_library_is_python_source_without_tests_or_packages():
    corpus = Corpus(TextConfig(path="stdlib"))
    names = [file.name for file in corpus.files]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "idle_test", "__pycache__"}
    assert all(name.endswith(".py") for name in names)
    assert sum(file.size for file in corpus.files) > 8_000_000


def test_held_out_library_modules_share_no_module_with_the_rest():
    train, held_out = (
        Corpus(TextConfig(path="stdlib", part=part)) for part in ("train", "held_out")
    )
    trained_on = {file.group for file in train.files}
    kept_aside = {file.group for file in held_out.files}
    assert trained_on & kept_aside == set()
    # The same on every Python: the hash of a name doesn't change.
    assert {"json", "collections", "logging"} <= kept_aside
    for file in held_out.files:
        assert file.name.split("/")[0].removesuffix(".py").lstrip("_") in kept_aside


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("json/decoder.py", "json"),
        ("argparse.py", "argparse"),
        ("_pydecimal.py", "decimal"),
        ("_strptime.py", "strptime"),
        ("__future__.py", "__future__"),
        ("pydoc.py", "pydoc"),
    ],
)
def test_a_module_and_its_python_twin_are_one_group(name, group):
    assert module_group(name) == group


def test_library_sources_come_whole():
    document = next(iter(Corpus(TextConfig(path="stdlib", max_bytes=1))))
    assert document.file.endswith(".py")
    ast.parse(document.text)
