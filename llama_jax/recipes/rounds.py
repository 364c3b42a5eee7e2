"""Rounds of stages in a folder: each stage recorded with what it read and wrote, and done once.

ROUNDS/round_1/1_sft/   the stage's own folder; `stage.json` in it says that it is done
ROUNDS/report.json      the figures of all stages of all rounds that are done, ROUNDS/report.md too

A killed call goes on where it stopped: stages that are done are passed over, one that was begun is
called again. Both hold only while inputs and settings are those of then; else it is an error. A
stage with nothing to work on is skipped, and so are those that need what it would have made.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama_jax.config.loading import ConfigError, nearest
from llama_jax.config.run_files import write_json
from llama_jax.recipes.fingerprints import RecipeError, path_fingerprint
from llama_jax.recipes.report import write_report
from llama_jax.recipes.stages import Context, Result, Say, Stage

DONE_FILE, BEGUN_FILE, LOCK_FILE = "stage.json", "begun.json", ".lock"
Artifacts = Mapping[str, Path]
# The stages of a round by its number, from 1.
MakeStages = Callable[[int], Sequence[Stage]]


def run_rounds(
    folder: Path,
    count: int,
    make_stages: MakeStages,
    artifacts: Artifacts,
    *,
    say: Say = print,
    between: Callable[[int, Artifacts], Artifacts] | None = None,
) -> Artifacts:
    """Run `count` rounds, each with what the one before left.

    Args:
      folder: of all rounds; another call may not be at work in it.
      count: how many.
      make_stages: of each round.
      artifacts: what there is at the beginning, such as `model` and `prompts`.
      say: told about each stage.
      between: what a round gets of what the one before left; all of it by default.

    Returns:
      The artifacts after the last round.

    Raises:
      ConfigError: a stage whose needs nothing makes; before anything is run.
      RecipeError: inputs or settings that have changed under a stage, a round that trained nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = {number: list(make_stages(number)) for number in range(1, count + 1)}
    _check_all(plans, artifacts, between)
    with _locked(folder):
        for number, stages in plans.items():
            _check_places(folder / f"round_{number}", stages)
        for number, stages in plans.items():
            if number > 1 and between is not None:
                artifacts = between(number, artifacts)
            say(f"round {number} of {count}")
            try:
                artifacts = run_round(folder / f"round_{number}", stages, artifacts, say=say)
            finally:
                write_report(folder, say)
    return artifacts


def run_round(
    folder: Path, stages: Sequence[Stage], artifacts: Artifacts, *, say: Say = print
) -> dict[str, Path]:
    """Run a round's stages in order; `artifacts` with what they made.

    Raises: as `run_rounds`.
    """
    check_stages(stages, artifacts)
    known, skipped = dict(artifacts), {}
    for place, stage in enumerate(stages, 1):
        own = folder / f"{place}_{stage.name}"
        inputs = {name: known[name] for name in (*stage.needs, *stage.uses) if name in known}
        made, reason = _run_stage(stage, own, inputs, say)
        if reason is not None:
            skipped[stage.name] = reason
            for name in set(stage.makes) - set(stage.stays):
                known.pop(name, None)
            _check_training(folder, stages, skipped)
        known |= made
    return known


def check_stages(stages: Sequence[Stage], artifacts: Artifacts) -> set[str]:
    """The names of all artifacts that there will be.

    Raises:
      ConfigError: two stages of one name, or one whose needs nothing makes.
    """
    names = [stage.name for stage in stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two stages are called '{twice[0]}'", key="stages")
    known = set(artifacts)
    for stage in stages:
        missing = [name for name in stage.needs if name not in known]
        if missing:
            raise ConfigError(
                f"needs '{missing[0]}', which no stage before it makes"
                f"{nearest(missing[0], sorted(known))}",
                key=f"stages.{stage.name}",
            )
        known |= set(stage.makes)
    return known


def _check_training(folder: Path, stages: Sequence[Stage], skipped: Mapping[str, str]) -> None:
    """Raise `RecipeError` where all stages that train were skipped: nothing can come of the round.

    Before what is left of it, for that would average and compare what was there.
    """
    names = [stage.name for stage in stages if stage.trains]
    if names and skipped.keys() >= set(names):
        reasons = "; ".join(f"{name}: {skipped[name]}" for name in names)
        raise RecipeError(f"{folder}: nothing to train on. {reasons}")


def _check_all(
    plans: Mapping[int, Sequence[Stage]],
    artifacts: Artifacts,
    between: Callable[[int, Artifacts], Artifacts] | None,
) -> None:
    known: dict[str, Path] = dict(artifacts)
    for number, stages in plans.items():
        if number > 1 and between is not None:
            known = dict(between(number, known))
        # Paths of what isn't there yet don't matter here.
        known = {name: known.get(name, Path()) for name in check_stages(stages, known)}


def _check_places(folder: Path, stages: Sequence[Stage]) -> None:
    """Raise `RecipeError` where a round was begun with other stages: reports would mix both."""
    own = {f"{place}_{stage.name}" for place, stage in enumerate(stages, 1)}
    others = sorted({path.parent.name for path in folder.glob(f"*/{BEGUN_FILE}")} - own)
    if others:
        raise RecipeError(
            f"{folder / others[0]}: is of rounds of other stages; run these in another folder, or "
            "remove that one and the stages after it"
        )


def _run_stage(
    stage: Stage, folder: Path, inputs: Mapping[str, Path], say: Say
) -> tuple[dict[str, Path], str | None]:
    """What it made, and why it was skipped if it was."""
    begun = {"settings": _plain(stage.settings), "inputs": _described(inputs)}
    done = _read(folder / DONE_FILE)
    if done is not None:
        _check_unchanged(done, begun, folder / DONE_FILE)
        outputs = {
            name: _moved(Path(entry["path"]), done, folder)
            for name, entry in done["outputs"].items()
        }
        _check_outputs(done["outputs"], outputs, folder)
        reason = done.get("skipped")
        say(f"{folder.name}: {f'skipped: {reason}' if reason else 'done already'}")
        return outputs, reason
    earlier = _read(folder / BEGUN_FILE)
    if earlier is not None:
        _check_unchanged(earlier, begun, folder / BEGUN_FILE)
    say(f"{folder.name}: {'goes on' if earlier else 'begins'}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BEGUN_FILE, begun)
    begun_s = time.perf_counter()
    missing = [name for name in stage.needs if name not in inputs]
    if missing:
        result = Result(skipped=f"there is no '{missing[0]}'; what makes it was skipped")
    else:
        result = stage.run(Context(folder, inputs, say))
    _check_made(stage, result)
    record = {
        "stage": stage.name,
        "folder": str(folder),
        **begun,
        "outputs": _described(result.outputs),
        "figures": _plain(result.figures),
        "seconds": time.perf_counter() - begun_s,
    }
    if result.skipped is not None:
        record["skipped"] = result.skipped
        say(f"{folder.name}: skipped: {result.skipped}")
    write_json(folder / DONE_FILE, record)
    return dict(result.outputs), result.skipped


def _described(paths: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    return {
        name: {"path": str(path), "fingerprint": path_fingerprint(path)}
        for name, path in paths.items()
    }


def _check_unchanged(old: Mapping[str, Any], new: Mapping[str, Any], record: Path) -> None:
    """What the record was made of against what there is now.

    Raises:
      RecipeError: naming the input or setting, and how to go on.
    """
    remedy = f"remove {record.parent} and the stages after it to do it again"
    for name in sorted(old["inputs"].keys() | new["inputs"].keys()):
        then, now = old["inputs"].get(name), new["inputs"].get(name)
        if then is None or now is None:
            change = "wasn't there" if then is None else "isn't there any more"
            raise RecipeError(f"{record}: input '{name}' {change}; {remedy}")
        if then["fingerprint"] != now["fingerprint"]:
            raise RecipeError(f"{record}: input '{name}' ({now['path']}) has changed; {remedy}")
    for name in sorted(old["settings"].keys() | new["settings"].keys()):
        then, now = old["settings"].get(name), new["settings"].get(name)
        if then != now:
            raise RecipeError(
                f"{record}: setting '{name}' was {_shown(then)}, is {_shown(now)}; {remedy}"
            )


def _moved(path: Path, done: Mapping[str, Any], folder: Path) -> Path:
    """Where an output is now: the rounds may be elsewhere, or named from another directory."""
    then = Path(done.get("folder", folder))
    return folder / path.relative_to(then) if path.is_relative_to(then) else path


def _check_outputs(
    recorded: Mapping[str, Mapping[str, str]], outputs: Mapping[str, Path], folder: Path
) -> None:
    for name, entry in recorded.items():
        path = outputs[name]
        if not path.exists() or path_fingerprint(path) != entry["fingerprint"]:
            what = "has changed" if path.exists() else "is gone"
            raise RecipeError(
                f"{path}: output '{name}' of {folder.name} {what}; remove {folder} and the stages "
                "after it to do it again"
            )


def _check_made(stage: Stage, result: Result) -> None:
    wanted = () if result.skipped is not None else stage.makes
    if set(result.outputs) != set(wanted):
        raise RecipeError(f"stage {stage.name} made {sorted(result.outputs)}, not {sorted(wanted)}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"{folder}: another process runs these rounds") from None
        yield


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(table)))


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
