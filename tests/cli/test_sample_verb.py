"""`llama-jax sample`: a file, its folder, figures, and what is refused before a model is loaded."""

import json

import pytest
from scripted_models import scripted_source

from llama_jax.cli.main import main
from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.tokenizers.byte import ByteTokenizer

FILE = """
prompts = "{folder}/prompts.jsonl"
k = 4
model = {{ path = "{folder}/model", chat_format = "llama3" }}
draw = {{ temperature = 0.3, max_new_tokens = 8 }}
verifiers = [{{ kind = "answer" }}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that replies =7 to everything."""
    folder = tmp_path_factory.mktemp("sample")
    source = scripted_source(["\n", "=7", "<|eot_id|>"])
    write_hugging_face(source, folder / "model", tokenizer=ByteTokenizer())
    prompts = [{"prompt": "3+4?", "answer": 7}, {"prompt": "4+4?", "answer": "8"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    (folder / "sample.toml").write_text(FILE.format(folder=folder))
    return folder


def test_a_file_is_sampled_and_the_verified_answers_kept(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["sample", str(folder / "sample.toml"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == (
        f"{out}: 2 prompts, 4 samples each, 2 tokens a sample, 0 cut; 1 answers kept, 0 pairs"
    )
    assert printed[1].split() == ["K", "1", "2", "4"]
    assert printed[2].split() == ["right,", "any", "of", "K", "0.500", "0.500", "0.500"]
    (line,) = (out / "conversations.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"] == [
        {"role": "user", "content": "3+4?"},
        {"role": "assistant", "content": "=7"},
    ]


def test_a_critic_and_json(folder, tmp_path, capsys):
    options = ["--set", "k=2", "--set", "critic={tries=1}", "--json"]
    out = ["--out", str(tmp_path / "out")]
    assert main(["sample", str(folder / "sample.toml"), *out, *options]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["kept"], figures["right"]["mean"]) == (1, 0.5)
    # The critic is the same model, which says =7 here too.
    assert figures["corrections"] == {
        "poor": 1,
        "corrected": 0,
        "refused": {"no correction is better": 1},
    }


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("k=0", "k: 0 must be above 0"),
        ("verifiers=[]", "k: 4 samples of a prompt need verifiers or a reward model"),
        ("draw.temperature=0", "draw.temperature: 4 samples would all be the same at 0"),
        ("draw.tempereture=1", "draw.tempereture: unknown key (did you mean 'temperature'?)"),
        ('verifiers=[{kind="answr"}]', "verifiers.0.kind: unknown kind 'answr' (did you mean"),
        ('verifiers=[{kind="pattern", pattern="("}]', "verifiers.0.pattern: '(': missing )"),
        ('critic={edits="e", tries=3}', "critic.tries: has no meaning for edits that people"),
        ('critic={template="no.txt"}', "no.txt: template: No such file or directory"),
        # All of these came only when every sample had been drawn.
        ("keep.min_score=1.0", "keep.min_score: nothing is scored"),
        ("keep.pairs='best_worst'", "keep.pairs: 'best_worst' needs a reward model"),
        ("critic.threshold=1.0", "critic.threshold: nothing is scored"),
        ("critic={edits='no.jsonl'}", "no.jsonl: critic.edits: No such file"),
        ("critic.draw.temperature=0", "critic.draw.temperature: 4 corrections would all be"),
        ("reward={path='r', chat=false}", "reward.chat: a reward model reads conversations"),
        ("model.chat=false", "model.chat_format: needs chat = true"),
    ],
)
def test_what_makes_no_sense_is_refused_by_its_field(folder, tmp_path, capsys, setting, complaint):
    out = ["--out", str(tmp_path / "out"), "--set", setting]
    assert main(["sample", str(folder / "sample.toml"), *out]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_prompt_without_an_answer_is_told(folder, tmp_path, capsys):
    (folder / "bare.jsonl").write_text('{"prompt": "why?"}\n')
    setting = ["--set", f"prompts={folder}/bare.jsonl"]
    out = ["--out", str(tmp_path / "out"), *setting]
    assert main(["sample", str(folder / "sample.toml"), *out]) == 1
    assert "prompt 1 has no 'answer', which verifier 'answer' reads" in capsys.readouterr().err
