import dataclasses

import numpy as np
import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import ModelConfig, RopeConfig
from llama_jax.config.run import (
    ByteTokenizer,
    DataConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TextConfig,
    TokenizerFile,
    TrainedTokenizer,
    TrainingConfig,
)
from llama_jax.data.batches import make_batches
from llama_jax.data.documents import DataError
from llama_jax.data.sources import open_documents, open_tokenizer
from llama_jax.tokenizers import load_tokenizer
from llama_jax.tokenizers.byte import ByteTokenizer as ByteLevel

MODEL = ModelConfig(
    vocab_size=300, embed_dim=32, mlp_dim=64, num_layers=1, num_heads=2, num_kv_heads=2,
    head_dim=16, max_seq_len=64, norm_eps=1e-5, rope=RopeConfig(theta=1e4), tie_embeddings=True,
)  # fmt: skip


@pytest.fixture
def config(tmp_path):
    for part, letters in (("one", "abc"), ("two", "xyz")):
        (tmp_path / part).mkdir()
        for letter in letters:
            (tmp_path / part / f"{letter}.txt").write_text(f"{letter} and {letter} again. " * 9)
    sources = tuple(
        SourceConfig(name=name, text=TextConfig(path=str(tmp_path / name)))
        for name in ("one", "two")
    )
    return RunConfig(
        model=MODEL,
        data=DataConfig(seq_len=32, batch_size=4, sources=sources, held_out=sources[:1]),
        training=TrainingConfig(steps=5),
        schedule=ScheduleConfig(peak=1e-3),
        tokenizer=ByteTokenizer(),
    )


def opened(config, run_dir, part="sources"):
    tokenizer = open_tokenizer(config, run_dir)
    return open_documents(config.data, part, tokenizer, run_dir, workers=0, progress=False)


def test_text_is_tokenised_once_and_gives_the_bytes_of_its_files(config, tmp_path):
    run_dir = tmp_path / "run"
    documents = opened(config, run_dir)
    tokenizer = open_tokenizer(config, run_dir)
    found = [tokenizer.decode(ids) for part in documents for ids in part.read([0, 1, 2])]
    assert found == [
        f"<|begin_of_text|>{f'{letter} and {letter} again. ' * 9}<|end_of_text|>"
        for letter in "abcxyz"
    ]
    shard = next((run_dir / "data" / "sources" / "one").glob("*.array_record"))
    before = shard.stat().st_mtime_ns
    assert opened(config, run_dir)[0].fingerprint == documents[0].fingerprint
    assert shard.stat().st_mtime_ns == before
    assert [part.text_bytes.tolist() for part in opened(config, run_dir, "held_out")] == [[135] * 3]


def test_built_shards_are_opened_where_they_are(config, tmp_path):
    documents = opened(config, tmp_path / "run")
    folders = [tmp_path / "run" / "data" / "sources" / name for name in ("one", "two")]
    sources = tuple(SourceConfig(name=f.name, shards=str(f)) for f in folders)
    data = dataclasses.replace(config.data, sources=sources)
    again = opened(dataclasses.replace(config, data=data), tmp_path / "another")
    assert [part.fingerprint for part in again] == [part.fingerprint for part in documents]
    batches = make_batches(data, again, rows=range(4), seed=0, start_step=0)
    batch = next(batches)
    batches.close()
    assert np.all(batch["segment_ids"] > 0)
    assert set(np.unique(batch["tokens"])) <= {*b"abcxyz and again.", 256, 257}


def test_a_tokenizer_is_trained_once(config, tmp_path):
    config = dataclasses.replace(config, tokenizer=TrainedTokenizer(vocab_size=280))
    made = open_tokenizer(config, tmp_path / "run")
    assert made.vocab_size == 280
    stamp = (tmp_path / "run" / "tokenizer" / "tokenizer.model").stat().st_mtime_ns
    assert open_tokenizer(config, tmp_path / "run").fingerprint == made.fingerprint
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.model").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["tokenizer"]
    from_file = dataclasses.replace(
        config, tokenizer=TokenizerFile(path=str(tmp_path / "run" / "tokenizer"))
    )
    for _ in range(2):  # the second time the copy is there and is compared
        assert open_tokenizer(from_file, tmp_path / "other").fingerprint == made.fingerprint
    larger = dataclasses.replace(config, tokenizer=TrainedTokenizer(vocab_size=290))
    with pytest.raises(ConfigError, match=r"tokenizer: .*tokenizer holds another one"):
        open_tokenizer(larger, tmp_path / "run")


def test_a_tokenizer_needs_text_to_train_on(config, tmp_path):
    shards = dataclasses.replace(
        config.data, sources=(SourceConfig(name="a", shards=str(tmp_path)),)
    )
    config = dataclasses.replace(config, data=shards, tokenizer=TrainedTokenizer(vocab_size=280))
    with pytest.raises(
        ConfigError, match=r"tokenizer\.kind: training one needs a source given as text"
    ):
        open_tokenizer(config, tmp_path / "run")


def test_ids_outside_the_model_are_refused(config, tmp_path):
    small = dataclasses.replace(config, model=dataclasses.replace(MODEL, vocab_size=256))
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 256 is below .* 272"):
        open_tokenizer(small, tmp_path)


def test_shards_of_another_tokenizer_are_refused(config, tmp_path):
    opened(config, tmp_path / "run")
    folder = tmp_path / "run" / "data" / "sources" / "one"
    data = dataclasses.replace(
        config.data, sources=(SourceConfig(name="one", shards=str(folder)), config.data.sources[1])
    )
    other = dataclasses.replace(config, data=data, tokenizer=TrainedTokenizer(vocab_size=280))
    with pytest.raises(DataError, match="one was made with another tokenizer"):
        opened(other, tmp_path / "other")


def test_the_run_directory_keeps_a_copy_of_any_tokenizer(config, tmp_path):
    assert open_tokenizer(config, tmp_path / "run").vocab_size == 272
    assert load_tokenizer(tmp_path / "run" / "tokenizer").fingerprint == ByteLevel().fingerprint
