"""Vocabularies in GGUF metadata: SmolLM2's real one, and every kind of ours both ways."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.interchange.gguf_header import read_header
from llama_jax.tokenizers import StreamDecoder, TokenizerError, load_tokenizer
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.gguf_vocabulary import from_gguf_fields, to_gguf_fields
from llama_jax.tokenizers.hugging_face_json import HuggingFaceTokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer

KEY = "tokenizer.ggml."


def encode_all(tokenizer, text):
    return tokenizer.encode(text, allowed_special=frozenset(tokenizer.special))


def test_smollm2_has_the_reference_ids(smollm2, smollm2_cases):
    wrong = [c["text"] for c in smollm2_cases if encode_all(smollm2, c["text"]) != c["ids"]]
    assert wrong == []
    assert [c["text"] for c in smollm2_cases if smollm2.decode(c["ids"]) != c["text"]] == []


def test_smollm2s_special_tokens_are_those_of_its_file(smollm2):
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.adds_bos) == (1, 2, False)
    assert smollm2.special["<|im_end|>"] == 2
    assert len(smollm2.special) == 17
    # The file pads with the token that ends a turn.
    with pytest.raises(TokenizerError, match="no padding"):
        smollm2.pad_id  # noqa: B018
    plain = smollm2.encode("<|im_start|>")
    assert 1 not in plain
    assert smollm2.decode(plain) == "<|im_start|>"


def test_smollm2_saved_for_transformers_has_the_reference_ids(smollm2, smollm2_cases, tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    wrong = [c["text"] for c in smollm2_cases if theirs(c["text"])["input_ids"] != c["ids"]]
    assert wrong == []
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == smollm2.fingerprint
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)


def test_smollm2_goes_back_to_gguf_unchanged(smollm2, smollm2_gguf):
    read = read_header(smollm2_gguf).fields
    read = {name: value for name, value in read.items() if name.startswith(KEY)}
    assert to_gguf_fields(smollm2) == {**read, KEY + "add_eos_token": False}


@pytest.mark.parametrize(("unit", "repeats"), [("^", 1_000_000), ("a", 100_000), (" ", 100_000)])
def test_runs_of_one_character_come_back_whole(smollm2, unit, repeats):
    assert smollm2.decode(smollm2.encode(unit * repeats)) == unit * repeats


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_smollm2s_pieces_join_to_the_decoded_text(smollm2, ids):
    stream = StreamDecoder(smollm2)
    joined = "".join([*map(stream.push, ids), stream.finish()])
    names, pieces = smollm2.spelling.special, smollm2.spelling.pieces
    plain = b"".join(names[i].encode() if i in names else pieces[i] for i in ids)
    assert joined == smollm2.decode(ids) == plain.decode("utf-8", "replace")


def test_the_real_llama_3_vocabulary_keeps_its_reference_ids(llama3, reference):
    fields = to_gguf_fields(llama3)
    assert (fields[KEY + "model"], fields[KEY + "pre"]) == ("gpt2", "llama-bpe")
    assert len(fields[KEY + "tokens"]) == 128256
    ours = from_gguf_fields(fields)
    for case in reference["cases"] + reference["mixes"]:
        assert ours.encode(case["text"]) == case["ids"]
    for case in reference["special"]:
        assert ours.encode(case["text"]) == case["ids"]
        assert encode_all(ours, case["text"]) == case["ids_all_special"]
    # Out of the vocabulary by merges alone: the whole word has to be looked up.
    assert ours.encode(" Việt") == [101798]
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.adds_bos) == (128000, 128001, 128004, True)
    assert to_gguf_fields(ours) == fields


@pytest.fixture(scope="module", params=["tiktoken", "sentencepiece", "byte", "json", "spm_json"])
def pair(request, trained, spm, tmp_path_factory):
    """A tokenizer of each kind, and what GGUF makes of it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ("json", "spm_json"):
        (trained if request.param == "json" else spm).save(folder)
        (folder / "tokenizer.model").unlink()
        ours = load_tokenizer(folder)
        assert isinstance(ours, HuggingFaceTokenizer)
    else:
        ours = {"tiktoken": trained, "sentencepiece": spm, "byte": ByteTokenizer()}[request.param]
    fields = to_gguf_fields(ours)
    assert fields == json.loads(json.dumps(fields))
    return ours, from_gguf_fields(fields)


@settings(max_examples=200, deadline=None)
@given(text=st.one_of(st.text(), st.text("ab=- \n'sc")), data=st.data())
def test_every_kind_keeps_its_ids(pair, text, data):
    ours, theirs = pair
    assert theirs.encode(text) == ours.encode(text)
    name = data.draw(st.sampled_from(sorted(ours.special)))
    mixed = f"{text}{name} {text}"
    assert theirs.encode(mixed) == ours.encode(mixed)
    assert theirs.encode(mixed, allowed_special={name}) == ours.encode(
        mixed, allowed_special={name}
    )
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=9))
    assert theirs.decode(ids) == ours.decode(ids)


def test_every_kind_keeps_its_special_tokens(pair):
    ours, theirs = pair
    assert theirs.special == ours.special
    assert (theirs.bos_id, theirs.eos_id) == (ours.bos_id, ours.eos_id)
    assert (theirs.pad_id, theirs.vocab_size) == (ours.pad_id, ours.vocab_size)
    assert theirs.adds_bos == ours.adds_bos


def test_scores_and_types_are_those_of_the_sentencepiece_model(spm):
    fields = to_gguf_fields(SentencePieceTokenizer(spm.proto, {"<pad>": 420}))
    pieces = spm.model.pieces
    assert fields[KEY + "model"] == "llama"
    assert fields[KEY + "tokens"] == [*(piece.piece for piece in pieces), "<pad>"]
    assert fields[KEY + "scores"] == [*(piece.score for piece in pieces), -1000.0]
    assert fields[KEY + "token_type"] == [2, 3, 3, *[6] * 256, *[1] * 161, 3]
    assert fields[KEY + "add_bos_token"] is True
    assert fields[KEY + "unknown_token_id"] == 0


BPE = {
    KEY + "model": "gpt2",
    KEY + "pre": "gpt-2",
    KEY + "tokens": ["a", "b", "1", "2", "Ġ", "ab", "12", "<end>", "<tool>"],
    KEY + "token_type": [1, 1, 1, 1, 1, 1, 1, 3, 4],
    KEY + "merges": ["a b", "1 2"],
    KEY + "eos_token_id": 7,
}


@pytest.mark.parametrize(
    ("pre", "ids"),
    [
        ("gpt-2", [5, 6, 6, 4, 6]),
        ("smollm", [5, 2, 3, 2, 3, 4, 2, 3]),
        ("starcoder", [5, 2, 3, 2, 3, 4, 2, 3]),
        # By threes: 121, 2.
        ("llama-bpe", [5, 6, 2, 3, 4, 6]),
        ("qwen2", [5, 2, 3, 2, 3, 4, 2, 3]),
        (None, [5, 6, 2, 3, 4, 6]),
    ],
)
def test_the_pre_tokenizer_cuts_digits_its_own_way(pre, ids):
    fields = {**BPE, KEY + "pre": pre, KEY + "bos_token_id": 7}
    if pre is None:
        del fields[KEY + "pre"]
    assert from_gguf_fields(fields).encode("ab1212 12") == ids


def test_user_defined_tokens_are_found_in_any_text_and_control_tokens_are_not():
    made = from_gguf_fields(BPE)
    assert made.special == {"<end>": 7}
    assert made.encode("a<tool>b") == [0, 8, 1]
    assert made.encode("a<end>1", allowed_special={"<end>"}) == [0, 7, 2]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": "bert"}, r"model: 'bert' is not known \(known: gpt2, llama\)"),
        ({"model": None}, r"the GGUF metadata has no tokenizer\.ggml\.model"),
        ({"tokens": None}, r"has no tokenizer\.ggml\.tokens"),
        ({"merges": None}, r"has no tokenizer\.ggml\.merges"),
        ({"pre": "smolm"}, r"unknown pre-tokenizer 'smolm' \(did you mean 'smollm'\?\)"),
        ({"merges": ["a c"]}, "merges: 'a c' doesn't join two tokens to one"),
        ({"token_type": [1]}, "token_type has 1 values for 9 tokens"),
        ({"eos_token_id": 9}, "eos_token_id: 9 is outside the vocabulary of 9"),
        ({"add_bos_token": True}, "there is no tokenizer.ggml.bos_token_id"),
        ({"tokens": ["a"] * 9}, "'a' occurs twice"),
    ],
)
def test_metadata_that_cannot_be_used_is_one_line(change, complaint):
    fields = {**BPE, **{KEY + name: value for name, value in change.items()}}
    fields = {name: value for name, value in fields.items() if value is not None}
    with pytest.raises(TokenizerError, match=complaint):
        from_gguf_fields(fields)


def definition(**changes):
    made = json.loads(from_gguf_fields(BPE).definition)
    return {**made, **changes}


SPACED = {"id": 7, "content": "<end>", "single_word": False, "lstrip": True, "rstrip": False}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {
                "pre_tokenizer": {
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Punctuation", "behavior": "Isolated"},
                        {
                            **{"type": "ByteLevel", "add_prefix_space": False},
                            **{"use_regex": False, "trim_offsets": True},
                        },
                    ],
                }
            },
            "no GGUF pre-tokenizer cuts text by this pattern: <Punctuation>",
        ),
        ({"normalizer": {"type": "NFC"}}, "the normalizer NFC has no form in GGUF"),
        (
            {"added_tokens": [{**SPACED, "normalized": False, "special": True}]},
            "added token '<end>' takes the space beside it",
        ),
    ],
)
def test_a_tokenizer_json_that_gguf_cannot_say_is_refused(changes, complaint):
    made = HuggingFaceTokenizer(json.dumps(definition(**changes)), {"eos_token": "<end>"})
    with pytest.raises(TokenizerError, match=complaint):
        to_gguf_fields(made)


def test_whole_words_are_looked_up_as_the_pre_tokenizer_does_or_refused():
    # Only a look-up finds `abb`; GPT-2's pre-tokenizer in GGUF has none.
    model = {**definition()["model"], "ignore_merges": True}
    made = HuggingFaceTokenizer(json.dumps(definition(model=model)), {"eos_token": "<end>"})
    assert to_gguf_fields(made)[KEY + "pre"] == "gpt-2"
    end = {**definition()["added_tokens"][0], "id": 8}
    vocab = {**model["vocab"], "abb": 7}
    bad = definition(model={**model, "vocab": vocab}, added_tokens=[end])
    unreached = HuggingFaceTokenizer(json.dumps(bad), {"eos_token": "<end>"})
    with pytest.raises(TokenizerError, match="token 'abb' is found with ignore_merges only"):
        to_gguf_fields(unreached)


def test_a_tokenizer_json_that_is_not_quite_sentencepiece_is_refused(spm, tmp_path):
    spm.save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    path = tmp_path / "tokenizer.json"
    made = json.loads(path.read_text())
    # What transformers 5 writes: a text that begins with a space gets no second one.
    made["normalizer"] = None
    made["pre_tokenizer"] = {
        **{"type": "Metaspace", "replacement": "\u2581"},
        **{"prepend_scheme": "first", "split": False},
    }
    path.write_text(json.dumps(made))
    with pytest.raises(TokenizerError, match="Metaspace is not quite SentencePiece's way"):
        to_gguf_fields(load_tokenizer(tmp_path))


def test_a_sentencepiece_model_that_normalises_is_refused(spm):
    from llama_jax.tokenizers import sentencepiece_proto as protos

    model = protos.parse_model(spm.proto)
    model.normalizer_spec.remove_extra_whitespaces = True
    with pytest.raises(TokenizerError, match=r"normalises text, llama\.cpp would not"):
        to_gguf_fields(SentencePieceTokenizer(model.SerializeToString()))


def test_a_file_that_is_no_gguf_is_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nonsense" * 10)
    for name in ("x.gguf", "absent.gguf"):
        with pytest.raises(TokenizerError, match=rf"{name}: not a GGUF file"):
            load_tokenizer(tmp_path / name)
