"""Documents encoded many at a time: tensorflow-text in workers, the tokenizer itself elsewhere."""

import subprocess
import sys

import pytest

from llama_jax.config.run import TextConfig
from llama_jax.data.build import build
from llama_jax.data.shards import open_shards
from llama_jax.data.tokenising import TensorFlowText, encode_documents, worker_encoder
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from llama_jax.tokenizers.sentencepiece_training import train_sentencepiece

HARD = [
    *("", " ", "  ", "\n", "\r\n\t \n", "  two leading", "trailing  ", "a\x00b", "\ufeffx"),
    *("12 345 6789", "\u2581x \u2585 <0x0A>", "<s>a</s><unk>", "Việt 你好 🙂👩‍👩‍👧 العربية"),
    *("e\u0301\u3000\xa0\u2028", "a\ud83db", "^" * 100_000, "the cat " * 5_000),
]


@pytest.fixture(scope="module")
def spm():
    return train_sentencepiece(["the cat sat on the mat, the rat ate 123 bats"] * 3, 290)


def test_tensorflow_text_gives_the_same_ids(spm):
    texts = HARD * 40  # more than a batch
    special = SentencePieceTokenizer(spm.proto, {"<pad>": 290})
    assert TensorFlowText(special).encode_documents(texts) == encode_documents(special, texts)


def test_other_tokenizers_encode_one_by_one():
    tokenizer = ByteTokenizer()
    expected = [[256, 104, 105, 257], [256, 257]]
    assert worker_encoder(tokenizer)(["hi", ""]) == expected
    assert encode_documents(tokenizer, ["hi", ""]) == expected


def test_tensorflow_is_not_imported_where_no_worker_needs_it():
    code = (
        "import sys, llama_jax.data.build, llama_jax.data.tokenising as t;"
        "from llama_jax.tokenizers.byte import ByteTokenizer;"
        "t.worker_encoder(ByteTokenizer())(['a']);"
        "sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_workers_and_this_process_build_the_same_shards(spm, tmp_path):
    source = tmp_path / "corpus"
    source.mkdir()
    for number in range(40):
        text = f"the cat sat on mat {number} \n" * 50 + "🙂 <s>\x00"
        (source / f"{number:02d}.txt").write_text(text)
    options = {"strict": False, "progress": False, "shard_bytes": 8_000}
    config = TextConfig(path=str(source))
    build(config, spm, tmp_path / "one", workers=1, **options)
    build(config, spm, tmp_path / "two", workers=2, **options)
    one, two = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
        for name in ("one", "two")
    )
    assert one == two
    first = open_shards(tmp_path / "two").read([0])[0].tolist()
    text = (source / "00.txt").read_text()
    assert first == spm.encode(text, bos=True, eos=True)
