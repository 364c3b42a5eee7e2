"""Hugging Face folders: what is read, and every way in which one can be wrong."""

import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
from tiny_checkpoints import (
    CASES,
    F32,
    STORED,
    config_table,
    logits,
    reference_batch,
    their_tensors,
    write_by_hand,
    write_folder,
    write_sharded,
)

from llama_jax.config.files import load_model_config
from llama_jax.config.run import MeshConfig
from llama_jax.interchange.checking import check_source, check_structure
from llama_jax.interchange.hugging_face import HuggingFaceSource
from llama_jax.interchange.hugging_face_names import from_hugging_face, to_hugging_face
from llama_jax.interchange.loading import load_model
from llama_jax.interchange.opening import open_source
from llama_jax.interchange.safetensors_reading import Entry, read_header
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError, canonical_shapes
from llama_jax.sharding.mesh import make_mesh

LOGITS = 2e-5
PLAIN, TIED = CASES["multi_head_plain"], CASES["grouped_llama3_tied"]


def refused(folder):
    """The one line with which opening, checking and loading refuse a folder."""
    before = len(jax.live_arrays())
    with pytest.raises(InterchangeError) as caught:
        load_model(open_source(folder), F32, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert len(jax.live_arrays()) == before, "device memory was taken first"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.short
@pytest.mark.parametrize(
    ("name", "style"),
    [*((name, "old") for name in CASES), ("biased_yarn", "new"), ("grouped_llama3", "oldest")],
)
def test_loaded_models_have_the_logits_of_transformers(name, style, tmp_path):
    config = CASES[name]
    folder = write_folder(tmp_path, config, style=style)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = load_model(open_source(folder), F32, mesh)
    stored = np.load(STORED)[name]
    np.testing.assert_allclose(logits(model, mesh, reference_batch(config)), stored, atol=LOGITS)


def test_names_of_every_model_go_there_and_back():
    for name in [*canonical_shapes(PLAIN), *canonical_shapes(CASES["biased_yarn"])]:
        assert from_hugging_face(to_hugging_face(name)) == name
    assert to_hugging_face("layers.11.attention.q_bias") == "model.layers.11.self_attn.q_proj.bias"
    for strange in ("model.layers.01.input_layernorm.weight", "lm_head.bias", "layers.0.mlp"):
        assert from_hugging_face(strange) is None


def test_rotary_tables_of_old_files_are_passed_over(tmp_path):
    tensors = their_tensors(PLAIN)
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    source = open_source(write_folder(tmp_path, PLAIN, tensors=tensors))
    check_source(source)
    assert set(source.tensors) == set(canonical_shapes(PLAIN))


def test_bfloat16_is_read_by_its_bits(tmp_path):
    # 80 3F is 1.0, C0 3F is 1.5; as float16 the same bits are 1.875 and 1.9375.
    bits = np.frombuffer(bytes.fromhex("803fc03f"), np.uint16).reshape(1, 2)
    write_by_hand(tmp_path / "x.safetensors", {"x": bits}, metadata=False)
    entry = read_header(tmp_path / "x.safetensors")["x"]
    values = entry.read((slice(0, 1), slice(0, 2)))
    assert (entry.kind, values.dtype) == ("BF16", BFLOAT16)
    assert values.astype(np.float32).tolist() == [[1.0, 1.5]]


def test_only_the_rows_asked_for_are_read(tmp_path, monkeypatch):
    source = open_source(write_folder(tmp_path, PLAIN))
    mapped = []
    original = np.memmap

    def spy(*arguments, **options):
        mapped.append(options["shape"][0])
        return original(*arguments, **options)

    monkeypatch.setattr(np, "memmap", spy)
    values = source.tensors["layers.1.mlp.up_proj"].read((slice(5, 9), slice(3, 20)))
    assert mapped == [4 * 32 * 4]
    whole = their_tensors(PLAIN)["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(values, whole[5:9, 3:20])


def test_opening_a_405b_reads_headers_alone(tmp_path, monkeypatch):
    config = load_model_config("llama3.1-405b")
    (tmp_path / "config.json").write_text(json.dumps(config_table(config)))
    header, end = {}, 0
    for name, shape in canonical_shapes(config).items():
        size = 2 * int(np.prod(shape))
        header[to_hugging_face(name)] = {
            "dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size],
        }  # fmt: skip
        end += size
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)  # sparse: 812 GB that take no room
    monkeypatch.setattr(Entry, "read", lambda *_: pytest.fail("a value was read"))
    source = open_source(tmp_path)
    check_structure(source)
    assert len(source.tensors) == 126 * 9 + 3
    assert sum(tensor.nbytes for tensor in source.tensors.values()) == 2 * 405_853_388_800


def test_sharded_files_are_the_same_model(tmp_path):
    whole = open_source(write_folder(tmp_path / "one", PLAIN))
    sharded = open_source(write_sharded(tmp_path / "two", PLAIN))
    assert len({tensor.file for tensor in sharded.tensors.values()}) == 2
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(sharded.tensors[name].read_all(), tensor.read_all())


# Tied heads: flag true or false, tensor present or absent.
def test_a_tied_head_may_be_stored_where_it_is_the_embedding(tmp_path):
    tensors = their_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model = load_model(open_source(write_folder(tmp_path, TIED, tensors=tensors)), F32, mesh)
    assert not hasattr(model, "lm_head")
    stored = np.load(STORED)["grouped_llama3_tied"]
    np.testing.assert_allclose(logits(model, mesh, reference_batch(TIED)), stored, atol=LOGITS)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    tensors = their_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["lm_head.weight"][-1, -1] += 1e-6
    message = refused(write_folder(tmp_path, TIED, tensors=tensors))
    assert "tensor lm_head.weight differs from model.embed_tokens.weight" in message
    assert "set tie_word_embeddings to false, or remove the tensor" in message


def test_an_untied_head_that_is_absent_is_refused(tmp_path):
    untied = dataclasses.replace(TIED, tie_embeddings=False)
    message = refused(write_folder(tmp_path, untied, tensors=their_tensors(TIED)))
    assert "tensor lm_head.weight is missing; the config doesn't say that the head is" in message


def test_an_untied_head_is_used(tmp_path):
    source = open_source(write_folder(tmp_path, PLAIN))
    head = source.tensors["lm_head"].read_all()
    np.testing.assert_array_equal(head, their_tensors(PLAIN)["lm_head.weight"])
    assert not np.array_equal(head, source.tensors["embedding"].read_all())


def without(name):
    return {key: value for key, value in their_tensors(PLAIN).items() if key != name}


def changed(name, value):
    return their_tensors(PLAIN) | {name: value}


Q1 = "model.layers.1.self_attn.q_proj.weight"
NAN = their_tensors(PLAIN)["model.layers.1.mlp.down_proj.weight"].copy()
NAN[7, 31] = np.nan


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        (without(Q1), f"tensor {Q1} is missing"),
        (
            without(Q1) | {Q1.replace("q_proj", "wq_proj"): np.ones((32, 32), np.float32)},
            f"tensor {Q1} is missing (did you mean '{Q1.replace('q_proj', 'wq_proj')}'?)",
        ),
        (
            changed("model.layers.0.self_attn.q_norm.weight", np.ones(4, np.float32)),
            "tensor model.layers.0.self_attn.q_norm.weight has no place in the model that the con",
        ),
        (
            changed("model.layers.2.input_layernorm.weight", np.ones(32, np.float32)),
            "tensor model.layers.2.input_layernorm.weight has no place in the model that",
        ),
        (
            changed("model.layers.0.self_attn.q_proj.bias", np.ones(32, np.float32)),
            "tensor model.layers.0.self_attn.q_proj.bias has no place in the model that",
        ),
        (
            changed(Q1, np.ones((32, 31), np.float32)),
            f"tensor {Q1} has shape [32, 31]; the config asks for [32, 32]",
        ),
        (
            changed("model.embed_tokens.weight", np.ones((63, 32), np.float32)),
            "tensor model.embed_tokens.weight has shape [63, 32]; the config asks for [64, 32]",
        ),
        (changed(Q1, np.ones((32, 32), np.int64)), f"tensor {Q1}: dtype I64 is not supported"),
        (
            changed("model.layers.1.mlp.down_proj.weight", NAN),
            "tensor model.layers.1.mlp.down_proj.weight holds a NaN",
        ),
    ],
)
def test_a_tensor_at_fault_is_named_before_memory_is_taken(tensors, complaint, tmp_path):
    message = refused(write_folder(tmp_path, PLAIN, tensors=tensors))
    assert complaint in message
    assert message.startswith(str(tmp_path))


@pytest.mark.parametrize("bits", [0x7FC0, 0xFF81, 0x7F81])
def test_a_nan_is_found_in_16_bits_too(bits, tmp_path):
    tensors = their_tensors(PLAIN)
    for name in ("model.norm.weight", Q1):
        halves = (tensors[name].view(np.uint32) >> 16).astype(np.uint16)
        write_folder(tmp_path, PLAIN, tensors=tensors | {name: halves})
        check_source(open_source(tmp_path))
        halves.flat[-1] = 0xFF80  # minus infinity is a number
        write_folder(tmp_path, PLAIN, tensors=tensors | {name: halves})
        check_source(open_source(tmp_path))
        halves.flat[-1] = bits
        assert f"tensor {name} holds a NaN" in refused(
            write_folder(tmp_path, PLAIN, tensors=tensors | {name: halves})
        )


def test_a_truncated_file_is_told_by_its_tensor(tmp_path):
    write_folder(tmp_path, PLAIN)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    last = list(their_tensors(PLAIN))[-1]
    assert f"tensor {last}: truncated; it ends at byte" in refused(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    assert "not a safetensors file, or cut off in its header: 100 bytes" in refused(tmp_path)


def test_a_header_entry_that_contradicts_itself_is_refused(tmp_path):
    write_folder(tmp_path, PLAIN)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [31]
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    assert "tensor model.norm.weight: 128 bytes for F32[31], which takes 124" in refused(tmp_path)


def moved(said):
    first, second = sorted(set(said.values()))
    return said | {Q1: first if said[Q1] == second else second}


@pytest.mark.parametrize(
    ("places", "complaint"),
    [
        (lambda said: {k: v for k, v in said.items() if k != Q1}, f"tensor {Q1} of model-0000"),
        (lambda said: said | {"model.extra": said[Q1]}, "tensor model.extra is missing, though"),
        (lambda said: said | {Q1: "model-00003-of-00002.safetensors"}, f"places {Q1} there"),
        (lambda said: said | {Q1: "../x.safetensors"}, "'../x.safetensors' is not a file of this"),
        (moved, f"tensor {Q1} is in model-0000"),
        (
            lambda said: {k: v for k, v in said.items() if "00001" in v},
            "not in model.safetensors.i",
        ),
        (lambda said: list(said), "weight_map: expected an object of file names"),
    ],
)
def test_an_index_that_contradicts_the_files_is_refused(places, complaint, tmp_path):
    assert complaint in refused(write_sharded(tmp_path, PLAIN, places=places))


def test_a_shard_that_is_absent_is_named_with_a_tensor(tmp_path):
    folder = write_sharded(tmp_path, PLAIN)
    (folder / "model-00002-of-00002.safetensors").unlink()
    message = refused(folder)
    assert "model-00002-of-00002.safetensors: no such file, though model.safe" in message
    (folder / "model.safetensors.index.json").unlink()
    assert "index.json: no such file, though there is model-00001-of-0" in refused(folder)


def test_folders_without_safetensors_or_with_both_forms_are_refused(tmp_path):
    folder = write_folder(tmp_path, PLAIN)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "both model.safetensors and model.safetensors.index.json" in refused(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, only safetensors are read" in refused(folder)


def test_generation_defaults_come_from_their_file_else_the_config(tmp_path):
    folder = write_folder(tmp_path, PLAIN, changes={"eos_token_id": [2, 5], "pad_token_id": -1})
    defaults = open_source(folder).generation
    assert (defaults.stop_ids, defaults.bos_id, defaults.pad_id) == ({2, 5}, 1, None)
    table = {"bos_token_id": 3, "eos_token_id": 7, "temperature": 0.6, "top_p": 0.9, "top_k": 50}
    (folder / "generation_config.json").write_text(json.dumps(table | {"do_sample": True}))
    defaults = open_source(folder).generation
    assert (defaults.stop_ids, defaults.bos_id) == ({7}, 3)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.9, 50)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    defaults = open_source(folder).generation
    assert (defaults.stop_ids, defaults.temperature) == ({2, 5}, 0.0)


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"eos_token_id": [2, 64]}, "eos_token_id: 64 is outside the vocabulary of 64"),
        ({"bos_token_id": -1}, "bos_token_id: -1 is outside the vocabulary of 64"),
        ({"eos_token_id": "</s>"}, "eos_token_id: '</s>' is not a token id"),
        ({"temperature": "warm"}, "temperature: 'warm' is not a number"),
        ({"top_k": 1.5}, "top_k: 1.5 is not a whole number"),
    ],
)
def test_generation_defaults_that_cant_be_used_are_refused(table, complaint, tmp_path):
    folder = write_folder(tmp_path, PLAIN)
    (folder / "generation_config.json").write_text(json.dumps(table))
    message = refused(folder)
    assert message == f"{folder / 'generation_config.json'}: {complaint}"


def test_chat_templates_are_found_in_all_their_places(tmp_path):
    folder = write_folder(tmp_path, PLAIN)
    assert open_source(folder).chat_template is None
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "in the tokenizer's"}))
    assert open_source(folder).chat_template == "in the tokenizer's"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert open_source(folder).chat_template == "d"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "its own"}))
    assert open_source(folder).chat_template == "its own"
    (folder / "chat_template.jinja").write_text("jinja\n")
    assert open_source(folder).chat_template == "jinja\n"


def test_a_chat_template_that_is_none_is_refused(tmp_path):
    folder = write_folder(tmp_path, PLAIN)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "rag", "template": "r"}]}))
    assert "chat_template: none of rag is named default" in refused(folder)
    config.write_text(json.dumps({"chat_template": 5}))
    assert "chat_template: expected text, got 5" in refused(folder)


def test_a_json_file_at_fault_is_named(tmp_path):
    folder = write_folder(tmp_path, PLAIN)
    (folder / "config.json").write_text('{"model_type": ')
    assert refused(folder).startswith(f"{folder / 'config.json'}: Expecting value")
    (folder / "config.json").write_text("[]")
    assert refused(folder) == f"{folder / 'config.json'}: not a JSON object"


def test_the_source_says_where_its_tensors_are(tmp_path):
    source = HuggingFaceSource(write_folder(tmp_path, PLAIN))
    tensor = source.tensors["final_norm.scale"]
    assert (tensor.stored_name, tensor.kind) == ("model.norm.weight", "F32")
    assert tensor.file == str(tmp_path / "model.safetensors")
    assert (source.format, source.path) == ("hf", tmp_path)
