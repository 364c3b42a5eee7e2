import io
import json

import pytest
from rich.console import Console

from llama_jax.config.loading import ConfigError
from llama_jax.config.run import DataConfig, SourceConfig
from llama_jax.data.documents import InMemoryDocuments
from llama_jax.data.inspect import batch_table, show_batch
from llama_jax.tokenizers.byte import ByteTokenizer


def shown(texts, *, seq_len, rows=1, colour=False, packing="best_fit"):
    tokenizer = ByteTokenizer()
    documents = InMemoryDocuments([tokenizer.encode(text, bos=True, eos=True) for text in texts])
    config = DataConfig(
        seq_len=seq_len,
        batch_size=4,
        sources=(SourceConfig(name="letters", shards="unused"),),
        packing=packing,
    )
    out = io.StringIO()
    console = Console(file=out, width=100, color_system="standard" if colour else None)
    show_batch(config, [documents], tokenizer, console, seed=0, step=0, rows=rows)
    return out.getvalue()


def test_two_documents_and_padding_are_told_apart():
    output = shown(["hello world", "bye"], seq_len=20)
    assert (
        "┃1┃<|begin_of_text|>hello world<|end_of_text|>⊘"
        "┃2┃<|begin_of_text|>bye<|end_of_text|>⊘┃ 2 padding" in output
    )
    assert "step 0, row 0 of 4" in output
    cells = [[cell.strip() for cell in line.split("│")] for line in output.splitlines()]
    assert ["", "1", "letters", "0", "0-12 of 13", "0-12", "0-12", "12", ""] in cells
    assert ["", "2", "letters", "1", "0-4 of 5", "13-17", "0-4", "4", ""] in cells
    assert "1 rows of 20: 18 tokens, 16 targets, 2 padding (10.00%), 2 documents" in output


def test_a_part_of_a_document_says_which_part():
    output = shown(["x" * 38], seq_len=16, rows=9, packing="concat")
    assert "row 3 of 4" in output  # no more rows than the batch has
    assert "row 4" not in output
    assert "0-15 of 40" in output
    assert "16-31 of 40" in output


def test_colours_differ_between_documents():
    output = shown(["aa", "b"], seq_len=8, colour=True)
    assert "\x1b[36m<|begin_of_text|>aa\x1b[0m" in output
    assert "\x1b[33m<|begin_of_text|>b\x1b[0m" in output
    assert "\x1b[7;36m<|end_of_text|>⊘\x1b[0m" in output


@pytest.mark.parametrize("text", ["\x1b[31mred", "[bold]markup[/bold]"])
def test_text_is_shown_and_not_obeyed(text):
    output = shown([text], seq_len=64)
    assert text.replace("\x1b", "␛") in output


def test_the_table_holds_arrays_and_borders():
    tokenizer = ByteTokenizer()
    documents = InMemoryDocuments([tokenizer.encode("hi", bos=True, eos=True), [1, 2]])
    sources = (SourceConfig(name="letters", shards="unused"),)
    config = DataConfig(seq_len=7, batch_size=2, sources=sources, packing="best_fit")
    table = batch_table(config, [documents], tokenizer, seed=0, step=5, rows=1)
    (row,) = json.loads(json.dumps(table))["rows"]
    assert row["tokens"] == [256, *b"hi", 257, 1, 2, 0]
    assert row["loss_mask"] == [1, 1, 1, 0, 1, 0, 0]
    assert row["documents"][0] == {
        "segment": 1,
        "source": "letters",
        "document": 0,
        "length": 4,
        "tokens": [0, 3],
        "places": [0, 3],
        "positions": [0, 3],
        "targets": 3,
        "text": "<|begin_of_text|>hi<|end_of_text|>",
    }


@pytest.mark.parametrize(("step", "rows", "key"), [(-1, 1, "step"), (0, 0, "rows")])
def test_a_step_or_a_number_of_rows_that_cannot_be_is_named(step, rows, key):
    config = DataConfig(seq_len=4, batch_size=2, sources=(SourceConfig(name="a", shards="unused"),))
    with pytest.raises(ConfigError, match=f"^{key}: "):
        batch_table(
            config, [InMemoryDocuments([[1]])], ByteTokenizer(), seed=0, step=step, rows=rows
        )
