"""Byte vocabularies with the special tokens of a chat format, and records written to files."""

import json

from llama_jax.config.loading import from_table
from llama_jax.config.run import DataConfig
from llama_jax.data.sources import open_documents
from llama_jax.tokenizers.byte import ByteTokenizer


class BytesWith(ByteTokenizer):
    """Ids 0 to 255 are bytes, then these special tokens: the first BOS, the second EOS."""

    def __init__(self, *special, adds_bos=False):
        self._special = {name: 256 + i for i, name in enumerate(special)}
        self._adds_bos = adds_bos

    bos_id = property(lambda self: 256)
    eos_id = property(lambda self: 257)
    pad_id = property(lambda self: 257)
    adds_bos = property(lambda self: self._adds_bos)


LLAMA3 = ByteTokenizer()
CHATML = BytesWith("<|endoftext|>", "<|im_end|>", "<|im_start|>")
LLAMA2 = BytesWith("<s>", "</s>", "<unk>", adds_bos=True)


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def said(*texts):
    """A conversation of user and assistant by turns."""
    return {
        "messages": [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]
    }


def data_config(path, kind, *, seq_len=256, batch_size=4, held_out=None, rows=None, **source):
    """A run's data table with one source of records."""
    table = {
        "seq_len": seq_len,
        "batch_size": batch_size,
        "packing": "best_fit",
        "sources": [{"name": "a", kind: {"path": path, **source}}],
        **(rows or {}),
    }
    if held_out is not None:
        table["held_out"] = [{"name": "h", kind: {"path": held_out, **source}}]
    return from_table(DataConfig, table, "here")


def opened(config, folder, *, tokenizer=LLAMA3, part="sources", loss_on="responses"):
    """The documents of a run's only source."""
    (documents,) = open_documents(
        config, part, tokenizer, folder, workers=1, progress=False, loss_on=loss_on
    )
    return documents


def marked(tokenizer, example):
    """The texts that the loss counts, as they follow each other."""
    texts, before = [], False
    for place, counted in enumerate(example.counts.tolist()):
        if counted:
            token = tokenizer.decode([int(example.tokens[place + 1])])
            texts = [*texts[:-1], texts[-1] + token] if before else [*texts, token]
        before = counted
    return texts
