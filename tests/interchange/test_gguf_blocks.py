import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf.constants import GGML_QUANT_SIZES

from llama_jax.interchange import gguf_blocks
from llama_jax.interchange.gguf_header import GGUFTensor
from llama_jax.interchange.tensors import InterchangeError

BLOCKS = [kind for kind in gguf_blocks.KINDS if kind not in gguf_blocks.FLOATS]
ROWS, COLUMNS = 5, 512


def half(value):
    return np.float16(value).tobytes()


def place(path, data, kind, shape):
    """A tensor behind three bytes that aren't its own."""
    path.write_bytes(b"abc" + data)
    return GGUFTensor("t", shape, kind, path, 3)


def random_blocks(kind, rows=ROWS, columns=COLUMNS):
    """Any bytes, but scales that are numbers of a usual size."""
    block, size = GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(int(kind))
    data = random.integers(0, 256, (rows * columns // block, size), np.uint8)
    scales = random.normal(size=(len(data), 2)).astype(np.float16).view(np.uint8)
    if kind is Kind.Q6_K:
        data[:, 208:] = scales[:, :2]
    else:
        data[:, :2] = scales[:, :2]
        if kind in (Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K):
            data[:, 2:4] = scales[:, 2:]
    return data.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_mean_what_the_gguf_package_says_whole_and_in_parts(tmp_path, kind):
    blocks_OB = random_blocks(kind)
    tensor = place(tmp_path / "t", blocks_OB.tobytes(), kind, (ROWS, COLUMNS))
    wanted_OI = gguf.quants.dequantize(blocks_OB, kind)
    assert np.isfinite(wanted_OI).all()
    whole = (slice(0, ROWS), slice(0, COLUMNS))
    for rows, columns in (whole, (slice(1, 4), whole[1]), (slice(2, 3), slice(33, 290))):
        part = gguf_blocks.read_part(tensor, (rows, columns))
        assert part.dtype == np.float32
        np.testing.assert_array_equal(part, wanted_OI[rows, columns])
    assert not gguf_blocks.has_nan(tensor)


@pytest.mark.parametrize(
    ("kind", "data", "values"),
    [
        # d q: a scale of 0.5 and int8 from -16 to 15.
        (Kind.Q8_0, half(0.5) + bytes(np.arange(-16, 16, dtype=np.int8)), np.arange(-16, 16) / 2),
        # d (q - 8): low nibbles are weights 0 to 15, high ones 16 to 31.
        (
            Kind.Q4_0,
            half(-0.25) + bytes(i | (15 - i) << 4 for i in range(16)),
            [-0.25 * (i - 8) for i in range(16)] + [-0.25 * (7 - i) for i in range(16)],
        ),
        # d q + m.
        (
            Kind.Q4_1,
            half(0.5) + half(-3.0) + bytes(i | (15 - i) << 4 for i in range(16)),
            [0.5 * i - 3 for i in range(16)] + [0.5 * (15 - i) - 3 for i in range(16)],
        ),
        # d (q - 16), the fifth bits apart: set for the even weights alone.
        (
            Kind.Q5_0,
            half(0.5) + bytes([0x55] * 4) + bytes([0x21] * 16),
            [0.5 * ((1 if i < 16 else 2) + (0 if i % 2 else 16) - 16) for i in range(32)],
        ),
        # d q + m with the fifth bits.
        (
            Kind.Q5_1,
            half(0.5) + half(1.0) + bytes([0x55] * 4) + bytes([0x21] * 16),
            [0.5 * ((1 if i < 16 else 2) + (0 if i % 2 else 16)) + 1 for i in range(32)],
        ),
    ],
)
@pytest.mark.short
def test_blocks_computed_by_hand(tmp_path, kind, data, values):
    tensor = place(tmp_path / "t", data, kind, (1, 32))
    part = gguf_blocks.read_part(tensor, (slice(0, 1), slice(0, 32)))
    np.testing.assert_array_equal(part[0], np.asarray(values, np.float32))


@pytest.mark.parametrize("kind", gguf_blocks.FLOATS)
def test_floats_are_read_as_stored_in_parts(tmp_path, kind):
    dtype = gguf_blocks.FLOATS[kind]
    values = np.random.default_rng(0).normal(size=(6, 9)).astype(dtype)
    tensor = place(tmp_path / "t", values.tobytes(), kind, (6, 9))
    part = gguf_blocks.read_part(tensor, (slice(2, 5), slice(1, 8)))
    assert part.dtype == dtype
    np.testing.assert_array_equal(part, values[2:5, 1:8])
    vector = place(tmp_path / "v", values[0].tobytes(), kind, (9,))
    np.testing.assert_array_equal(gguf_blocks.read_part(vector, (slice(3, 7),)), values[0, 3:7])


@pytest.mark.parametrize("kind", gguf_blocks.FLOATS)
def test_a_nan_among_floats_is_found(tmp_path, kind):
    values = np.zeros((6, 9), gguf_blocks.FLOATS[kind])
    assert not gguf_blocks.has_nan(place(tmp_path / "t", values.tobytes(), kind, (6, 9)))
    values[5, 8] = np.nan
    assert gguf_blocks.has_nan(place(tmp_path / "t", values.tobytes(), kind, (6, 9)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_scale_that_is_no_number_is_found(tmp_path, kind, bad):
    for at in (208,) if kind is Kind.Q6_K else (0, 2) if "1" in kind.name or kind in (
        Kind.Q4_K, Kind.Q5_K) else (0,):  # fmt: skip
        blocks_OB = random_blocks(kind)
        _, size = GGML_QUANT_SIZES[kind]
        blocks_OB.reshape(-1, size)[-1, at : at + 2] = np.frombuffer(half(bad), np.uint8)
        assert gguf_blocks.has_nan(
            place(tmp_path / "t", blocks_OB.tobytes(), kind, (ROWS, COLUMNS))
        )


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.IQ4_NL, Kind.TQ1_0, Kind.I32])
def test_other_kinds_are_refused_by_name(tmp_path, kind):
    tensor = GGUFTensor("blk.0.attn_q.weight", (1, 256), kind, tmp_path / "t", 0)
    with pytest.raises(InterchangeError, match=rf"blk.0.attn_q.weight: {kind.name} can't be read"):
        gguf_blocks.check_kind(tensor)


def test_q8_0_is_written_as_a_scale_of_the_largest_over_127():
    x_1I = np.zeros((1, 64), np.float32)
    x_1I[0, :4] = 127.0, -63.5, 1.0, 0.4
    blocks_1B = gguf_blocks.to_q8_0(x_1I)
    assert blocks_1B.shape == (1, 68)
    assert blocks_1B[0, :2].tobytes() == half(1.0)
    # 63.5 rounds away from zero; a block of zeros has a scale of 0 and no NaN.
    assert blocks_1B[0, 2:6].view(np.int8).tolist() == [127, -64, 1, 0]
    assert not blocks_1B[0, 34:].any()


def test_a_file_that_shrinks_after_opening_is_told(tmp_path):
    tensor = place(tmp_path / "t", bytes(24), Kind.F32, (2, 3))
    (tmp_path / "t").write_bytes(b"abc" + bytes(20))
    with pytest.raises(InterchangeError, match="t: truncated since it was opened"):
        gguf_blocks.read_part(tensor, (slice(0, 2), slice(0, 3)))
