"""Trained vocabularies: the same from the same text, and equal in both of their forms."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.tokenizers import TokenizerError, load_tokenizer
from llama_jax.tokenizers.hugging_face import make_hugging_face
from llama_jax.tokenizers.training import bytes_per_token, train_tokenizer

NASTY = [
    "",
    " ",
    "\n",
    "\r\n \r\n\t",
    "a" * 40_000,
    " " * 300_000 + "x",
    "!" + "\n" * 12_000 + " " * 12_000,
    "x" + " " * 20_000 + "\n" + " " * 20_000 + "y",
    "\u3000" * 11_000 + "\x1c\x85\u2028 z",
    "<|begin_of_text|><|eot_id|> <|end_of_text|",
    "a\x00b\x7f\x80\xff\ufeff\ufffd\U0010ffff",
    "e\u0301 \u0345 ǅ ʰ ß ſ İ K 'ſ 'S 'LL",
    "٠١٢٣ ½ Ⅷ 四五 १२३",
    "👩‍👩‍👧‍👦🇩🇪\u200d\u200b",
    "אבג العربية ไทย 한국어",
    "don't WE'LL it's'd",
]


@pytest.fixture(scope="module")
def hugging_face(trained):
    made = make_hugging_face(trained)
    made.encode_special_tokens = True
    return lambda text: made.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_both_forms_agree_on_nasty_strings(trained, hugging_face, text):
    ids = trained.encode(text)
    assert hugging_face(text) == ids
    assert trained.decode(ids) == text


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_both_forms_agree_on_any_text(trained, hugging_face, text):
    ids = trained.encode(text)
    assert hugging_face(text) == ids
    assert trained.decode(ids) == text


@settings(max_examples=500, deadline=None)
@given(st.text("ab=- \n'sc", max_size=60))
def test_both_forms_agree_on_text_full_of_ties(trained, hugging_face, text):
    assert hugging_face(text) == trained.encode(text)


def test_both_forms_agree_on_every_token_repeated(trained, hugging_face):
    for token in trained.ranks:
        for count in (1, 2, 3, 5, 8):
            text = (token * count).decode("utf-8", "ignore")
            assert hugging_face(text) == trained.encode(text)


def test_allowed_special_tokens_agree_with_hugging_face(trained):
    made = make_hugging_face(trained)
    text = "a<|eot_id|><|begin_of_text|> b"
    ids = trained.encode(text, allowed_special=frozenset(trained.special))
    assert made.encode(text, add_special_tokens=False).ids == ids
    assert ids.count(trained.special["<|eot_id|>"]) == 1
    assert ids[2] == trained.bos_id


def test_sizes_count_special_tokens(trained):
    assert trained.vocab_size == 480
    assert len(trained.ranks) == 464
    assert (trained.bos_id, trained.eos_id, trained.pad_id) == (464, 465, 468)
    assert trained.special["<|eot_id|>"] == 473
    assert max(trained.special.values()) == 479


def test_merges_of_a_small_text_are_the_ones_worked_out_by_hand():
    # "ab" occurs four times, then "abab" twice; ties go to the smaller ids.
    made = train_tokenizer(["abab abab"], 256 + 2 + 16)
    by_rank = sorted(made.ranks, key=made.ranks.__getitem__)
    assert by_rank[256:] == [b"ab", b"abab"]
    assert made.encode("ababab") == [257, 256]


def test_the_same_text_gives_the_same_bytes(trained, training_texts, tmp_path):
    again = train_tokenizer(training_texts, 480)
    trained.save(tmp_path / "one")
    again.save(tmp_path / "two")
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_saved_tokenizer_loads_by_folder_and_by_file(trained, tmp_path):
    trained.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == trained.fingerprint
        assert loaded.special == trained.special
        assert loaded.encode(" " * 60_000 + "x") == trained.encode(" " * 60_000 + "x")


def test_transformers_finds_the_special_tokens(trained, tmp_path):
    trained.save(tmp_path)
    table = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert table["bos_token"] == "<|begin_of_text|>"
    assert table["added_tokens_decoder"]["465"]["content"] == "<|end_of_text|>"
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["model"]["ignore_merges"] is True
    assert [token["id"] for token in saved["added_tokens"]] == list(range(464, 480))


def test_too_little_text_says_how_many_tokens_it_gives():
    with pytest.raises(TokenizerError, match="gives 275 tokens, 4096 were asked for"):
        train_tokenizer(["abab abab"], 4096)


def test_bytes_a_token_leaves_out_begin_and_end_tokens():
    made = train_tokenizer(["abab abab"], 256 + 2 + 16)
    assert bytes_per_token(made, ["ababab", "é"]) == 8 / 4
    assert bytes_per_token(made, []) == 0.0


def test_another_vocabulary_has_another_fingerprint(trained):
    other = train_tokenizer(["abab abab"], 274)
    assert other.fingerprint != trained.fingerprint


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "lacks the byte 0"),
        ("IQ== 0\nnot base64\n", "tokenizer.model:2: not a base64 token and a rank"),
        ("IQ== x\n", "tokenizer.model:1: not a base64 token and a rank"),
    ],
)
def test_a_bad_file_is_one_line_that_says_where(tmp_path, text, complaint):
    (tmp_path / "tokenizer.model").write_text(text)
    with pytest.raises(TokenizerError, match=complaint):
        load_tokenizer(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere: no such file"):
        load_tokenizer(tmp_path / "nowhere")
