"""Rounds of fake stages: order, records, kills, changes underneath, switched-off stages."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import counting_rounds
import pytest
from counting_rounds import LINES, start

from llama_jax.config.loading import ConfigError
from llama_jax.config.run_files import write_json
from llama_jax.recipes.fingerprints import RecipeError, path_fingerprint
from llama_jax.recipes.report import read_rounds, write_report
from llama_jax.recipes.rounds import run_round, run_rounds
from llama_jax.recipes.stages import Result, Stage

SCRIPT = Path(counting_rounds.__file__)
ORDER = [f"{number}.{name}" for number in (1, 2) for name in ("sft", "sample", "score")]


def run(folder, count=2, *, without=(), calls=None, said=None):
    def make(number):
        made = counting_rounds.stages(number, calls=calls)
        return [stage for stage in made if stage.name not in without]

    lines = [] if said is None else said
    return run_rounds(folder / "rounds", count, make, start(folder), say=lines.append)


def tree(folder):
    """Every output by its place."""
    root = folder / "rounds"
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*.txt")}


def test_stages_run_in_order_and_each_gets_what_the_last_one_made(tmp_path):
    calls = []
    artifacts = run(tmp_path, calls=calls)
    assert calls == ORDER
    assert artifacts["model"] == tmp_path / "rounds" / "round_2" / "1_sft" / "model.txt"
    made = tree(tmp_path)
    # The first round's SFT has no chosen samples, the second's has those of the first.
    assert "chosen" not in made["round_1/1_sft/model.txt"]
    assert "chosen=(5, '3_score')" in made["round_2/1_sft/model.txt"]


def test_a_record_says_what_was_read_and_written(tmp_path):
    run(tmp_path)
    record = json.loads((tmp_path / "rounds/round_1/2_sample/stage.json").read_text())
    model = tmp_path / "rounds/round_1/1_sft/model.txt"
    assert record["inputs"]["model"] == {
        "path": str(model),
        "fingerprint": path_fingerprint(model),
    }
    assert set(record["inputs"]) == {"model", "prompts"}
    assert (record["stage"], record["figures"]) == ("sample", {"lines": LINES})
    assert set(record["outputs"]) == {"samples"}
    rounds = read_rounds(tmp_path / "rounds")
    assert [list(each["stages"]) for each in rounds] == [["sft", "sample", "score"]] * 2
    report = (tmp_path / "rounds/report.md").read_text()
    assert "| 2 | score | lines 5 |" in report


def test_what_is_done_is_not_done_again(tmp_path):
    run(tmp_path, count=1)
    calls, said = [], []
    run(tmp_path, count=2, calls=calls, said=said)
    assert calls == ORDER[3:]
    assert said[:4] == [
        "round 1 of 2",
        *(f"{name}: done already" for name in ("1_sft", "2_sample", "3_score")),
    ]


def test_a_stage_that_fails_is_called_again_and_those_before_it_are_not(tmp_path):
    calls = []

    def failing(context):
        calls.append(sorted(path.name for path in context.folder.iterdir()))
        (context.folder / "half.txt").write_text("half")
        if len(calls) < 3:
            raise RuntimeError("no space left")
        return Result({"b": context.folder / "half.txt"})

    def first(context):
        calls.append("first")
        (context.folder / "a.txt").write_text("a")
        return Result({"a": context.folder / "a.txt"})

    stages = [Stage("first", (), ("a",), first), Stage("second", ("a",), ("b",), failing)]
    with pytest.raises(RuntimeError, match="no space"):
        run_round(tmp_path, stages, {}, say=lambda line: None)
    said = []
    run_round(tmp_path, stages, {}, say=said.append)
    assert calls == ["first", ["begun.json"], ["begun.json", "half.txt"]]
    assert said == ["1_first: done already", "2_second: goes on"]


def test_killed_at_any_moment_it_ends_as_the_uninterrupted(tmp_path):
    def call(folder, pause_s):
        command = [sys.executable, str(SCRIPT), str(folder), str(pause_s)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    whole, killed = tmp_path / "whole" / "at", tmp_path / "killed" / "at"
    whole.parent.mkdir()
    killed.parent.mkdir()
    assert call(whole, 0.0).wait(timeout=60) == 0
    chance, kills = random.Random(0), 0
    for _ in range(6):
        process = call(killed, 0.03)
        seen = len(_lines_of(killed))
        # Somewhere in what it newly writes: in a stage, between two, or in a record.
        while process.poll() is None and len(_lines_of(killed)) < seen + 1 + chance.randrange(5):
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 4
    assert call(killed, 0.0).wait(timeout=60) == 0
    assert tree(killed) == tree(whole)
    assert len(tree(whole)) == 6


def _lines_of(folder):
    texts = [path.read_text() for path in folder.glob("rounds/*/*/*.txt")]
    return "".join(texts).splitlines()


def test_a_stage_can_be_left_out(tmp_path):
    calls = []
    run(tmp_path, without=("sft",), calls=calls)
    assert calls == [name for name in ORDER if not name.endswith("sft")]
    assert "model=(1, " in tree(tmp_path)["round_2/1_sample/samples.txt"]


def test_a_folder_of_other_stages_is_not_gone_on_with(tmp_path):
    """The report would have figures of both, by the name of a stage."""
    run(tmp_path, count=1)
    calls = []
    told = r"round_1/1_sft: is of rounds of other stages; run these in another folder"
    with pytest.raises(RecipeError, match=told):
        run(tmp_path, count=1, without=("sft",), calls=calls)
    assert calls == []


def test_rounds_go_on_where_their_folder_was_moved_to(tmp_path, monkeypatch):
    run(tmp_path, count=1)
    (tmp_path / "rounds").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    calls = []
    artifacts = run_rounds(
        Path("elsewhere"),
        2,
        lambda number: counting_rounds.stages(number, calls=calls),
        start(tmp_path),
        say=lambda line: None,
    )
    assert calls == [name for name in ORDER if name.startswith("2")]
    assert artifacts["model"] == Path("elsewhere/round_2/1_sft/model.txt")


def test_copies_beside_the_rounds_are_left_alone(tmp_path):
    run(tmp_path)
    shutil.copytree(tmp_path / "rounds/round_1", tmp_path / "rounds/round_1.old")
    assert [each["round"] for each in read_rounds(tmp_path / "rounds")] == [1, 2]


@pytest.mark.parametrize(("against", "told"), [("last", "last"), ("start", "model of the start")])
def test_the_line_of_a_comparison_says_what_it_is_with(tmp_path, against, told):
    figures = {"rate": 0.5, "low": 0.0, "high": 1.0, "wins": 0, "ties": 1, "losses": 0}
    record = {"stage": "compare", "seconds": 0.0, "figures": figures}
    record["settings"] = {"compare": {"against": against}}
    write_json(tmp_path / "round_1/1_compare/stage.json", record)
    lines = []
    write_report(tmp_path, lines.append)
    assert lines[0].startswith(f"round 1 against the {told}: 0.500 (0.000 to 1.000)")


def test_a_stage_whose_needs_nothing_makes_is_told_before_anything_runs(tmp_path):
    calls = []
    with pytest.raises(ConfigError, match=r"stages.score: needs 'samples', which no stage before"):
        run(tmp_path, without=("sample",), calls=calls)
    assert calls == []
    twice = counting_rounds.stages(1)[:1] * 2
    with pytest.raises(ConfigError, match="two stages are called 'sft'"):
        run_round(tmp_path, twice, start(tmp_path))


def test_an_input_that_changed_under_a_stage_is_told(tmp_path):
    run(tmp_path)
    (tmp_path / "rounds/round_1/1_sft/model.txt").write_text("other\n")
    with pytest.raises(RecipeError, match=r"output 'model' of 1_sft has changed; remove .*1_sft"):
        run(tmp_path)
    (tmp_path / "rounds/round_1/1_sft/model.txt").unlink()
    with pytest.raises(RecipeError, match="output 'model' of 1_sft is gone"):
        run(tmp_path)


def test_settings_or_prompts_that_changed_are_told(tmp_path):
    artifacts = start(tmp_path)
    stages = counting_rounds.stages(1)
    quiet = {"say": lambda line: None}
    run_round(tmp_path / "r", stages, artifacts, **quiet)
    changed = [*stages[:2], Stage(**{**vars(stages[2]), "settings": {"k": 8}})]
    with pytest.raises(RecipeError, match=r"3_score/stage.json: setting 'k' was 4, is 8; remove"):
        run_round(tmp_path / "r", changed, artifacts, **quiet)
    (tmp_path / "prompts.txt").write_text("others\n")
    with pytest.raises(RecipeError, match=r"2_sample/stage.json: input 'prompts' .* has changed"):
        run_round(tmp_path / "r", stages, artifacts, **quiet)


def test_a_stage_must_make_what_it_says(tmp_path):
    stage = Stage("a", (), ("x",), lambda context: Result({}))
    with pytest.raises(RecipeError, match=r"stage a made \[\], not \['x'\]"):
        run_round(tmp_path, [stage], {}, say=lambda line: None)


def test_what_a_round_gets_of_the_last_can_be_chosen(tmp_path):
    folder, calls = tmp_path / "rounds", []

    def keep_prompts(number, artifacts):
        return {**start(tmp_path), "last_model": artifacts["model"]}

    def make(number):
        stages = counting_rounds.stages(number, calls=calls)
        if number == 1:
            return stages
        compare = Stage("compare", ("model", "last_model"), (), lambda context: Result({}))
        return [*stages, compare]

    run_rounds(folder, 2, make, start(tmp_path), say=lambda line: None, between=keep_prompts)
    record = json.loads((folder / "round_2/4_compare/stage.json").read_text())
    assert record["inputs"]["last_model"]["path"].endswith("round_1/1_sft/model.txt")
    # Without `chosen` of the last round the second SFT is as the first.
    assert "chosen" not in tree(tmp_path)["round_2/1_sft/model.txt"]


def test_two_calls_are_not_at_work_in_one_folder(tmp_path):
    inner = []

    def nested(context):
        with pytest.raises(RecipeError, match="another process runs these rounds"):
            run_rounds(tmp_path / "r", 1, lambda n: [], {})
        inner.append(True)
        return Result({})

    run_rounds(tmp_path / "r", 1, lambda n: [Stage("a", (), (), nested)], {}, say=lambda s: None)
    assert inner == [True]


def test_a_fingerprint_changes_with_any_name_or_byte(tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a").write_bytes(b"1")
    first = path_fingerprint(folder)
    assert path_fingerprint(folder) == first
    (folder / "sub" / "a").write_bytes(b"2")
    second = path_fingerprint(folder)
    (folder / "sub" / "a").rename(folder / "sub" / "b")
    assert len({first, second, path_fingerprint(folder)}) == 3
    with pytest.raises(RecipeError, match="no such file or folder"):
        path_fingerprint(tmp_path / "none")


def test_a_large_file_is_known_by_its_ends_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.recipes.fingerprints._WHOLE_BYTES", 100)
    monkeypatch.setattr("llama_jax.recipes.fingerprints._END_BYTES", 10)
    path = tmp_path / "large"
    contents = [b"a" * 200, b"b" + b"a" * 199, b"a" * 199 + b"b", b"a" * 201]
    found = set()
    for content in contents:
        path.write_bytes(content)
        found.add(path_fingerprint(path))
    assert len(found) == 4


def skipping(calls, *, all_skipped=False):
    """Stages of which `dpo`, and `sft` too if that is asked, have nothing to train on."""

    def make(name, *makes, reason=None):
        def run(context):
            calls.append((name, {key: path.name for key, path in context.inputs.items()}))
            if reason is not None:
                return Result(skipped=reason)
            (context.folder / name).write_text(name)
            return Result(dict.fromkeys(makes, context.folder / name))

        return run

    no_chat = "no conversation in samples" if all_skipped else None
    return [
        Stage("sft", ("model",), ("model", "sft_1"), make("sft", "model", "sft_1", reason=no_chat),
              stays=("model",), trains=True),
        Stage("dpo", ("model",), ("model", "dpo_1"), make("dpo", reason="no pair in samples"),
              stays=("model",), trains=True),
        Stage("average", ("sft_1", "dpo_1"), ("model",), make("average", "model"),
              stays=("model",)),
        Stage("compare", ("model",), (), make("compare"), uses=("dpo_1",)),
    ]  # fmt: skip


def test_a_stage_with_nothing_to_work_on_is_skipped_and_what_needs_it_too(tmp_path):
    calls, said = [], []
    first = {**start(tmp_path), "dpo_1": tmp_path / "prompts.txt"}
    artifacts = run_rounds(tmp_path / "r", 1, lambda n: skipping(calls), first, say=said.append)
    # The model of before the skipped stages goes on; of another round's `dpo_1` nothing is left.
    assert artifacts["model"] == tmp_path / "r/round_1/1_sft/sft"
    assert "dpo_1" not in artifacts
    assert calls == [
        ("sft", {"model": "start.txt"}),
        ("dpo", {"model": "sft"}),
        ("compare", {"model": "sft"}),
    ]
    absent = "there is no 'dpo_1'; what makes it was skipped"
    assert [line for line in said if "skipped" in line] == [
        "2_dpo: skipped: no pair in samples",
        f"3_average: skipped: {absent}",
    ]
    stages = read_rounds(tmp_path / "r")[0]["stages"]
    assert stages["dpo"]["skipped"] == "no pair in samples"
    assert (stages["average"]["skipped"], stages["average"]["outputs"]) == (absent, {})
    assert "skipped" not in stages["compare"]
    assert "| 1 | dpo | skipped: no pair in samples |" in (tmp_path / "r/report.md").read_text()

    again = []
    done = run_rounds(tmp_path / "r", 1, lambda n: skipping(calls), first, say=again.append)
    assert (done, len(calls)) == (artifacts, 3)
    assert "2_dpo: skipped: no pair in samples" in again


def test_a_round_that_trains_nothing_is_an_error_that_says_why(tmp_path):
    calls = []
    for _ in range(2):
        with pytest.raises(
            RecipeError,
            match=r"round_1: nothing to train on. sft: no conversation in samples; dpo: no pair in",
        ):
            run_rounds(
                tmp_path / "r",
                2,
                lambda n: skipping(calls, all_skipped=True),
                start(tmp_path),
                say=lambda line: None,
            )
    # Nothing was averaged or compared, and nothing done twice.
    assert [name for name, _ in calls] == ["sft", "dpo"]
    report = (tmp_path / "r/report.md").read_text()
    assert "| 1 | sft | skipped: no conversation in samples |" in report


def test_a_skipped_stage_makes_nothing(tmp_path):
    def both(context):
        return Result({"x": tmp_path}, skipped="no reason")

    with pytest.raises(RecipeError, match=r"stage a made \['x'\], not \[\]"):
        run_round(tmp_path, [Stage("a", (), ("x",), both)], {}, say=lambda line: None)
