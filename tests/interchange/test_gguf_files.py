import dataclasses

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from in_memory import CONFIG, assert_bit_equal, random_source, values_of

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import LinearScaling, RopeConfig, YarnScaling
from llama_jax.interchange.checking import check_source
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.gguf import open_gguf
from llama_jax.interchange.gguf_rope import divisors
from llama_jax.interchange.gguf_writing import write_gguf
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError

DTYPES = {"float32": np.float32, "bfloat16": BFLOAT16, "float16": np.float16}
MODELS = {
    "grouped, llama3": CONFIG,
    "tied, plain": dataclasses.replace(CONFIG, tie_embeddings=True, rope=RopeConfig(5e5)),
    "biased, linear": dataclasses.replace(
        CONFIG, attention_bias=True, mlp_bias=True, rope=RopeConfig(1e4, LinearScaling(factor=2.0))
    ),
    "wide heads, yarn": dataclasses.replace(
        CONFIG, head_dim=16, rope=RopeConfig(1e4, YarnScaling(4.0, 16))
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A source and the file that was made of it."""
    source = random_source(generation=GenerationDefaults(stop_ids=frozenset({257, 265})))
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(source, file)
    return source, file


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_round_trip_is_bit_equal(tmp_path, model, dtype):
    source = random_source(MODELS[model], DTYPES[dtype])
    write_gguf(source, tmp_path / "x.gguf")
    opened = open_gguf(tmp_path / "x.gguf")
    check_source(opened)
    assert opened.config == source.config
    assert_bit_equal(source, opened, norms=np.float32)
    # And back to what it was where norms are wanted in the same dtype.
    for name, values in values_of(opened).items():
        assert values.astype(DTYPES[dtype]).tobytes() == source.arrays[name].tobytes()


def test_rows_of_q_and_k_are_stored_in_neighbour_pairs_and_no_others(written):
    source, file = written
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    for name, heads in (("q", 8), ("k", 2)):
        ours = source.arrays[f"layers.1.attention.{name}_proj"]
        theirs = stored[f"blk.1.attn_{name}.weight"]
        for head in range(heads):
            rows = [8 * head + row for row in (0, 4, 1, 5, 2, 6, 3, 7)]
            np.testing.assert_array_equal(theirs[8 * head : 8 * head + 8], ours[rows])
    for name, stored_name in (("v_proj", "attn_v"), ("o_proj", "attn_output")):
        ours = source.arrays[f"layers.0.attention.{name}"]
        np.testing.assert_array_equal(stored[f"blk.0.{stored_name}.weight"], ours)


def test_parts_of_tensors_are_parts_of_the_whole(written):
    source, file = written
    tensors = open_gguf(file).tensors
    for name, part in {
        "layers.0.attention.q_proj": (slice(16, 40), slice(3, 11)),
        "layers.1.attention.k_proj": (slice(8, 16), slice(0, 64)),
        "layers.1.mlp.down_proj": (slice(5, 6), slice(90, 96)),
        "embedding": (slice(287, 288), slice(0, 1)),
        "final_norm.scale": (slice(3, 9),),
    }.items():
        np.testing.assert_array_equal(tensors[name].read(part), source.arrays[name][part])


def test_a_slice_that_cuts_a_head_is_refused(written):
    tensors = open_gguf(written[1]).tensors
    with pytest.raises(InterchangeError, match=r"attn_q.weight: rows 4 to 12 cut a head of 8"):
        tensors["layers.0.attention.q_proj"].read((slice(4, 12), slice(0, 64)))


def test_everything_around_the_weights_comes_back(written):
    source, file = written
    opened = open_gguf(file)
    assert opened.chat_template == source.chat_template
    assert opened.generation.stop_ids == {257, 265}
    text = "Hello, <|eot_id|> é 你"
    assert opened.load_tokenizer().encode(text) == source.tokenizer.encode(text)
    assert opened.fields["general.name"] == "arrays"
    assert opened.fields["general.file_type"] == 0
    assert opened.fields["general.quantization_version"] == 2


def test_rows_without_a_token_get_unused_ones_as_llama_cpp_needs(written):
    fields = open_gguf(written[1]).fields
    assert len(fields["tokenizer.ggml.tokens"]) == 288
    assert fields["tokenizer.ggml.tokens"][272] == "[PAD272]"
    assert fields["tokenizer.ggml.token_type"][272:] == [5] * 16


def test_more_tokens_than_rows_are_refused(tmp_path):
    source = random_source(dataclasses.replace(CONFIG, vocab_size=256))
    with pytest.raises(InterchangeError, match="272 tokens for an embedding of 256 rows"):
        write_gguf(source, tmp_path / "x.gguf")


def test_scaled_rope_is_stored_as_divisors(written):
    opened = gguf.GGUFReader(written[1])
    (table,) = (tensor for tensor in opened.tensors if tensor.name == "rope_freqs.weight")
    assert table.data.dtype == np.float32
    np.testing.assert_array_equal(table.data, divisors(CONFIG.rope.scaling, 10000.0, 8))


def test_the_divisors_alone_say_the_scaling(written, tmp_path):
    """Files of others have no keys of ours; what is recovered gives the same divisors."""
    data = written[1].read_bytes()
    stripped = tmp_path / "x.gguf"
    stripped.write_bytes(data.replace(b"llama_jax.rope", b"llama_xxx.rope"))
    assert stripped.read_bytes() != data
    scaling = open_gguf(stripped).config.rope.scaling
    np.testing.assert_allclose(
        divisors(scaling, 10000.0, 8), divisors(CONFIG.rope.scaling, 10000.0, 8), rtol=1e-6
    )


def test_q8_0_keeps_norms_and_is_within_half_a_step(tmp_path):
    source = random_source(dtype=BFLOAT16)
    write_gguf(source, tmp_path / "x.gguf", dtype="q8_0")
    opened = open_gguf(tmp_path / "x.gguf")
    for name, tensor in opened.tensors.items():
        ours, theirs = source.arrays[name].astype(np.float32), tensor.read_all()
        if ours.ndim == 1:
            assert tensor.kind == "F32"
            np.testing.assert_array_equal(theirs, ours)
            continue
        assert tensor.kind == "Q8_0"
        steps = np.abs(ours.reshape(len(ours), -1, 32)).max(-1, keepdims=True) / 127
        # Half a step, and the rounding of the scale to float16.
        errors = np.abs(theirs - ours).reshape(*steps.shape[:2], 32)
        assert (errors <= steps * (0.5 + 127 / 2048)).all()
    assert opened.fields["general.file_type"] == 7
    # What is quantised already stays as it is.
    write_gguf(opened_with(opened, source), tmp_path / "y.gguf", dtype="q8_0")
    again = open_gguf(tmp_path / "y.gguf")
    for name, values in values_of(opened).items():
        np.testing.assert_allclose(again.tensors[name].read_all(), values, rtol=1e-3)


def opened_with(opened, source):
    """With the tokenizer of the source: padding is no part of it."""
    return dataclasses.replace(source, arrays=values_of(opened))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_wanted_dtype_is_written_and_norms_stay_float32(tmp_path, dtype):
    source = random_source()
    write_gguf(source, tmp_path / "x.gguf", dtype=dtype)
    opened = open_gguf(tmp_path / "x.gguf")
    for name, tensor in opened.tensors.items():
        wanted = np.float32 if len(tensor.shape) == 1 else DTYPES[dtype]
        assert tensor.dtype == wanted
        assert tensor.read_all().tobytes() == source.arrays[name].astype(wanted).tobytes()


def test_what_a_dtype_cannot_hold_is_told(tmp_path):
    source = random_source()
    source.arrays["layers.1.mlp.up_proj"][5, 5] = 7e4
    with pytest.raises(InterchangeError, match=r"layers.1.mlp.up_proj holds values over float16"):
        write_gguf(source, tmp_path / "x.gguf", dtype="float16")
    narrow = random_source(dataclasses.replace(CONFIG, mlp_dim=48))
    with pytest.raises(InterchangeError, match=r"layers.0.mlp.down_proj: rows of 48 can't be Q8_0"):
        write_gguf(narrow, tmp_path / "x.gguf", dtype="q8_0")
    with pytest.raises(InterchangeError, match=r"dtype 'q8' .*did you mean 'q8_0'"):
        write_gguf(source, tmp_path / "x.gguf", dtype="q8")


def rewritten(file, target, *, drop=(), add=None, change=None, fields=None):
    """The same file by the gguf package's writer, with tensors or whole numbers changed."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, items = field.types[0], [*field.types[1:], None][0]
            writer.add_key_value(key, field.contents(), kind, items)
    for key, value in (fields or {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_uint32(key, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            data = (change or {}).get(tensor.name, tensor.data)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    for name, data in (add or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_tensors_that_are_missing_too_many_or_misshapen_are_told(written, tmp_path):
    file, target = written[1], tmp_path / "x.gguf"
    with pytest.raises(InterchangeError, match=r"tensor blk.1.ffn_up.weight is missing"):
        check_source(open_gguf(rewritten(file, target, drop=["blk.1.ffn_up.weight"])))
    extra = {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}
    with pytest.raises(InterchangeError, match=r"attn_q_norm.weight has no place in the model"):
        check_source(open_gguf(rewritten(file, target, add=extra)))
    short = {"output_norm.weight": np.ones(60, np.float32)}
    with pytest.raises(InterchangeError, match=r"output_norm.weight has shape \[60\].* \[64\]"):
        check_source(open_gguf(rewritten(file, target, change=short)))
    bias = {"blk.0.attn_q.bias": np.ones(64, np.float32)}
    with pytest.raises(InterchangeError, match=r"blk.0.attn_k.bias is missing"):
        check_source(open_gguf(rewritten(file, target, add=bias)))
    with pytest.raises(InterchangeError, match=r"no tensor token_embd.weight"):
        open_gguf(rewritten(file, target, drop=["token_embd.weight"]))


def test_a_nan_is_told_by_tensor(tmp_path):
    source = random_source()
    source.arrays["layers.0.attention.q_proj"][3, 3] = np.nan
    write_gguf(source, tmp_path / "x.gguf")
    with pytest.raises(InterchangeError, match=r"x.gguf: tensor blk.0.attn_q.weight holds a NaN"):
        check_source(open_gguf(tmp_path / "x.gguf"))


def test_a_kind_that_cannot_be_read_is_refused_on_opening(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, 84), np.uint8), raw_dtype=Kind.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InterchangeError, match=r"token_embd.weight: Q2_K can't be read"):
        open_gguf(tmp_path / "x.gguf")


def test_metadata_that_contradicts_the_tensors_is_told(written, tmp_path):
    wrong = {"rope_freqs.weight": np.full(4, 3.0, np.float32)}
    with pytest.raises(InterchangeError, match=r"rope_freqs.weight: .*doesn't give these divisors"):
        open_gguf(rewritten(written[1], tmp_path / "x.gguf", change=wrong))
    few = {"token_embd.weight": np.zeros((272, 64), np.float32)}
    with pytest.raises(InterchangeError, match=r"token_embd.weight has shape \[272, 64\]"):
        check_source(open_gguf(rewritten(written[1], tmp_path / "x.gguf", change=few)))


def test_a_stop_id_outside_the_vocabulary_is_an_error(written, tmp_path):
    fields = {"tokenizer.ggml.eot_token_id": 5000}
    with pytest.raises(InterchangeError, match="eos_token_id: 5000 is outside the vocabulary"):
        open_gguf(rewritten(written[1], tmp_path / "x.gguf", fields=fields))


def test_no_architecture_but_llama_is_read(written, tmp_path):
    data = (
        written[1].read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2", 1)
    )
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ConfigError, match=r"general.architecture: 'qwen2' is not supported"):
        open_gguf(tmp_path / "x.gguf")
