"""Folders that we write: bit-equal values, headers that others read, files that load."""

import dataclasses
import json
import struct

import numpy as np
import pytest
from in_memory import CONFIG, assert_bit_equal, random_source
from tiny_checkpoints import CASES

from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError
from llama_jax.tokenizers.byte import ByteTokenizer

DTYPES = {"float32": np.float32, "bfloat16": BFLOAT16, "float16": np.float16}
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


def header(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), length, len(data)


@pytest.mark.short
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["grouped_llama3_tied", "biased_yarn"])
def test_what_is_written_is_read_back_bit_by_bit(name, dtype, tmp_path):
    source = random_source(CASES[name], dtype=DTYPES[dtype])
    write_hugging_face(source, tmp_path)
    back = open_source(tmp_path)
    assert back.config == source.config
    assert_bit_equal(source, back)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype


def test_headers_are_what_transformers_asks_for(tmp_path):
    write_hugging_face(random_source(TIED), tmp_path)
    table, length, size = header(tmp_path / "model.safetensors")
    assert table.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    # Contiguous, in order, without holes; a tied model has no head.
    assert "lm_head.weight" not in table
    end = 0
    for about in table.values():
        assert about["data_offsets"][0] == end
        end = about["data_offsets"][1]
    assert 8 + length + end == size


@pytest.mark.short
def test_the_safetensors_package_reads_the_file(tmp_path):
    from safetensors.numpy import load_file

    source = random_source()
    write_hugging_face(source, tmp_path)
    theirs = load_file(tmp_path / "model.safetensors")
    assert len(theirs) == len(source.arrays)
    up = theirs["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(up, source.arrays["layers.1.mlp.up_proj"])


def test_another_dtype_is_rounded_to_nearest(tmp_path):
    source = random_source()
    write_hugging_face(source, tmp_path, dtype="bfloat16")
    back = open_source(tmp_path)
    for name, array in source.arrays.items():
        assert back.tensors[name].kind == "BF16"
        assert back.tensors[name].read_all().tobytes() == array.astype(BFLOAT16).tobytes()


def test_mixed_dtypes_are_kept_and_the_config_says_that_of_most(tmp_path):
    source = random_source(dtype=BFLOAT16)
    source.arrays["final_norm.scale"] = source.arrays["final_norm.scale"].astype(np.float32)
    write_hugging_face(source, tmp_path)
    back = open_source(tmp_path)
    assert back.tensors["final_norm.scale"].kind == "F32"
    assert_bit_equal(source, back)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_value_too_large_for_float16_is_refused(tmp_path):
    source = random_source()
    source.arrays["layers.1.mlp.up_proj"][3, 4] = 65504.0
    write_hugging_face(source, tmp_path, dtype="float16")
    source.arrays["layers.1.mlp.up_proj"][3, 4] = 70000.0
    with pytest.raises(InterchangeError, match=r"up_proj holds values over float16's largest, 655"):
        write_hugging_face(source, tmp_path, dtype="float16")


def test_shards_hold_at_most_their_size_and_the_index_places_every_tensor(tmp_path):
    source = random_source()
    write_hugging_face(source, tmp_path, shard_bytes=50_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    sizes = [header(tmp_path / file) for file in files]
    # The embedding and the head are larger than a file may be: each is alone in its own.
    over = [table for table, length, size in sizes if size - length - 8 > 50_000]
    assert [len(table) for table in over] == [2, 2]
    total = sum(array.nbytes for array in source.arrays.values())
    assert index["metadata"]["total_size"] == total
    assert_bit_equal(source, open_source(tmp_path))


def test_generation_tokenizer_and_template_lie_beside(tmp_path):
    defaults = GenerationDefaults(frozenset({257, 265}), 256, 260, 0.6, 50, 0.9, 0.05, 1.1)
    source = random_source(generation=defaults, chat_template="{{ bos_token }}é\n")
    write_hugging_face(source, tmp_path, tokenizer=ByteTokenizer())
    back = open_source(tmp_path)
    assert back.generation == defaults
    assert back.chat_template == "{{ bos_token }}é\n"
    assert back.load_tokenizer().encode("hé") == [104, 195, 169]
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == ([257, 265], 256)
    greedy = dataclasses.replace(defaults, temperature=0.0)
    write_hugging_face(random_source(generation=greedy), tmp_path)
    table = json.loads((tmp_path / "generation_config.json").read_text())
    assert (table["do_sample"], "temperature" in table) == (False, False)
    assert open_source(tmp_path).generation == greedy


def test_files_are_written_piece_by_piece(tmp_path, monkeypatch):
    from llama_jax.interchange import tensors

    source = random_source()
    write_hugging_face(source, tmp_path / "whole")
    monkeypatch.setattr(tensors, "PIECE_BYTES", 1000)
    write_hugging_face(source, tmp_path / "pieces")
    whole, pieces = ((tmp_path / n / "model.safetensors") for n in ("whole", "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()
