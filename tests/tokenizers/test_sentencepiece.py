"""SentencePiece vocabularies against the `sentencepiece` library, and what stands around it."""

import os
import pickle
import time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.tokenizers import StreamDecoder, Tokenizer, TokenizerError, load_tokenizer
from llama_jax.tokenizers import sentencepiece_proto as protos
from llama_jax.tokenizers.infilling import decode_infilling, encode_infilling
from llama_jax.tokenizers.sentencepiece import (
    END_OF_INFILL,
    MIDDLE,
    PREFIX,
    SUFFIX,
    SentencePieceTokenizer,
)

HARD = [
    "",
    " ",
    "   ",
    "\n",
    "\r\n\t \n",
    "  two leading",
    "trailing  ",
    "12 345 6789",
    "a\x00b\x7f\x80\xff\ufeff\ufffd\U0010ffff",
    "\u2581\u2581x \u2585 <0x0A>",
    "<s>a</s><unk>",
    "Việt Nam 你好 🙂👩‍👩‍👧 العربية हिन्दी",
    "e\u0301 \u3000 \xa0 \u2028",
    "def add(a, b):\n    return a + b\n",
]
LETTERS = st.sampled_from("abthe ou  wis\n\t1234éß你🙂\u2581<s></>0xA\0")


@pytest.fixture(scope="module")
def library(spm):
    return sentencepiece.SentencePieceProcessor(model_proto=spm.proto)


@pytest.mark.short
@pytest.mark.parametrize("text", HARD, ids=range(len(HARD)))
def test_hard_strings_have_the_ids_of_the_library(spm, library, text):
    ids = spm.encode(text)
    assert ids == library.encode(text)
    assert spm.decode(ids) == library.decode(ids)


@settings(max_examples=500, deadline=None)
@given(text=st.one_of(st.text(), st.lists(LETTERS).map("".join)))
def test_any_text_has_the_ids_of_the_library(spm, library, text):
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert spm.encode(text) == library.encode(text)


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(1, 419), max_size=20))
def test_any_ids_have_the_text_of_the_library(spm, library, ids):
    # <unk> is left out: the library writes it as another sign, we by its name.
    assert spm.decode(ids, skip_special=True) == library.decode(ids)
    stream = StreamDecoder(spm)
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == spm.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_text_survives_encoding_and_decoding(spm, text):
    assert spm.decode(spm.encode(text)) == text


def test_ids_stand_where_llama_2_has_them(spm):
    assert (spm.bos_id, spm.eos_id, spm.pad_id, spm.vocab_size) == (1, 2, 0, 420)
    assert spm.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert spm.adds_bos
    assert isinstance(spm, Tokenizer)
    newline = spm.encode("\n")
    assert newline[-1] == 13
    assert spm.encode("\x00")[-1] == 3
    assert spm.encode("☺")[-3:] == [3 + byte for byte in "☺".encode()]
    digits = spm.encode("1234")
    assert len(digits) == 5
    assert spm.encode("a", bos=True, eos=True) == [1, *spm.encode("a"), 2]


def test_special_text_is_text_unless_allowed(spm):
    text = "a</s><s>b"
    assert not {1, 2} & set(spm.encode(text))
    allowed = spm.encode(text, allowed_special={"</s>", "<s>"})
    # Each stretch of text has its own leading space.
    assert allowed == [*spm.encode("a"), 2, 1, *spm.encode("b")]
    assert spm.encode(text, allowed_special={"<s>"}) == [*spm.encode("a</s>"), 1, *spm.encode("b")]
    with pytest.raises(TokenizerError, match="'<eot>' is not a special token"):
        spm.encode(text, allowed_special={"<eot>"})


def test_only_the_first_space_of_a_text_is_dropped(spm):
    a, b = spm.encode("a"), spm.encode(" b")
    assert spm.decode([1, *a, 2, 1, *b]) == "<s>a</s><s>  b"
    assert spm.decode([1, *a, *b], skip_special=True) == "a  b"
    # Once the prompt is there, a generated word keeps the space before it.
    stream = StreamDecoder(spm, [1, *a])
    assert "".join(map(stream.push, spm.encode("b"))) == " b"


def test_a_space_as_a_byte_is_no_implicit_one(spm, library):
    ids = [3 + ord(" "), *spm.encode("a")]
    assert spm.decode(ids) == library.decode(ids) == "  a"


def test_broken_bytes_become_one_sign_each_and_whole_ones_come_at_once(spm):
    emoji = [3 + byte for byte in "🙂".encode()]
    stream = StreamDecoder(spm)
    assert [stream.push(i) for i in emoji] == ["", "", "", "🙂"]
    assert [stream.push(i) for i in emoji[:3]] == ["", "", ""]
    assert (stream.finish(), stream.finish()) == ("\ufffd" * 3, "")


def test_a_lone_surrogate_becomes_a_replacement_character(spm):
    assert spm.encode("a\ud83db") == spm.encode("a\ufffdb")


@pytest.mark.parametrize(("unit", "count"), [("^", 1_000_000), ("a", 100_000), (" ", 100_000)])
def test_runs_of_one_character_are_fast(spm, unit, count):
    text = unit * count
    start_s = time.process_time()
    ids = spm.encode(text)
    assert time.process_time() - start_s < 5
    assert spm.decode(ids) == text


def test_added_tokens_follow_the_pieces(spm, tmp_path):
    added = {"<|im_start|>": 420, "<|im_end|>": 421}
    chat = SentencePieceTokenizer(spm.proto, added, roles={"eos": "<|im_end|>"}, adds_bos=False)
    assert (chat.vocab_size, chat.eos_id, chat.adds_bos) == (422, 421, False)
    assert chat.encode("<|im_end|>x", allowed_special={"<|im_end|>"}) == [421, *spm.encode("x")]
    assert chat.encode("<|im_end|>") == spm.encode("<|im_end|>")
    assert chat.decode([420, 421]) == "<|im_start|><|im_end|>"
    chat.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(chat))):
        assert copy.fingerprint == chat.fingerprint
        assert (copy.special, copy.eos_id, copy.adds_bos) == (chat.special, 421, False)
    with pytest.raises(TokenizerError, match="don't follow the 420 pieces"):
        SentencePieceTokenizer(spm.proto, {"<pad>": 430})
    with pytest.raises(TokenizerError, match="'<pad>' has the id 1 of piece '<s>'"):
        SentencePieceTokenizer(spm.proto, {"<pad>": 1})


def test_the_pad_token_is_never_one_that_ends_text(spm):
    zephyr = SentencePieceTokenizer(spm.proto, roles={"pad": "</s>"})
    assert zephyr.pad_id == 0
    model = protos.parse_model(spm.proto)
    model.trainer_spec.byte_fallback = False
    bare = SentencePieceTokenizer(model.SerializeToString())
    with pytest.raises(TokenizerError, match="no padding"):
        bare.pad_id  # noqa: B018


@pytest.fixture(scope="module", params=[protos.USER_DEFINED, protos.CONTROL])
def code_llama(spm, request):
    """The small vocabulary with Code Llama's four tokens, of either type."""
    model = protos.parse_model(spm.proto)
    for name in (PREFIX, SUFFIX, MIDDLE, END_OF_INFILL):
        model.pieces.add(piece=name, score=0.0, type=request.param)
    return SentencePieceTokenizer(model.SerializeToString())


def test_infilling_prompts_have_the_implicit_space_before_the_prefix_alone(code_llama, spm):
    pre, suf, mid = 420, 421, 422
    before = spm.encode("def f(")
    # What Code Llama's own code does: a sign that is no part of any piece, cut off again.
    after = spm.encode("☺):\n    pass")[4:]
    assert spm.decode([spm.encode("a")[0], *after]).endswith("):\n    pass")
    assert encode_infilling(code_llama, "def f(", "):\n    pass") == [
        *(1, pre, *before),
        *(suf, *after, mid),
    ]
    assert encode_infilling(code_llama, "def f(", "):\n    pass", suffix_first=True) == [
        *(1, pre, suf, *after),
        *(mid, *before),
    ]


def test_a_generated_middle_keeps_its_space_and_stops_at_its_end(code_llama):
    middle = code_llama.encode("x, y")
    assert decode_infilling(code_llama, [*middle, 423, *middle]) == " x, y"
    no_space = code_llama.encode_continuation("x, y")
    assert decode_infilling(code_llama, no_space) == "x, y"
    assert code_llama.encode_continuation(" x, y") == middle


def test_text_cannot_spell_an_infilling_token(code_llama, spm):
    for text in (" <PRE>", "\u2581<EOT>", "a <MID> b"):
        assert code_llama.encode(text) == spm.encode(text)
    assert code_llama.encode(" <PRE>x", allowed_special={PREFIX}) == spm.encode(" <PRE>x")
    assert code_llama.encode(f"{PREFIX}x", allowed_special={PREFIX}) == [420, *spm.encode("x")]


def test_a_vocabulary_without_infilling_tokens_says_so(spm):
    with pytest.raises(TokenizerError, match="only Code Llama's vocabulary fills gaps"):
        encode_infilling(spm, "a", "b")


def test_what_is_no_bpe_model_is_refused(spm, tmp_path):
    model = protos.parse_model(spm.proto)
    model.trainer_spec.model_type = 1
    with pytest.raises(TokenizerError, match="not BPE"):
        SentencePieceTokenizer(model.SerializeToString())
    (tmp_path / "tokenizer.model").write_bytes(b"\nnonsense")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_the_real_llama_2_vocabulary_meets_every_golden_pair(shared):
    path = os.environ.get("LLAMA2_TOKENIZER")
    if path is None:
        pytest.skip("no Llama 2 vocabulary: set LLAMA2_TOKENIZER to its tokenizer.model")
    llama2 = load_tokenizer(path)
    folder = shared / "data" / "tokenizer_golden"
    texts = (folder / "llama-spm.inp.txt").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (folder / "llama-spm.out.txt").read_text().splitlines()
    pairs = list(zip(texts[:-1], lines, strict=True))
    assert len(pairs) == 46
    wrong = [text for text, ids in pairs if llama2.encode(text) != list(map(int, ids.split()))]
    assert wrong == []
