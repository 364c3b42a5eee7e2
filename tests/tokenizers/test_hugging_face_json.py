"""`tokenizer.json` files: the real Llama 3 one, made by our save, and small ones of every kind."""

import json
import pickle
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import trainers as library_trainers

from llama_jax.tokenizers import StreamDecoder, TokenizerError, load_tokenizer
from llama_jax.tokenizers.hugging_face_json import HuggingFaceTokenizer

SURROGATES = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def llama3_json(llama3, tmp_path_factory):
    """What a fine-tuned Llama 3 often is: a folder with `tokenizer.json` and nothing else."""
    folder = tmp_path_factory.mktemp("llama3")
    llama3.save(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").unlink()
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def spm_json(spm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    spm.save(folder)
    (folder / "tokenizer.model").unlink()
    return load_tokenizer(folder)


def test_every_reference_case_has_the_reference_ids(llama3_json, reference):
    assert isinstance(llama3_json, HuggingFaceTokenizer)
    cases = reference["cases"] + reference["mixes"]
    wrong = [case["text"] for case in cases if llama3_json.encode(case["text"]) != case["ids"]]
    assert wrong == []
    for case in reference["decode"]:
        assert llama3_json.decode(case["ids"]) == case["text"]
    case = reference["lone_surrogate"]
    assert llama3_json.encode(case["text"]) == case["ids"]


def test_special_text_is_text_unless_allowed(llama3_json, reference):
    every = frozenset(llama3_json.special)
    for case in reference["special"]:
        text = case["text"]
        assert llama3_json.encode(text) == case["ids"]
        assert llama3_json.encode(text, allowed_special=every) == case["ids_all_special"]
        assert llama3_json.encode(text, allowed_special={"<|eot_id|>"}) == case["ids_eot_allowed"]
    with pytest.raises(TokenizerError, match="'<eot>' is not a special token"):
        llama3_json.encode("a", allowed_special={"<eot>"})


def test_long_runs_are_fast_and_whole(llama3_json, reference):
    for case in reference["long"]:
        text = "".join(unit * count for unit, count in case["pieces"])
        ids = llama3_json.encode(text)
        # Meta's code cuts very long text, which this file can't say.
        assert (len(ids) == case["n_ids"]) or not case["same_as_unsplit_tiktoken"]
        assert llama3_json.decode(ids) == text


@pytest.mark.parametrize(
    ("unit", "repeats", "count"), [("^", 1_000_000, 250_000), ("a", 100_000, 12_500)]
)
def test_runs_of_one_character_have_the_known_number_of_tokens(llama3_json, unit, repeats, count):
    start_s = time.process_time()
    assert len(llama3_json.encode(unit * repeats)) == count
    assert len(llama3_json.encode(" " * repeats)) == -(-repeats // 128)
    assert time.process_time() - start_s < 10


def test_a_folder_with_tokenizer_json_alone_knows_llama_3s_ends(llama3_json):
    assert (llama3_json.bos_id, llama3_json.eos_id) == (128000, 128001)
    assert llama3_json.adds_bos
    assert llama3_json.encode("Hello world", bos=True, eos=True) == [128000, 9906, 1917, 128001]
    with pytest.raises(TokenizerError, match="no padding"):
        llama3_json.pad_id  # noqa: B018


@settings(max_examples=200, deadline=None)
@given(text=st.text(), ids=st.lists(st.integers(0, 419), max_size=20))
def test_a_sentencepiece_vocabulary_keeps_its_ids_and_its_spelling(spm, spm_json, text, ids):
    assert spm_json.encode(text) == spm.encode(text)
    for skip in (True, False):
        assert spm_json.decode(ids, skip_special=skip) == spm.decode(ids, skip_special=skip)
    stream = StreamDecoder(spm_json)
    assert "".join([*map(stream.push, ids), stream.finish()]) == spm.decode(ids)


def test_a_sentencepiece_vocabulary_keeps_its_special_tokens(spm, spm_json):
    assert spm_json.special == spm.special
    assert (spm_json.bos_id, spm_json.eos_id, spm_json.pad_id) == (1, 2, 0)
    assert spm_json.adds_bos
    text = " a</s><s> b"
    for allowed in ({"<s>"}, {"<s>", "</s>"}):
        expected = spm.encode(text, allowed_special=allowed)
        assert spm_json.encode(text, allowed_special=allowed) == expected


# A small tokenizer.json, changed by each test.


def small(*added, decoder=True, normalizer=None, **model):
    made = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "Ġ": 2, "ab": 3}, merges=[("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel() if decoder else None
    if normalizer is not None:
        made.normalizer = normalizer
    for token in added:
        (made.add_special_tokens if token.special else made.add_tokens)([token])
    definition = json.loads(made.to_str())
    definition["model"].update(model)
    return definition


def tokenizer(definition, **config):
    return HuggingFaceTokenizer(json.dumps(definition), config)


def test_ordinary_added_tokens_are_found_in_any_text():
    made = tokenizer(small(AddedToken("<tool>"), AddedToken("<end>", special=True)))
    assert made.special == {"<end>": 5}
    assert made.encode("a<tool>b") == [0, 4, 1]
    # As text, `<end>` has no letter that has a token here.
    assert made.encode("a<end>b") == [3]
    assert made.encode("a<end>b<tool>", allowed_special={"<end>"}) == [0, 5, 1, 4]
    assert made.decode([0, 4, 5]) == "a<tool><end>"
    assert made.decode([0, 4, 5], skip_special=True) == "a<tool>"


def test_an_added_token_is_matched_in_normalised_text_only_where_it_says_so():
    lower = normalizers.Lowercase()
    tokens = [
        AddedToken("ba", special=True, normalized=True),
        AddedToken("aba", special=True, normalized=False),
    ]
    made = tokenizer(small(*tokens, normalizer=lower))
    every = frozenset(made.special)
    assert made.encode("BA", allowed_special=every) == [4]
    assert made.encode("ABA", allowed_special=every) == [0, 4]
    assert made.encode("aba", allowed_special=every) == [5]
    assert made.encode("aba") == [3, 0]


def test_special_tokens_take_the_spaces_that_their_flags_say():
    made = tokenizer(small(AddedToken("<m>", special=True, lstrip=True, rstrip=True)))
    assert made.encode("a <m> b", allowed_special={"<m>"}) == [0, 4, 1]


def test_what_training_left_in_the_file_changes_no_ids():
    definition = small(dropout=1.0)
    definition["truncation"] = {
        **{"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    }
    definition["padding"] = {
        **{"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
    }
    assert tokenizer(definition).encode("ab ab") == [3, 2, 3]


def test_tokens_that_only_the_config_names_are_special_too():
    definition = small()
    config = {
        "eos_token": {"content": "b", "lstrip": False},
        "added_tokens_decoder": {"4": {"content": "<x>", "special": True}},
    }
    made = tokenizer(definition, **config)
    assert made.special == {"b": 1, "<x>": 4}
    assert (made.eos_id, made.vocab_size) == (1, 5)
    with pytest.raises(TokenizerError, match=r"no begin \(bos\) token"):
        made.bos_id  # noqa: B018
    with pytest.raises(TokenizerError, match="added token '<x>' has id 7, not 4"):
        tokenizer(definition, added_tokens_decoder={"7": {"content": "<x>", "special": True}})


def test_padding_that_ends_text_is_none():
    ends = small(AddedToken("<end>", special=True), AddedToken("<pad>", special=True))
    assert tokenizer(ends, eos_token="<end>", pad_token="<pad>").pad_id == 5
    with pytest.raises(TokenizerError, match="no padding"):
        tokenizer(ends, eos_token="<end>", pad_token="<end>").pad_id  # noqa: B018


@pytest.mark.parametrize(("given", "adds"), [(True, True), (False, False), (None, False)])
def test_without_a_post_processor_the_config_says_whether_prompts_begin(given, adds):
    definition = small(AddedToken("<begin>", special=True))
    config = {} if given is None else {"add_bos_token": given}
    assert tokenizer(definition, bos_token="<begin>", **config).adds_bos is adds


def test_saved_and_pickled_copies_are_the_same_tokenizer(tmp_path):
    definition = small(AddedToken("<end>", special=True))
    made = tokenizer(definition, eos_token="<end>", chat_template="x", model_max_length=9)
    made.save(tmp_path)
    table = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (table["model_max_length"], table["eos_token"]) == (9, "<end>")
    assert "chat_template" not in table
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(made))):
        assert copy.fingerprint == made.fingerprint
        assert copy.encode("ab<end>", allowed_special={"<end>"}, eos=True) == [3, 4, 4]
    other = tokenizer(small(AddedToken("<END>", special=True)), eos_token="<end>")
    assert other.fingerprint != made.fingerprint


def test_what_cannot_be_used_is_one_line(tmp_path):
    with pytest.raises(TokenizerError, match="decoder None is not known"):
        tokenizer(small(decoder=False))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer\.json: ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def byte_level(training_texts):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = library_trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    made.train_from_iterator(training_texts, trainer)
    return tokenizer(json.loads(made.to_str()), eos_token="<|end|>"), made


@settings(max_examples=300, deadline=None)
@given(text=SURROGATES)
def test_text_survives_encoding_and_decoding(byte_level, text):
    ours, _ = byte_level
    assert ours.decode(ours.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(1, 399)))
def test_ids_have_the_text_of_the_library(byte_level, ids):
    ours, library = byte_level
    assert ours.decode(ids) == library.decode(ids)
    stream = StreamDecoder(ours)
    assert "".join([*map(stream.push, ids), stream.finish()]) == library.decode(ids)


def test_byte_pieces_of_a_file_without_fallback_are_plain_text():
    vocab = {"<unk>": 0, "\u2581a": 1, "<0x41>": 2}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    assert tokenizer(json.loads(made.to_str())).decode([1, 2, 1]) == "a<0x41> a"
