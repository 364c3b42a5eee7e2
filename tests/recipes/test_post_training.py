"""Rounds of the real stages over small models; training is replaced by models that are there."""

import json
import sys
from pathlib import Path

import pytest

from llama_jax.cli.main import main
from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError
from llama_jax.recipes import training_stages
from llama_jax.recipes.fingerprints import RecipeError
from llama_jax.recipes.post_training import run_post_training
from llama_jax.recipes.report import read_rounds
from llama_jax.recipes.settings import TrainTable, Variant, load_rounds_config
from llama_jax.recipes.training_stages import resolved, training_stage

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("cli", "interchange")]

from scripted_models import scripted_source

from llama_jax.interchange.hugging_face_writing import write_hugging_face
from llama_jax.tokenizers.byte import ByteTokenizer

RUN = """
[model]
vocab_size = 272
embed_dim = 64
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 32
mlp_dim = 64
max_seq_len = 512
norm_eps = 1e-5
rope = { theta = 10000.0 }
tie_embeddings = false

[tokenizer]
kind = "byte"

[init]
path = "@start"

[data]
seq_len = 128
batch_size = 8
packing = "best_fit"

[[data.sources]]
name = "people"
conversations = { path = "people.jsonl" }

[[data.sources]]
name = "sampled"
conversations = { path = "@conversations" }

[training]
steps = 1

[schedule]
peak = 1e-3
"""
ROUNDS = """
start = "{folder}/seven"
prompts = ["{folder}/prompts.jsonl"]
held_out = "{folder}/held_out.jsonl"
rounds = 2
model = {{ chat_format = "llama3" }}
sft = {{ run = "{folder}/sft.toml" }}
sample = {{ k = 2, draw = {{ temperature = 0.3, max_new_tokens = 8 }} }}
score = {{ verifiers = [{{ kind = "answer" }}] }}
compare = {{ draw = {{ temperature = 0.0, max_new_tokens = 8 }} }}

[critic]
model = {{ path = "{folder}/nine", chat_format = "llama3" }}
tries = 1
draw = {{ max_new_tokens = 8 }}
"""
REPLIES = {"seven": "=7", "eight": "=8", "nine": "=9"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("post")
    for name, reply in REPLIES.items():
        source = scripted_source(["\n", reply, "<|eot_id|>"])
        write_hugging_face(source, folder / name, tokenizer=ByteTokenizer())
    answers = {"prompts": (7, 8, 9), "held_out": (8, 8, 7, 5)}
    for name, wanted in answers.items():
        lines = [json.dumps({"prompt": f"{name} {i}?", "answer": a}) for i, a in enumerate(wanted)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "sft.toml").write_text(RUN)
    (folder / "rounds.toml").write_text(ROUNDS.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """Training gives the model that says =8, and tells here what it was given."""
    told = []

    def train(run, context, run_dir):
        told.append(resolved(run, context.inputs))
        return folder / "eight", {"loss": 1.0}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_stages, "_train", train)
        yield told


@pytest.fixture(scope="module")
def done(folder, trained, tmp_path_factory):
    """Two rounds, and what there is after them."""
    out = tmp_path_factory.mktemp("done") / "r"
    return out, run(folder, out), list(trained)


def run(folder, out, *settings, without=()):
    config = load_rounds_config(folder / "rounds.toml", settings, without)
    return run_post_training(config, out, say=lambda line: None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder):
    return {
        path.name: [r["messages"][-1]["content"] for r in lines(path)]
        for path in sorted(folder.iterdir())
    }


def test_two_rounds_train_sample_score_correct_and_compare(folder, done):
    out, artifacts, _ = done
    assert artifacts["model"] == folder / "eight"
    rounds = read_rounds(out)
    assert [list(each["stages"]) for each in rounds] == [
        ["sft", "sample", "score", "critic", "compare"]
    ] * 2
    first, second = (each["stages"] for each in rounds)
    # The model says =8 to all three: one of them right, two poor; the critic's =9 mends one.
    assert first["score"]["figures"]["right"]["pass_at"] == pytest.approx([1 / 3, 1 / 3])
    assert first["critic"]["figures"] == {
        "poor": 2,
        "corrected": 1,
        "refused": {"no correction is better": 1},
    }
    made = {"round_1.jsonl": ["=8"], "round_1_critic.jsonl": ["=9"]}
    assert answers(out / "round_1/4_critic/conversations") == made
    made |= {"round_2.jsonl": ["=8"], "round_2_critic.jsonl": ["=9"]}
    assert answers(out / "round_2/4_critic/conversations") == made
    # Preferences are the last round's alone.
    assert sorted(path.name for path in artifacts["preferences"].iterdir()) == [
        "round_2.jsonl",
        "round_2_critic.jsonl",
    ]
    # =8 against =7 on 8, 8, 7, 5: two wins, a loss, a tie; then against itself.
    figures = first["compare"]["figures"]
    assert (figures["wins"], figures["ties"], figures["losses"]) == (2, 1, 1)
    assert figures["rate"] == 0.625
    assert second["compare"]["figures"]["ties"] == 4
    assert "win rate 0.625 (" in (out / "report.md").read_text()


def test_sft_reads_what_earlier_rounds_made_and_begins_with_its_model(folder, done):
    out, _, (first, second) = done
    assert [source.name for source in first.data.sources] == ["people"]
    assert [source.name for source in second.data.sources] == ["people", "sampled"]
    assert second.data.sources[1].conversations.path == str(out / "round_1/4_critic/conversations")
    assert {first.init.path, second.init.path} == {str(folder / "seven")}


def test_a_second_call_opens_and_trains_nothing(folder, done, trained, monkeypatch):
    out, before = done[0], len(trained)
    report = (out / "report.json").read_bytes()
    opened = "llama_jax.synthesis.running.open_model"
    monkeypatch.setattr(opened, lambda *a, **b: pytest.fail("opened"))
    run(folder, out)
    assert len(trained) == before
    assert (out / "report.json").read_bytes() == report
    with pytest.raises(RecipeError, match="setting 'k' was 2, is 3"):
        run(folder, out, "sample.k=3")


def test_stages_left_out_for_an_ablation_and_an_average(folder, tmp_path):
    artifacts = run(
        folder,
        tmp_path / "r",
        "rounds=1",
        'average={of=["start", "model"], weights=[1.0, 3.0]}',
        without=("sft", "critic"),
    )
    (each,) = read_rounds(tmp_path / "r")
    assert list(each["stages"]) == ["sample", "score", "average", "compare"]
    assert artifacts["model"] == tmp_path / "r/round_1/3_average/averaged"
    assert each["stages"]["average"]["figures"]["shares"] == {"start": 0.25, "model": 0.75}
    # The same model twice: every answer the same.
    assert each["stages"]["compare"]["figures"]["ties"] == 4


def test_the_verb_prints_the_report_and_refuses_what_it_does_not_know(
    folder, tmp_path, capsys, done
):
    file, out = str(folder / "rounds.toml"), ["--dir", str(done[0])]
    assert main(["rounds", file, *out]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("| round | stage | figures | seconds |\n")
    assert "| 1 | compare | win rate 0.625" in printed.out
    assert "round 2 of 2\n1_sft: done already" in printed.err
    assert main(["rounds", file, *out, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rounds"][0]["stages"]["sft"]["figures"] == {"loss": 1.0}
    for setting, complaint in {
        "rounds=0": "rounds: 0 must be above 0",
        'prompts=["a","b","c"]': "prompts: 3 files for 2 rounds",
        'stages=["reward"]': "stages: stage 'reward' has no table",
        'compare.judge="reward"': "stages.compare: needs 'reward_model', which no stage",
        'stages=["score","sample"]': "stages.score: needs 'samples', which no stage before",
        "score.verifiers=[]": "compare.verifiers: no verifiers, here or in score",
        'average={of=["model"]}': "average.of: at least two models",
    }.items():
        assert main(["rounds", file, "--dir", str(tmp_path / "no"), "--set", setting]) == 2
        assert complaint in capsys.readouterr().err
    assert main(["rounds", file, *out, "--without", "dpo"]) == 2
    assert "--without: no stage 'dpo' to leave out" in capsys.readouterr().err


def test_a_run_says_what_it_takes_of_the_rounds(folder, tmp_path):
    stage = training_stage("sft", TrainTable(str(folder / "sft.toml")), makes="model", key="sft")
    assert (stage.needs, stage.uses) == (("start",), ("conversations",))
    assert stage.makes == ("model", "sft_1")
    only = ('data.sources=[{name="s", conversations={path="@conversations"}}]',)
    stage = training_stage(
        "sft", TrainTable(str(folder / "sft.toml"), only), makes="model", key="sft"
    )
    assert (stage.needs, stage.uses) == (("conversations", "start"), ())
    plain = TrainTable(str(folder / "sft.toml"), ('init.path="runs/base"',))
    with pytest.raises(ConfigError, match=r"sft.toml: sft: begins with no model of the rounds"):
        training_stage("sft", plain, makes="model", key="sft")


def test_variants_are_runs_of_their_own(folder, tmp_path, trained):
    variants = (Variant(), Variant(("seed=1", "schedule.peak=1e-4")))
    table = TrainTable(str(folder / "sft.toml"), (), variants)
    stage = training_stage("sft", table, makes="model", key="sft")
    assert stage.makes == ("model", "sft_1", "sft_2")
    assert [run["seed"] for run in stage.settings["runs"]] == [0, 1]
    assert [run["schedule"]["peak"] for run in stage.settings["runs"]] == [1e-3, 1e-4]
    run(
        folder,
        tmp_path / "r",
        "rounds=1",
        'sft.variants=[{set=["seed=1"]}, {set=["seed=2"]}]',
        'average={of=["sft_1", "sft_2", "last"]}',
        without=("sample", "score", "critic", "compare"),
    )
    assert [each.seed for each in trained[-2:]] == [1, 2]


def test_a_name_that_is_not_an_artifact_is_told(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"needs 'strat', which no stage .*did you mean 'start'"):
        run(folder, tmp_path / "r", 'sft.set=["init.path=\\"@strat\\""]')


def test_resolved_leaves_nothing_of_the_names(folder):
    config = load_run_config(str(folder / "sft.toml"))
    paths = {"start": Path("/a"), "conversations": Path("/b")}
    whole = resolved(config, paths)
    assert (whole.init.path, whole.data.sources[1].conversations.path) == ("/a", "/b")
    assert "@" not in str(whole)
