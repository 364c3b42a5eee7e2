"""Sampling, scoring and criticising as stages: what training reads, made by the newest model.

`conversations` and `preferences` are folders of JSON lines, a file a round.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config.loading import to_table
from llama_jax.recipes.fingerprints import path_fingerprint
from llama_jax.recipes.settings import RoundsConfig
from llama_jax.recipes.stages import Context, Result, Say, Stage
from llama_jax.synthesis.correcting import FOLDER
from llama_jax.synthesis.journal import write_lines
from llama_jax.synthesis.opening import scorer_opener
from llama_jax.synthesis.prompts import Prompt, read_prompts
from llama_jax.synthesis.rejection import (
    CONVERSATIONS,
    PREFERENCES,
    SAMPLES,
    SCORES,
    score_and_select,
)
from llama_jax.synthesis.running import correct, draw
from llama_jax.synthesis.sampling import Progress
from llama_jax.synthesis.scoring import Scorer
from llama_jax.synthesis.settings import CriticTable, ModelTable, OpeningTable


def sample_stage(config: RoundsConfig, number: int) -> Stage:
    """K samples of each prompt from the newest model: `samples`."""
    table = config.sample
    assert table is not None
    seeded = dataclasses.replace(table.draw, seed=config.seed + table.draw.seed + number)

    def run(context: Context) -> Result:
        prompts = prompts_of(context, config)
        model = model_table(context.inputs["model"], config.model)
        draw(model, seeded.drawing(table.k), prompts, context.folder, telling(context.say))
        return Result(
            {"samples": context.folder / SAMPLES}, {"prompts": len(prompts), "k": table.k}
        )

    settings = {"k": table.k, "draw": to_table(seeded), **_shared(config)}
    return Stage("sample", ("model", "prompts"), ("samples",), run, settings=settings)


def score_stage(config: RoundsConfig, number: int) -> Stage:
    """Scores and verdicts, the best answers as `conversations`, pairs as `preferences`."""
    table = config.score
    assert table is not None

    def run(context: Context) -> Result:
        folder = context.folder / "scored"
        folder.mkdir(exist_ok=True)
        _copy(context.inputs["samples"], folder / SAMPLES)
        selection = score_and_select(
            prompts_of(context, config),
            folder,
            open_scorer=newest_scorer(context, config) if table.use_reward else None,
            verifiers=table.verifiers,
            keeping=table.keep.keeping(),
            progress=telling(context.say),
        )
        outputs = {"scored": folder, **_gathered(context, config, number, folder)}
        return Result(outputs, selection.figures)

    uses = ("reward_model",) if table.use_reward else ()
    needs = ("samples", "prompts")
    if table.use_reward and not table.verifiers:
        # Nothing else says what is good.
        needs, uses = (*needs, *uses), ()
    return Stage(
        "score",
        needs,
        ("scored", "conversations", "preferences"),
        run,
        uses=(*uses, *(("conversations",) if table.keep_earlier else ())),
        stays=("conversations",),
        settings={"score": to_table(table), **_shared(config)},
    )


def critic_stage(config: RoundsConfig, number: int) -> Stage:
    """Poor answers corrected, beside what `score` kept."""
    table, score = config.critic, config.score
    assert table is not None

    def run(context: Context) -> Result:
        folder = context.folder / "scored"
        folder.mkdir(exist_ok=True)
        for name in (SAMPLES, SCORES):
            _copy(context.inputs["scored"] / name, folder / name)
        reward = _reward_table(context, config) if score and score.use_reward else None
        done = correct(
            table,
            model_table(context.inputs["model"], config.model),
            prompts_of(context, config),
            folder,
            open_scorer=scorer_opener(reward),
            verifiers=score.verifiers if score else (),
            told=telling(context.say),
        )
        return Result(_with_corrections(context, number, folder / FOLDER), done.to_json())

    return Stage(
        "critic",
        ("scored", "prompts", "model", "conversations", "preferences"),
        ("conversations", "preferences"),
        run,
        uses=("reward_model",),
        # They are those of `score` then.
        stays=("conversations", "preferences"),
        settings={"critic": to_table(table), **_read_files(table), **_shared(config)},
    )


def prompts_of(context: Context, config: RoundsConfig, name: str = "prompts") -> list[Prompt]:
    """The prompts of an artifact."""
    return read_prompts(context.inputs[name], system=config.system)


def model_table(path: Path, opening: OpeningTable) -> ModelTable:
    """A model of the rounds, opened as their file says."""
    return ModelTable(path=str(path), **vars(opening))


def newest_scorer(context: Context, config: RoundsConfig) -> Callable[[], Scorer] | None:
    """What opens the newest reward model; None where there is none yet."""
    return scorer_opener(_reward_table(context, config))


def telling(say: Say) -> Callable[[str], Progress]:
    """Progress as lines, a tenth at a time."""

    def told(stage: str) -> Progress:
        tenths = [0]

        def progress(done: int, total: int) -> None:
            if done * 10 // total > tenths[0]:
                tenths[0] = done * 10 // total
                say(f"{stage}: {done} of {total}")

        return progress

    return told


def _reward_table(context: Context, config: RoundsConfig) -> ModelTable | None:
    path = context.inputs.get("reward_model")
    return None if path is None else model_table(path, config.model)


def _read_files(table: CriticTable) -> dict[str, str]:
    """Fingerprints of what people wrote for a critic, who may write more of it."""
    files = {"edits": table.edits, "template": table.template}
    return {name: path_fingerprint(Path(file)) for name, file in files.items() if file is not None}


def _shared(config: RoundsConfig) -> dict[str, Any]:
    """What every stage that opens models depends on."""
    return {"model": to_table(config.model), "system": config.system}


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    if not target.exists():
        temporary = target.with_name(f".{target.name}.new")
        shutil.copyfile(source, temporary)
        temporary.replace(target)


def _gathered(context: Context, config: RoundsConfig, number: int, scored: Path) -> dict[str, Path]:
    """This round's file in a folder of each kind, with the earlier ones where they are kept."""
    conversations, preferences = (_fresh(context.folder / name) for name in _KINDS)
    earlier = context.inputs.get("conversations")
    if earlier is not None and config.score is not None and config.score.keep_earlier:
        shutil.copytree(earlier, conversations, dirs_exist_ok=True)
    shutil.copyfile(scored / CONVERSATIONS, conversations / f"round_{number}.jsonl")
    shutil.copyfile(scored / PREFERENCES, preferences / f"round_{number}.jsonl")
    return {"conversations": conversations, "preferences": preferences}


_KINDS = ("conversations", "preferences")


def _with_corrections(context: Context, number: int, corrected: Path) -> dict[str, Path]:
    conversations, preferences = (_fresh(context.folder / name) for name in _KINDS)
    shutil.copytree(context.inputs["conversations"], conversations, dirs_exist_ok=True)
    shutil.copytree(context.inputs["preferences"], preferences, dirs_exist_ok=True)
    name = f"round_{number}_critic.jsonl"
    shutil.copyfile(corrected / CONVERSATIONS, conversations / name)
    shutil.copyfile(corrected / PREFERENCES, preferences / name)
    # An edited record holds the pair that the samples alone made.
    edited = {_prompt(r) for r in _lines(preferences / name) if "edited" in r}
    own = preferences / f"round_{number}.jsonl"
    kept = [record for record in _lines(own) if _prompt(record) not in edited]
    write_lines(own, iter(kept))
    return {"conversations": conversations, "preferences": preferences}


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _lines(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _prompt(record: dict[str, Any]) -> int:
    return record["provenance"]["prompt"]
