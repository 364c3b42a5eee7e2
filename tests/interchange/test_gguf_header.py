import gguf
import numpy as np
import pytest

from llama_jax.interchange.gguf_header import read_header
from llama_jax.interchange.tensors import InterchangeError

FIELDS = {
    "a.uint8": (7, "add_uint8"),
    "a.int8": (-7, "add_int8"),
    "a.uint16": (60000, "add_uint16"),
    "a.int16": (-30000, "add_int16"),
    "a.uint32": (2**31 + 1, "add_uint32"),
    "a.int32": (-(2**31), "add_int32"),
    "a.uint64": (2**63 + 1, "add_uint64"),
    "a.int64": (-(2**62), "add_int64"),
    "a.float32": (0.15625, "add_float32"),
    "a.float64": (0.1, "add_float64"),
    "a.bool": (True, "add_bool"),
    "a.string": ("Ġ é 你", "add_string"),
    "a.strings": (["", "x", "你好"], "add_array"),
    "a.ints": ([3, -1], "add_array"),
    "a.floats": ([0.5, -2.0], "add_array"),
}


def write(path, *, tensors=None, fields=FIELDS, **options):
    writer = gguf.GGUFWriter(path, "llama", **options)
    for key, (value, method) in fields.items():
        getattr(writer, method)(key, value)
    for name, (array, kind) in (tensors or {}).items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    ones = np.ones((4, 6), np.float32)
    blocks = (np.zeros((3, 68), np.uint8), gguf.GGMLQuantizationType.Q8_0)
    tensors = {"m": (ones, None), "v": (ones[0], None), "q": blocks}
    return write(tmp_path / "a.gguf", tensors=tensors)


def test_every_type_of_metadata_is_read_as_plain_python(file):
    fields = read_header(file).fields
    for key, (value, _) in FIELDS.items():
        assert fields[key] == value, key
        assert type(fields[key]) is type(value), key


def test_places_of_tensors_are_those_of_the_gguf_packages_reader(file):
    ours, theirs = read_header(file).tensors, gguf.GGUFReader(file).tensors
    assert len(ours) == len(theirs) == 3
    for tensor in theirs:
        mine = ours[tensor.name]
        assert mine.offset == tensor.data_offset
        assert mine.nbytes == tensor.n_bytes
        assert mine.kind == tensor.tensor_type
    assert ours["m"].shape == (4, 6)
    assert ours["q"].shape == (3, 64)


def test_a_file_cut_anywhere_is_told_and_where(file, tmp_path):
    data, cut = file.read_bytes(), tmp_path / "cut.gguf"
    places = set()
    for size in range(0, len(data) - 300, 7):
        cut.write_bytes(data[:size])
        with pytest.raises(InterchangeError) as error:
            read_header(cut)
        assert str(error.value).startswith(f"{cut}: ")
        places.add(str(error.value).removeprefix(f"{cut}: ").split(";")[0])
    assert "truncated in the value of a.strings" in places
    assert "truncated in the entry of tensor q" in places


def test_data_that_ends_too_early_is_told_by_tensor(file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InterchangeError, match=r"cut.gguf: q: truncated; it would end at byte"):
        read_header(cut)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(40), "not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(40), "GGUF version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "big-endian"),
        (b"GGUF", "4 bytes are too few"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message):
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(InterchangeError, match=message):
        read_header(tmp_path / "x.gguf")


def test_a_count_far_over_the_files_size_is_a_truncation_and_takes_no_memory(tmp_path):
    head = b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little")
    key = (1).to_bytes(8, "little") + (1).to_bytes(8, "little") + b"k"
    array = (9).to_bytes(4, "little") + (8).to_bytes(4, "little") + (2**60).to_bytes(8, "little")
    (tmp_path / "x.gguf").write_bytes(head + key + array)
    with pytest.raises(InterchangeError, match="truncated in the value of k"):
        read_header(tmp_path / "x.gguf")


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InterchangeError, match="No such file"):
        read_header(tmp_path / "no.gguf")


@pytest.fixture
def split(tmp_path):
    tensors = {f"t{i}": (np.full((2, 4), i, np.float32), None) for i in range(3)}
    write(tmp_path / "s.gguf", tensors=tensors, split_max_tensors=1)
    return sorted(tmp_path.glob("s-*.gguf"))


def test_a_split_file_is_read_as_one_from_any_part(split):
    assert [path.name for path in split] == [f"s-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in split:
        header = read_header(path)
        assert list(header.tensors) == ["t0", "t1", "t2"]
        assert header.fields["a.uint8"] == 7
        assert header.path == split[0]
        for part, tensor in zip(split, header.tensors.values(), strict=True):
            assert tensor.file == part


def test_a_missing_or_renamed_part_is_told(split):
    stray = split[0].with_name("other.gguf")
    stray.write_bytes(split[0].read_bytes())
    with pytest.raises(InterchangeError, match="one of 3 parts but isn't named as such"):
        read_header(stray)
    split[1].write_bytes(split[2].read_bytes())
    with pytest.raises(InterchangeError, match=r"split.no: 2 where its name says part 2"):
        read_header(split[0])
    split[1].unlink()
    with pytest.raises(InterchangeError, match=r"s-00002-of-00003.gguf: missing"):
        read_header(split[0])
