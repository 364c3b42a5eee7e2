"""The real Llama 3 tokenizer against ids made by Meta's own code."""

import hashlib
import pickle
import time

import pytest

from llama_jax.tokenizers import TokenizerError, load_tokenizer


def test_every_reference_case_has_the_reference_ids(llama3, reference):
    cases = reference["cases"] + reference["mixes"]
    assert len(cases) == 100
    wrong = [case["text"] for case in cases if llama3.encode(case["text"]) != case["ids"]]
    assert wrong == []


def test_text_that_spells_special_tokens_is_text_unless_allowed(llama3, reference):
    every = frozenset(llama3.special)
    for case in reference["special"]:
        text = case["text"]
        assert llama3.encode(text) == case["ids"]
        assert llama3.encode(text, allowed_special=every) == case["ids_all_special"]
        assert llama3.encode(text, allowed_special={"<|eot_id|>"}) == case["ids_eot_allowed"]


def test_long_runs_are_fast_and_cut_where_the_reference_cuts(llama3, reference):
    every = frozenset(llama3.special)
    for case in reference["long"]:
        text = "".join(unit * count for unit, count in case["pieces"])
        start_s = time.process_time()
        ids = llama3.encode(text)
        assert time.process_time() - start_s < 5
        assert len(ids) == case["n_ids"]
        assert hash_of(ids) == case["sha256"]
        assert llama3.decode(ids) == text
        assert hash_of(llama3.encode(text, allowed_special=every)) == case["sha256_all_special"]


def hash_of(ids):
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


def test_decoding_has_the_reference_text(llama3, reference):
    for case in reference["decode"]:
        assert llama3.decode(case["ids"]) == case["text"]


def test_lone_surrogates_become_replacement_characters(llama3, reference):
    case = reference["lone_surrogate"]
    assert llama3.encode(case["text"]) == case["ids"]


def test_special_tokens_have_the_names_and_ids_of_llama_3_1(llama3, reference):
    expected = dict(reference["special_tokens"])
    expected |= {f"<|reserved_special_token_{i}|>": 128010 + i for i in range(2, 246)}
    assert llama3.special == expected
    assert llama3.vocab_size == 128256
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128000, 128001, 128004)


def test_documents_begin_and_end_with_their_marks(llama3):
    assert llama3.encode("Hello world", bos=True, eos=True) == [128000, 9906, 1917, 128001]
    assert llama3.encode("Second doc", bos=True, eos=True) == [128000, 16041, 4733, 128001]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (" Việt", [101798]),
        (
            "请你基于以下「评估标准」",
            [15225, 57668, 125510, 88852, 13177, 64479, 112494, 110778, 10646],
        ),
        ("1234567890", [4513, 10961, 16474, 15]),
        ("I'm don't WE'LL", [40, 2846, 1541, 956, 20255, 6, 4178]),
    ],
)
def test_whole_words_are_looked_up_before_merging_and_digits_go_in_threes(llama3, text, ids):
    assert llama3.encode(text) == ids


@pytest.mark.parametrize(
    ("unit", "repeats", "count"),
    [("^", 1_000_000, 250_000), ("a", 100_000, 12_500), (" ", 100_000, 784)],
)
def test_runs_of_one_character_have_the_known_number_of_tokens(llama3, unit, repeats, count):
    ids = llama3.encode(unit * repeats)
    assert len(ids) == count
    assert llama3.decode(ids) == unit * repeats


def test_every_golden_pair_of_the_vocabulary_tests_is_met(llama3, shared):
    folder = shared / "data" / "tokenizer_golden"
    inputs = (
        (folder / "llama-bpe.inp.txt").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    )
    lines = (folder / "llama-bpe.out.txt").read_text().splitlines()
    pairs = list(zip(inputs, lines, strict=True))
    assert len(pairs) == 46
    wrong = [text for text, ids in pairs if llama3.encode(text) != list(map(int, ids.split()))]
    assert wrong == []


def test_saved_and_pickled_copies_are_the_same_tokenizer(llama3, tmp_path):
    llama3.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(llama3))):
        assert copy.fingerprint == llama3.fingerprint
        assert copy.special == llama3.special
        assert copy.encode("a" * 60_000 + " Việt") == llama3.encode("a" * 60_000 + " Việt")


@pytest.mark.parametrize("token_id", [-1, 128256])
def test_an_id_outside_the_vocabulary_is_an_error(llama3, token_id):
    with pytest.raises(TokenizerError, match=f"token id {token_id} is outside the vocabulary"):
        llama3.decode([9906, token_id])
