"""Rounds of the real stages over small models; training is replaced by models that are there."""

import json
import shutil
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
from llama_jax.recipes.run_artifacts import empty_sources, resolved, sources_left
from llama_jax.recipes.settings import TrainTable, Variant, load_rounds_config
from llama_jax.recipes.training_stages import training_stage

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


def test_edits_that_were_written_since_are_not_passed_over(folder, tmp_path):
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": 1, "edited": "so it is 8"}\n')
    options = ("rounds=1", f'critic={{edits="{edits}"}}')
    artifacts = run(folder, tmp_path / "r", *options, without=("sft", "compare"))
    (record,) = lines(artifacts["conversations"] / "round_1_critic.jsonl")
    assert record["messages"][-1]["content"] == "so it is 8"
    edits.write_text(edits.read_text() + '{"prompt": 2, "edited": "so it is 9"}\n')
    with pytest.raises(RecipeError, match=r"3_critic/stage\.json: setting 'edits' was"):
        run(folder, tmp_path / "r", *options, without=("sft", "compare"))
    shutil.rmtree(tmp_path / "r/round_1/3_critic")
    artifacts = run(folder, tmp_path / "r", *options, without=("sft", "compare"))
    assert len(lines(artifacts["conversations"] / "round_1_critic.jsonl")) == 2
    edits.unlink()
    with pytest.raises(RecipeError, match=r"edits\.jsonl: no such file"):
        run(folder, tmp_path / "other", *options, without=("sft", "compare"))
    assert not (tmp_path / "other/round_1").exists()


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
        "compare.margin=0.5": "compare.margin: has no meaning for verifiers",
        'compare={judge="reward", verifiers=[{kind="answer"}], draw={max_new_tokens=8}}': (
            "compare.verifiers: has no meaning with judge"
        ),
        "sample.draw.temperature=0": "sample.draw.temperature: 2 samples would all be the same",
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


def test_resolved_leaves_nothing_of_the_names(folder, tmp_path):
    config = load_run_config(str(folder / "sft.toml"))
    made = tmp_path / "made.jsonl"
    made.write_text(json.dumps({"prompt": "2?", "completion": "2"}) + "\n")
    whole = resolved(config, {"start": Path("/a"), "conversations": made})
    assert (whole.init.path, whole.data.sources[1].conversations.path) == ("/a", str(made))
    assert "@" not in str(whole)


PAIRS = (
    """data.sources=[{name="made", preferences={path="@preferences"}}]""",
    """objective={kind="dpo"}""",
)


def dpo_of(folder, *settings):
    """A setting of rounds: a DPO stage on nothing but what was made of samples."""
    sets = ", ".join(f"'{setting}'" for setting in (*PAIRS, *settings))
    return f'dpo={{run="{folder}/sft.toml", set=[{sets}]}}'


def test_dpo_without_a_pair_is_skipped_and_the_round_goes_on(folder, tmp_path, trained):
    # Both samples of a prompt are the same, so none is better; one of three is right.
    before = len(trained)
    out = tmp_path / "r"
    artifacts = run(
        folder,
        out,
        "rounds=1",
        dpo_of(folder),
        'stages=["sample", "score", "sft", "dpo", "average", "compare"]',
        'average={of=["sft_1", "dpo_1"]}',
    )
    stages = read_rounds(out)[0]["stages"]
    assert stages["dpo"]["skipped"] == (
        f"no pair in source 'made', {(out / 'round_1/2_score/preferences').absolute()}"
    )
    assert stages["average"]["skipped"] == "there is no 'dpo_1'; what makes it was skipped"
    assert artifacts["model"] == folder / "eight"
    assert stages["compare"]["figures"]["rate"] == 0.625
    assert len(trained) == before + 1


def test_a_round_without_a_right_answer_that_trains_on_nothing_else_ends(folder, tmp_path):
    only = """data.sources=[{name="made", conversations={path="@conversations"}}]"""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "3?", "answer": 3}) + "\n")
    settings = (
        f'prompts=["{prompts}"]',
        f"sft={{run=\"{folder}/sft.toml\", set=['{only}']}}",
        dpo_of(folder),
        'stages=["sample", "score", "sft", "dpo", "compare"]',
    )
    with pytest.raises(RecipeError) as error:
        run(folder, tmp_path / "r", *settings)
    made = (tmp_path / "r/round_1/2_score").absolute()
    assert str(error.value) == (
        f"{tmp_path / 'r/round_1'}: nothing to train on. "
        f"sft: no conversation in source 'made', {made / 'conversations'}; "
        f"dpo: no pair in source 'made', {made / 'preferences'}"
    )
    assert [each["stage"] for each in read_rounds(tmp_path / "r")[0]["stages"].values()] == [
        *("sample", "score", "sft", "dpo")
    ]


def pairs_file(folder, *strengths):
    folder.mkdir(exist_ok=True)
    records = [
        {"prompt": f"{i}?", "chosen": "1", "rejected": "2", "strength": strength}
        for i, strength in enumerate(strengths)
    ]
    (folder / "round_1.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_pairs_of_other_strengths_or_parts_are_none(folder, tmp_path):
    strong = """data.sources.0.preferences.strengths=["significantly", "better"]"""
    config = load_run_config(str(folder / "sft.toml"), [*PAIRS, strong])
    inputs = {"start": folder, "preferences": pairs_file(tmp_path / "p", "slightly", "marginally")}
    assert not sources_left(config, inputs)
    assert empty_sources(config, inputs, "sources") == [
        f"no pair of strength significantly or better in source 'made', {tmp_path / 'p'}"
    ]
    pairs_file(tmp_path / "p", "slightly", "better")
    assert sources_left(config, inputs)
    assert empty_sources(config, inputs, "sources") == []
    aside = "data.sources.0.preferences.part=held_out"
    none_of = "data.sources.0.preferences.held_out_fraction=0.0"
    config = load_run_config(str(folder / "sft.toml"), [*PAIRS, aside, none_of])
    (reason,) = empty_sources(config, inputs, "sources")
    assert reason.startswith("no pair of part 'held_out' in source 'made'")


def test_an_empty_source_among_others_is_left_out_with_a_line(folder, tmp_path, trained):
    # The second round's `sampled` is there, but no answer was right.
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "3?", "answer": 3}) + "\n")
    config = load_rounds_config(
        folder / "rounds.toml",
        [f'prompts=["{tmp_path / "prompts.jsonl"}"]'],
        ("critic", "compare"),
    )
    said = []
    run_post_training(config, tmp_path / "r", say=said.append)
    assert [source.name for source in trained[-1].data.sources] == ["people"]
    empty = (tmp_path / "r/round_1/3_score/conversations").absolute()
    assert f"sft: left out: no conversation in source 'sampled', {empty}" in said


def test_a_greedy_average_is_by_a_runs_held_out_data(folder, tmp_path, trained):
    (tmp_path / "held_out.jsonl").write_text(
        json.dumps({"prompt": "8?", "completion": "\n=8"}) + "\n"
    )
    held = f"""data.held_out=[{{name="h", conversations={{path="{tmp_path}/held_out.jsonl"}}}}]"""
    greedy = f"greedy={{run=\"{folder}/sft.toml\", set=['{held}', 'metrics.progress=false']}}"
    artifacts = run(
        folder,
        tmp_path / "r",
        "rounds=1",
        f'average={{of=["start", "sft_1"], {greedy}}}',
        without=("sample", "score", "critic", "compare"),
    )
    figures = read_rounds(tmp_path / "r")[0]["stages"]["average"]["figures"]
    # The trained one says =8, the first =7.
    assert figures["losses"]["sft_1"] < figures["losses"]["start"] - 1
    assert figures["shares"] == {"start": 0.0, "sft_1": 1.0}
    assert figures["loss"] == figures["losses"]["sft_1"]
    assert artifacts["model"] == tmp_path / "r/round_1/2_average/averaged"
    for table, complaint in {
        'weights=[1.0, 1.0], greedy={run="debug/sft"}': r"average.weights: a greedy soup's",
        f'greedy={{run="{folder}/sft.toml"}}': r"average.greedy.run: nothing is held out",
    }.items():
        with pytest.raises(ConfigError, match=complaint):
            run(folder, tmp_path / "no", f'average={{of=["start", "model"], {table}}}')
