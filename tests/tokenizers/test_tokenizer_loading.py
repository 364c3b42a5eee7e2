"""Which tokenizer a path holds, and that others read what we write."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.tokenizers import TokenizerError, load_tokenizer
from llama_jax.tokenizers.byte import ByteTokenizer
from llama_jax.tokenizers.hugging_face_json import HuggingFaceTokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from llama_jax.tokenizers.tiktoken import TiktokenTokenizer

HARD = [
    *("", " ", "  two leading", "trailing  ", "\n\n a", "12 345", "a\x00b", "\u2581x <0x0A>"),
    *("Việt 你好 🙂👩‍👩‍👧", "don't WE'LL", "e\u0301\u3000\xa0"),
]


@pytest.fixture
def saved(request, trained, spm, tmp_path):
    made = {"tiktoken": trained, "sentencepiece": spm}[request.param]
    made.save(tmp_path)
    return made, tmp_path


kinds = pytest.mark.parametrize("saved", ["tiktoken", "sentencepiece"], indirect=True)


@kinds
def test_what_we_wrote_is_read_by_folder_and_by_either_file(saved):
    made, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    for path in (folder, folder / "tokenizer.model"):
        copy = load_tokenizer(path)
        assert type(copy) is type(made)
        assert copy.fingerprint == made.fingerprint
    other = load_tokenizer(folder / "tokenizer.json")
    assert isinstance(other, HuggingFaceTokenizer)
    for text in HARD:
        assert other.encode(text) == made.encode(text)
    assert (other.special, other.adds_bos) == (made.special, made.adds_bos)


@kinds
def test_transformers_loads_the_folder_with_the_same_ids_and_one_begin_token(saved):
    transformers = pytest.importorskip("transformers")
    made, folder = saved
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    every = frozenset(made.special)
    for text in [*HARD, *(f"a{name} b" for name in made.special)]:
        expected = made.encode(text, allowed_special=every)
        assert theirs.encode(text, add_special_tokens=False) == expected
        assert theirs.encode(text) == [made.bos_id, *expected]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (made.bos_id, made.eos_id)
    assert (theirs.pad_token_id, len(theirs)) == (made.pad_id, made.vocab_size)


@kinds
def test_a_model_config_beside_it_changes_nothing_for_transformers(saved):
    transformers = pytest.importorskip("transformers")
    made, folder = saved
    (folder / "config.json").write_text('{"model_type": "llama"}')
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in HARD:
        assert theirs.encode(text) == [made.bos_id, *made.encode(text)]


def test_another_projects_tokenizer_json_goes_before_a_tiktoken_file(trained, tmp_path):
    trained.save(tmp_path)
    table = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del table["cut_long_text"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    assert isinstance(load_tokenizer(tmp_path), HuggingFaceTokenizer)
    (tmp_path / "tokenizer.json").unlink()
    assert isinstance(load_tokenizer(tmp_path), TiktokenTokenizer)


def test_a_sentencepiece_file_goes_before_tokenizer_json_whose_added_tokens_it_takes(spm, tmp_path):
    """What an older fine-tuned Llama 2 folder holds."""
    chat = SentencePieceTokenizer(spm.proto, {"<|im_end|>": 420})
    chat.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert (loaded.special, loaded.eos_id, loaded.adds_bos) == (chat.special, 420, True)
    # Added tokens that don't fit the file: it belongs to another vocabulary.
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["model"]["vocab"]["<extra>"] = 420
    definition["added_tokens"][-1]["id"] = 421
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, HuggingFaceTokenizer)
    assert (loaded.eos_id, loaded.vocab_size) == (421, 422)


def test_a_broken_sentencepiece_file_is_not_hidden_by_tokenizer_json(spm, tmp_path):
    spm.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(spm.proto[: len(spm.proto) // 2])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: "):
        load_tokenizer(tmp_path)


def test_older_folders_keep_special_tokens_in_files_of_their_own(spm, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(spm.proto)
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 420}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    loaded = load_tokenizer(tmp_path)
    assert (loaded.pad_id, loaded.vocab_size, loaded.bos_id) == (420, 421, 1)


def test_nothing_there_is_one_line(tmp_path):
    with pytest.raises(TokenizerError, match=r"holds neither tokenizer\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="absent: no such file"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="not a JSON object"):
        load_tokenizer(tmp_path)


@pytest.fixture(scope="module", params=["tiktoken", "sentencepiece", "json", "byte"])
def every_kind(request, trained, spm, tmp_path_factory):
    if request.param == "json":
        folder = tmp_path_factory.mktemp("json")
        trained.save(folder)
        return load_tokenizer(folder / "tokenizer.json")
    return {"tiktoken": trained, "sentencepiece": spm, "byte": ByteTokenizer()}[request.param]


def test_only_who_asks_for_a_begin_token_gets_one(every_kind):
    begin = every_kind.bos_id
    name = next(name for name, i in every_kind.special.items() if i == begin)
    assert every_kind.encode("Hello").count(begin) == 0
    with_bos = every_kind.encode("Hello", bos=True)
    assert (with_bos[0], with_bos.count(begin)) == (begin, 1)
    # A template that writes it itself is encoded without `bos`.
    written = every_kind.encode(f"{name}Hello", allowed_special={name})
    assert written == with_bos
    assert every_kind.encode(f"{name}Hello", bos=True).count(begin) == 1


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_text_survives_encoding_and_decoding(every_kind, text):
    assert every_kind.decode(every_kind.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 271), max_size=20))
def test_skipping_special_tokens_leaves_their_names_out(every_kind, ids):
    names = {i: name for name, i in every_kind.special.items()}
    spelled = every_kind.decode(ids)
    for i in ids:
        if i in names:
            before, name, after = spelled.partition(names[i])
            assert name
            spelled = before + after
    assert every_kind.decode(ids, skip_special=True) == spelled
