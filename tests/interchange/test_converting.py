"""Conversions: the same logits or no DST, nothing left behind, nothing replaced unasked."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from in_memory import random_source, values_of
from tiny_checkpoints import CASES, their_tensors, write_folder

from llama_jax.config.loading import ConfigError
from llama_jax.interchange import converting, verifying
from llama_jax.interchange.conversion_options import parse_size
from llama_jax.interchange.converting import convert
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.staging import staged
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError
from llama_jax.interchange.verifying import Comparison, prompt_ids
from llama_jax.tokenizers import TokenizerError
from llama_jax.tokenizers.byte import ByteTokenizer

# Rows for the byte tokenizer's ids.
CONFIG = dataclasses.replace(CASES["grouped_llama3_tied"], vocab_size=272)


@pytest.fixture(scope="module")
def src(tmp_path_factory):
    """A Hugging Face folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("src") / "tiny"
    write_hugging_face(random_source(CONFIG), folder, tokenizer=ByteTokenizer())
    return folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.short
def test_there_and_back_is_bit_equal_and_so_are_the_logits(src, tmp_path):
    told = []
    report = convert(src, tmp_path / "o", "orbax", progress=lambda *sizes: told.append(sizes))
    assert (report.src_format, report.dst_format, report.exact) == ("hf", "orbax", True)
    assert report.comparison is not None
    assert (report.comparison.tokens, report.comparison.same_top) == (64, 64)
    assert report.comparison.max_difference == 0.0
    assert report.comparison.largest_logit > 0.01
    total = sum(tensor.nbytes for tensor in open_source(src).tensors.values())
    assert told[-1] == (total, total)
    assert sum(report.kinds.values()) == total
    back = convert(tmp_path / "o", tmp_path / "back", "hf", shard_size=20_000)
    assert back.exact
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    ours, theirs = values_of(open_source(src)), values_of(open_source(tmp_path / "back"))
    assert ours.keys() == theirs.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in ours)
    assert names(tmp_path) == ["back", "o"]


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
def test_formats_one_after_another_hold_the_same_bits(dtype, tmp_path):
    pytest.importorskip("torch", reason="reads Meta's pickles")
    config = dataclasses.replace(
        CASES["multi_head_plain"], vocab_size=272, num_kv_heads=2, init_std=0.02
    )
    source = random_source(config, dtype=dtype)
    # GGUF holds vectors in float32 alone; with them so from the start, nothing is widened.
    for name, array in source.arrays.items():
        source.arrays[name] = array.astype(np.float32) if array.ndim == 1 else array
    write_hugging_face(source, tmp_path / "0", tokenizer=ByteTokenizer())
    path = tmp_path / "0"
    for number, to in enumerate(["meta", "gguf", "orbax", "hf"], 1):
        target = tmp_path / (f"{number}.gguf" if to == "gguf" else str(number))
        report = convert(path, target, to, verify=number == 4)
        assert report.exact, to
        path = target
    assert report.comparison.max_difference == 0.0
    back = open_source(path)
    assert back.config == config
    assert back.chat_template == source.chat_template
    for name, array in source.arrays.items():
        found = back.tensors[name].read_all()
        assert (found.dtype, found.tobytes()) == (array.dtype, array.tobytes()), name


def test_a_rounding_dtype_is_told_as_information(src, tmp_path):
    report = convert(src, tmp_path / "half", "hf", dtype="bfloat16")
    assert not report.exact
    assert set(report.kinds) == {"BF16"}
    assert 0 < report.comparison.max_difference < 0.1 * report.comparison.largest_logit
    # Widening loses nothing.
    assert convert(tmp_path / "half", tmp_path / "wide", "orbax", dtype="float32").exact
    assert convert(src, tmp_path / "none", "hf", verify=False).comparison is None


def wrong_rows(source, folder, **options):
    """A writer with a fault: q in another row order, as if it were Meta's."""
    write_hugging_face(source, folder, **options)
    path = folder / "model.safetensors"
    tensor = open_source(folder).tensors["layers.0.attention.q_proj"]
    rows = tensor.read_all().copy()
    data = path.read_bytes()
    at = data.index(rows.tobytes())
    swapped = rows.reshape(8, 2, 8, -1).swapaxes(1, 2).reshape(rows.shape)
    path.write_bytes(data[:at] + swapped.tobytes() + data[at + rows.nbytes :])


def test_a_fault_of_a_writer_is_caught_by_the_logits_and_nothing_is_left(
    src, tmp_path, monkeypatch
):
    monkeypatch.setattr(converting, "write_hugging_face", wrong_rows)
    with pytest.raises(InterchangeError, match=r"logits differ by .* though every value should be"):
        convert(src, tmp_path / "made" / "dst", "hf")
    assert names(tmp_path) == []
    convert(src, tmp_path / "dst", "hf", verify=False)
    assert names(tmp_path) == ["dst"]


class OtherTokenizer(ByteTokenizer):
    def encode(self, text, **options):
        return [5, *super().encode(text, **options)]


def test_a_tokenizer_that_gives_other_ids_is_caught(src, tmp_path, monkeypatch):
    monkeypatch.setattr(converting, "_tokenizer", lambda source: OtherTokenizer())
    with pytest.raises(InterchangeError, match="tokenizer gives other ids for the prompt, first a"):
        convert(src, tmp_path / "dst", "hf")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_conversion_leaves_the_old_dst_and_nothing_else(src, tmp_path, monkeypatch, error):
    convert(src, tmp_path / "dst", "hf", verify=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "dst").iterdir()}

    def fail(source, folder, **options):
        write_hugging_face(source, folder, **options)
        raise error

    monkeypatch.setattr(converting, "write_hugging_face", fail)
    with pytest.raises(type(error)):
        convert(src, tmp_path / "dst", "hf", overwrite=True)
    assert names(tmp_path) == ["dst"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "dst").iterdir()} == before


def test_the_old_dst_stands_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "dst"
    target.mkdir()
    (target / "old").write_text("")
    with staged(target) as new:
        new.mkdir()
        (new / "new").write_text("")
        assert names(target) == ["old"]
        assert names(tmp_path) == [new.parent.name, "dst"]
        assert new.parent.name.startswith(".dst.partial")
    assert names(target) == ["new"]
    assert names(tmp_path) == ["dst"]


def test_where_the_new_cant_be_put_there_the_old_comes_back(tmp_path, monkeypatch):
    target = tmp_path / "dst"
    target.write_text("old")
    rename = Path.rename

    def fail(path, to):
        if path.read_text() == "new":
            raise OSError("another device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="another device"), staged(target) as new:
        new.write_text("new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["dst"]


def test_a_dst_is_replaced_only_where_asked_and_where_it_is_a_checkpoint(src, tmp_path):
    dst = tmp_path / "dst"

    def refused(**options):
        with pytest.raises(ConfigError) as caught:
            convert(src, dst, "hf", verify=False, **options)
        return str(caught.value)

    dst.mkdir()
    assert refused() == f"{dst}: is there already; --overwrite replaces it"
    convert(src, dst, "hf", verify=False, overwrite=True)  # an empty folder is no loss
    (dst / "old").write_text("")
    convert(src, dst, "hf", verify=False, overwrite=True)
    assert "old" not in names(dst)
    shutil.rmtree(dst)
    dst.mkdir()
    (dst / "thesis.tex").write_text("")
    assert "is no checkpoint; --overwrite doesn't replace that" in refused(overwrite=True)
    (dst / "config.toml").write_text("")
    (dst / "checkpoints").mkdir()
    assert "is a training run; --overwrite doesn't replace" in refused(overwrite=True)
    shutil.rmtree(dst)
    copy = dst / "inside"
    shutil.copytree(src, copy)
    for target in (copy, dst):
        with pytest.raises(ConfigError, match="holds SRC, it can't be replaced by it"):
            convert(copy, target, "hf", overwrite=True)


@pytest.mark.parametrize(
    ("to", "options", "complaint"),
    [
        (
            "hugging_face",
            {},
            "--to: unknown format 'hugging_face' (known: gguf, hf, meta, orbax, peft)",
        ),
        ("hf", {"dtype": "q8_0"}, "--dtype: 'q8_0' can't be written as hf; one of float32, bfloa"),
        ("gguf", {"dtype": "q4_k"}, "--dtype: 'q4_k' can't be written as gguf; one of float32, bf"),
        ("orbax", {"shard_size": 5}, "--shard-size: orbax files are not sharded"),
        ("gguf", {"tokenizer": False}, "--no-tokenizer: a GGUF file is of no use without one"),
        ("gguf", {}, "dst: a GGUF file's name ends in .gguf"),
    ],
)
def test_options_without_use_are_refused(to, options, complaint, src, tmp_path):
    with pytest.raises(ConfigError) as caught:
        convert(src, tmp_path / "dst", to, **options)
    assert complaint in str(caught.value)
    assert names(tmp_path) == []


def test_a_folder_is_not_named_as_a_gguf_file(src, tmp_path):
    with pytest.raises(ConfigError, match="would be a folder of meta files named as a GGUF file"):
        convert(src, tmp_path / "dst.gguf", "meta")
    assert names(tmp_path) == []


def test_a_checkpoint_without_a_tokenizer_is_converted_only_where_asked(tmp_path):
    folder = write_folder(tmp_path / "src", CASES["linear"])
    with pytest.raises(TokenizerError, match="--no-tokenizer converts the weights alone"):
        convert(folder, tmp_path / "dst", "orbax")
    report = convert(folder, tmp_path / "dst", "orbax", tokenizer=False)
    assert report.notes == ("no tokenizer was written",)
    assert report.comparison.max_difference == 0.0
    assert names(tmp_path / "dst") == ["generation_config.json", "model.toml", "params"]


def test_a_checkpoint_at_fault_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    tensors = their_tensors(CASES["linear"])
    tensors["model.norm.weight"][3] = np.nan
    folder = write_folder(tmp_path / "src", CASES["linear"], tensors=tensors)
    monkeypatch.setattr(converting, "staged", lambda path: pytest.fail("something was written"))
    with pytest.raises(InterchangeError, match=r"tensor model\.norm\.weight holds a NaN"):
        convert(folder, tmp_path / "dst", "hf", tokenizer=False)


def test_what_the_new_format_says_otherwise_is_noted(src, tmp_path, monkeypatch):
    def forgetful(source, folder, **options):
        write_hugging_face(source, folder, **options)
        (folder / "chat_template.jinja").unlink()
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(table | {"max_position_embeddings": 99}))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))

    copy = shutil.copytree(src, tmp_path / "src")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "top_k": 2}))
    monkeypatch.setattr(converting, "write_hugging_face", forgetful)
    notes = convert(copy, tmp_path / "dst", "hf", verify=False).notes
    assert notes == (
        "max_seq_len: 64 became 99",
        "the chat template was left out",
        "generation: stop_ids: [3, 4] became [7]",
        "generation: top_k: 2 became None",
        "no other program knows the byte tokenizer: transformers reads the rest",
    )


def test_a_padded_embedding_is_told_not_refused(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=320)
    write_hugging_face(random_source(config), tmp_path / "src", tokenizer=ByteTokenizer())
    report = convert(tmp_path / "src", tmp_path / "dst", "orbax")
    assert report.notes == ("the tokenizer has 272 ids, the embedding 320 rows",)


def test_disagreement_is_judged_by_the_size_of_logits_and_the_top_token():
    assert Comparison(8, 1.9e-5, 0.5, 8).within_rounding
    assert Comparison(8, 1e-3, 100.0, 8).within_rounding
    assert not Comparison(8, 2.1e-5, 0.5, 8).within_rounding
    assert not Comparison(8, 0.0, 0.5, 7).within_rounding
    assert not Comparison(8, float("nan"), 0.5, 8).within_rounding


def test_the_prompt_fits_the_model():
    assert len(prompt_ids(None, 50, 1000)) == 64
    assert len(prompt_ids(None, 50, 10)) == 10
    assert max(prompt_ids(None, 50, 1000)) < 50
    assert prompt_ids(ByteTokenizer(), 272, 4) == [256, *b"The"]
    assert all(i < 100 for i in prompt_ids(ByteTokenizer(), 100, 64))


def test_logits_are_computed_on_one_device_where_the_mesh_does_not_divide_the_model():
    source = random_source(dataclasses.replace(CASES["linear"], mlp_dim=50))
    ids = prompt_ids(None, 64, 16)
    assert verifying.prompt_logits(source, ids).shape == (16, 64)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2 * 2**30), ("1.5 KB", 1500), ("77", 77)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5 apples", "", "0GB", "-1MB", "GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match=r"--shard-size: '.*' is not a size such as 5GB or 500MB"):
        parse_size(text)
