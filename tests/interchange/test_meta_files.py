import dataclasses
import itertools
import json
import re
import sys

import numpy as np
import pytest
from in_memory import CONFIG, assert_bit_equal, logits, random_source, values_of
from meta_by_hand import as_torch, cut, forward, save, state_of

from llama_jax.config.loading import ConfigError
from llama_jax.config.model import RopeConfig
from llama_jax.interchange.checking import check_source
from llama_jax.interchange.generation_defaults import GenerationDefaults
from llama_jax.interchange.meta import open_meta
from llama_jax.interchange.meta_params import params_from_config
from llama_jax.interchange.meta_rows import to_half_split, to_neighbour_pairs
from llama_jax.interchange.meta_writing import write_meta
from llama_jax.interchange.tensors import BFLOAT16, InterchangeError
from llama_jax.tokenizers.byte import ByteTokenizer

torch = pytest.importorskip("torch")

DTYPES = {"float32": np.float32, "bfloat16": BFLOAT16, "float16": np.float16}
# 8 KV heads over 16 ranks: two hold each.
WIDE = dataclasses.replace(
    CONFIG, embed_dim=128, num_heads=16, num_kv_heads=8, mlp_dim=192, num_layers=1
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True, rope=RopeConfig(5e5))


def saved(folder, config, ranks=1, *, dtype=np.float32, embedding_dim=0, change=None):
    source = random_source(config, dtype)
    shards = cut(
        state_of(source.arrays, config.head_dim),
        ranks,
        config.num_kv_heads,
        embedding_dim=embedding_dim,
    )
    if change is not None:
        change(shards)
    return source, save(folder, params_from_config(config), shards)


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_any_number_of_ranks_is_joined_along_the_right_dims(tmp_path, ranks, embedding_dim):
    source, folder = saved(tmp_path, WIDE, ranks, embedding_dim=embedding_dim)
    opened = open_meta(folder)
    check_source(opened)
    assert opened.config == WIDE
    assert_bit_equal(source, opened)


def test_a_kv_head_on_four_ranks_each_is_joined_once(tmp_path):
    source, folder = saved(tmp_path, dataclasses.replace(WIDE, num_kv_heads=2), 8)
    assert_bit_equal(source, open_meta(folder))


def test_parts_across_ranks_are_parts_of_the_whole(tmp_path):
    source, folder = saved(tmp_path, WIDE, 16, embedding_dim=1)
    tensors = open_meta(folder).tensors
    for name, rows, columns in itertools.product(
        ["layers.0.attention.q_proj", "layers.0.attention.k_proj", "layers.0.attention.o_proj",
         "layers.0.mlp.down_proj", "embedding"],
        [slice(8, 16), slice(8, 56)],
        [slice(0, 128), slice(3, 9), slice(7, 125)],
    ):  # fmt: skip
        part = tensors[name].read((rows, columns))
        np.testing.assert_array_equal(part, source.arrays[name][rows, columns])
    with pytest.raises(InterchangeError, match=r"wq.weight: rows 0 to 4 cut a head of 8"):
        tensors["layers.0.attention.q_proj"].read((slice(0, 4), slice(0, 128)))


def test_a_buffer_of_rotary_frequencies_is_passed_over(tmp_path):
    def change(shards):
        for shard in shards:
            shard["rope.freqs"] = np.ones(4, np.float32)

    _, folder = saved(tmp_path, CONFIG, 2, change=change)
    check_source(open_meta(folder))


@pytest.mark.short
def test_the_order_of_rows_of_a_head_of_eight():
    x_NHX = np.arange(8)
    assert to_half_split(x_NHX, 8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert to_neighbour_pairs(x_NHX, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    rows = np.arange(48).reshape(24, 2)
    np.testing.assert_array_equal(to_neighbour_pairs(to_half_split(rows, 8), 8), rows)


def test_logits_are_those_of_metas_own_formulas_at_every_position(tmp_path):
    """Rows in the wrong order give fluent logits that are wrong from the second position on."""
    source, folder = saved(tmp_path, CONFIG, 2)
    ids = np.random.default_rng(1).integers(0, 288, 40)
    state = state_of(source.arrays, 8)
    wanted_TV = forward(state, params_from_config(CONFIG), ids, scaling=(4.0, 1.0, 4.0, 64))
    ours_TV = logits(open_meta(folder), ids)
    assert np.abs(wanted_TV).max() > 1
    np.testing.assert_allclose(ours_TV, wanted_TV, atol=1e-5)
    # The same weights in half-split order, as Hugging Face's files have them.
    np.testing.assert_allclose(logits(source, ids), ours_TV, atol=1e-5)
    # And the check is sharp: untouched rows are far off.
    wrong_TV = forward(
        state | {"layers.0.attention.wq.weight": source.arrays["layers.0.attention.q_proj"]},
        params_from_config(CONFIG), ids, scaling=(4.0, 1.0, 4.0, 64),
    )  # fmt: skip
    assert np.abs(wrong_TV - wanted_TV)[1:].max() > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["grouped, llama3", "tied, plain"])
def test_a_round_trip_is_bit_equal(tmp_path, config, dtype):
    source = random_source(config, DTYPES[dtype])
    write_meta(source, tmp_path / "m", tokenizer=ByteTokenizer())
    opened = open_meta(tmp_path / "m")
    check_source(opened)
    assert opened.config == config
    assert_bit_equal(source, opened)
    names = torch.load(tmp_path / "m/consolidated.00.pth", weights_only=True)
    assert ("output.weight" in names) == (not config.tie_embeddings)


def test_what_is_written_is_metas_layout_to_torch(tmp_path):
    source = random_source(CONFIG, BFLOAT16)
    write_meta(source, tmp_path)
    for mapped in (True, False):
        theirs = torch.load(tmp_path / "consolidated.00.pth", mmap=mapped, weights_only=True)
        wanted = state_of(source.arrays, 8)
        assert theirs.keys() == wanted.keys()
        for name, array in wanted.items():
            assert theirs[name].dtype == torch.bfloat16
            assert torch.equal(theirs[name], as_torch(array)), name
            # A map of the file can be used as it is.
            assert theirs[name].data_ptr() % 64 == 0
    import zipfile

    with zipfile.ZipFile(tmp_path / "consolidated.00.pth") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wanted_dtype_is_written(tmp_path, dtype):
    source = random_source()
    write_meta(source, tmp_path, dtype=dtype)
    for name, array in values_of(open_meta(tmp_path)).items():
        assert array.tobytes() == source.arrays[name].astype(DTYPES[dtype]).tobytes(), name


def test_what_lies_beside_the_weights_comes_back(tmp_path):
    generation = GenerationDefaults(stop_ids=frozenset({257, 265}), temperature=0.6, top_p=0.9)
    source = random_source(generation=generation)
    write_meta(source, tmp_path, tokenizer=ByteTokenizer())
    opened = open_meta(tmp_path)
    assert opened.generation == generation
    assert opened.chat_template == source.chat_template
    assert opened.load_tokenizer().encode("é") == [195, 169]


def test_without_more_a_completion_ends_with_the_tokenizers_end_of_text(tmp_path):
    _, folder = saved(tmp_path, CONFIG)
    assert open_meta(folder).generation == GenerationDefaults()
    ByteTokenizer().save(folder)
    assert open_meta(folder).generation.stop_ids == {257}


def test_a_vocabulary_left_open_is_the_tokenizers(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=272)
    _, folder = saved(tmp_path, config)
    params = json.loads((folder / "params.json").read_text()) | {"vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    assert open_meta(folder).config.vocab_size == 272  # by the tensor alone
    ByteTokenizer().save(folder)
    assert open_meta(folder).config.vocab_size == 272


def test_a_vocabulary_that_contradicts_the_embedding_is_told(tmp_path):
    _, folder = saved(tmp_path, CONFIG)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": 300}))
    with pytest.raises(ConfigError, match="vocab_size 300 contradicts the 288 rows of tok_emb"):
        open_meta(folder)
    (folder / "params.json").write_text(json.dumps(params | {"vocab_size": -1}))
    ByteTokenizer().save(folder)
    with pytest.raises(ConfigError, match="the tokenizer's 272 contradicts the 288 rows"):
        open_meta(folder)


def test_a_stored_head_that_equals_the_embedding_is_tied(tmp_path):
    def change(shards):
        shards[0]["output.weight"] = shards[0]["tok_embeddings.weight"]

    _, folder = saved(tmp_path / "equal", TIED, change=change)
    opened = open_meta(folder)
    check_source(opened)
    assert opened.config.tie_embeddings
    assert "lm_head" not in opened.tensors

    def change_last(shards):
        change(shards)
        shards[0]["output.weight"] = shards[0]["output.weight"].copy()
        shards[0]["output.weight"][-1, -1] += 1

    _, folder = saved(tmp_path / "other", TIED, change=change_last)
    assert not open_meta(folder).config.tie_embeddings


def drop(name):
    return lambda shards: shards[-1].pop(name)


def put(name, shape):
    return lambda shards: shards[-1].update({name: np.ones(shape, np.float32)})


def poke(name, value=7.0):
    def change(shards):
        shards[-1][name] = shards[-1][name].copy()
        shards[-1][name].flat[0] = value

    return change


W3, WQ, WV = (
    f"layers.1.{name}.weight" for name in ("feed_forward.w3", "attention.wq", "attention.wv")
)
# What is done to the last rank, of how many, and what is said.
FAULTS = {
    "missing": (drop(W3), 1, f"tensor {W3} is missing"),
    "missing at a rank": (
        drop(W3), 2, f"01.pth: tensor {W3} is missing, though consolidated.00.pth has it"
    ),
    "no embedding": (drop("tok_embeddings.weight"), 1, "no tensor tok_embeddings.weight"),
    "too many": (
        put("layers.0.attention.wq.bias", 64), 1, "layers.0.attention.wq.bias has no place"
    ),
    "misshapen": (
        put("norm.weight", 60), 1, "norm.weight has shape [60]; the config asks for [64]"
    ),
    "misshapen at a rank": (
        put("output.weight", (9, 64)), 2,
        "01.pth: tensor output.weight is float32 [9, 64], but in consolidated.00.pth float32 "
        "[144, 64]",
    ),
    "norms that differ": (
        poke("norm.weight"), 2,
        "01.pth: tensor norm.weight differs from that of consolidated.00.pth, of which",
    ),
    "copies that differ": (
        poke(WV), 4, f"03.pth: tensor {WV} differs from that of consolidated.02.pth"
    ),
    "nan": (poke(WQ, np.nan), 1, f"tensor {WQ} holds a NaN"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_at_fault_are_told(tmp_path, fault):
    change, ranks, message = FAULTS[fault]
    _, folder = saved(tmp_path, CONFIG, ranks, change=change)
    with pytest.raises(InterchangeError, match=re.escape(message)):
        check_source(open_meta(folder))


def test_a_width_of_the_mlp_that_the_formula_doesnt_give_is_told(tmp_path):
    _, folder = saved(tmp_path, CONFIG)
    params = json.loads((folder / "params.json").read_text()) | {"multiple_of": 256}
    (folder / "params.json").write_text(json.dumps(params))
    message = r"give an MLP 256 wide, but layers.0.feed_forward.w1.weight has 96 rows"
    with pytest.raises(ConfigError, match=message):
        open_meta(folder)


def test_missing_and_broken_files_are_told(tmp_path):
    _, folder = saved(tmp_path, CONFIG, 2)
    second = folder / "consolidated.01.pth"
    second.rename(folder / "consolidated.02.pth")
    with pytest.raises(InterchangeError, match=r"consolidated.01.pth: missing, though there is"):
        open_meta(folder)
    (folder / "consolidated.02.pth").rename(second)
    data = second.read_bytes()
    for size in (len(data) - 100, len(data) // 2, 10, 0):
        second.write_bytes(data[:size])
        with pytest.raises(InterchangeError, match=r"consolidated.01.pth: truncated, or not a"):
            open_meta(folder)
    for path in folder.glob("*.pth"):
        path.unlink()
    with pytest.raises(InterchangeError, match=r"no consolidated.00.pth"):
        open_meta(folder)
    (folder / "params.json").write_text("{")
    with pytest.raises(InterchangeError, match=r"params.json: "):
        open_meta(folder)


class Marker:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_holds_code_is_refused_and_not_run(tmp_path):
    _, folder = saved(tmp_path, CONFIG)
    marker = tmp_path / "ran"
    torch.save({"norm.weight": Marker(marker)}, folder / "consolidated.00.pth")
    with pytest.raises(InterchangeError, match="holds more than tensors"):
        open_meta(folder)
    assert not marker.exists()
    torch.save({"norm.weight": 3}, folder / "consolidated.00.pth")
    with pytest.raises(InterchangeError, match=r"norm.weight: a int, not a tensor"):
        open_meta(folder)
    torch.save({"norm.weight": torch.ones(2, dtype=torch.int8)}, folder / "consolidated.00.pth")
    with pytest.raises(InterchangeError, match=r"norm.weight: torch.int8 can't be read"):
        open_meta(folder)


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    _, folder = saved(tmp_path, CONFIG)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InterchangeError, match=r"pip install 'llama-jax\[torch\]'"):
        open_meta(folder)
    with pytest.raises(InterchangeError, match=r"pip install 'llama-jax\[torch\]'"):
        write_meta(random_source(), tmp_path / "m")


def test_a_value_over_float16s_largest_is_told(tmp_path):
    source = random_source()
    source.arrays["layers.1.mlp.up_proj"][5, 5] = 7e4
    with pytest.raises(InterchangeError, match=r"layers.1.mlp.up_proj holds values over float16"):
        write_meta(source, tmp_path, dtype="float16")
