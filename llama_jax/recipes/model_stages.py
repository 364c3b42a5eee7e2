"""Averaging models and comparing them, as stages."""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError, to_table
from llama_jax.config.run import RunConfig
from llama_jax.evals.win_rate import Judge, Match, PassJudge, ScoreJudge, first_rate, judge_matches
from llama_jax.interchange.averaging import average
from llama_jax.interchange.averaging_greedy import HeldOutLoss
from llama_jax.interchange.conversion_options import Options
from llama_jax.recipes.data_stages import model_table, newest_scorer, prompts_of, telling
from llama_jax.recipes.run_artifacts import artifacts_of, resolved
from llama_jax.recipes.settings import CompareTable, JudgingRun, RoundsConfig
from llama_jax.recipes.stages import Context, Result, Stage
from llama_jax.synthesis.journal import write_lines
from llama_jax.synthesis.prompts import Prompt
from llama_jax.synthesis.rejection import SAMPLES
from llama_jax.synthesis.running import draw
from llama_jax.synthesis.scoring import conversation_of, read_samples
from llama_jax.synthesis.verdicts import all_passed, check_verifiers, verify
from llama_jax.tokenizers.chat import Message


def average_stage(config: RoundsConfig) -> Stage:
    """The mean of the models named becomes the newest."""
    table = config.average
    assert table is not None
    judge = None if table.greedy is None else _judge_of(table.greedy)
    needs, uses = (set(), set()) if judge is None else artifacts_of(judge)

    def run(context: Context) -> Result:
        paths = [context.inputs[name] for name in table.of]
        with _held_out_loss(judge, context, paths[0]) as held_out_loss:
            report = average(
                paths,
                context.folder / "averaged",
                weights=table.weights,
                held_out_loss=held_out_loss,
                # What a killed call left there is written again.
                options=Options(overwrite=True),
                said=context.say,
            )
        named = list(zip(table.of, report.ingredients, strict=True))
        figures: dict[str, Any] = {"shares": {name: each.weight for name, each in named}}
        if judge is not None:
            figures["losses"] = {name: each.trial.loss for name, each in named if each.trial}
            figures["loss"] = report.loss
        return Result({"model": context.folder / "averaged"}, figures)

    return Stage(
        "average",
        tuple(dict.fromkeys((*table.of, *sorted(needs)))),
        ("model",),
        run,
        uses=tuple(sorted(uses - needs - set(table.of))),
        stays=("model",),
        settings={**to_table(table), **({} if judge is None else {"judge": to_table(judge)})},
    )


def _judge_of(table: JudgingRun) -> RunConfig:
    """The run as a judge, which trains on nothing: what is held out is all of its data."""
    run = load_run_config(table.run, table.set)
    if not run.data.held_out:
        raise ConfigError("nothing is held out to choose by", key="average.greedy.run")
    return dataclasses.replace(run, data=dataclasses.replace(run.data, sources=run.data.held_out))


def _held_out_loss(
    judge: RunConfig | None, context: Context, path: Path
) -> AbstractContextManager[HeldOutLoss | None]:
    if judge is None:
        return nullcontext()
    # Here, not above: the module loads all that training does.
    from llama_jax.training.held_out_loss import opened_held_out_loss

    return opened_held_out_loss(resolved(judge, context.inputs), path, say=context.say)


def compare_stage(config: RoundsConfig, number: int) -> Stage:
    """The newest model's win rate over that of the last round (or the first)."""
    table = config.compare
    assert table is not None
    drawing = dataclasses.replace(table.draw, seed=config.seed + table.draw.seed)

    def run(context: Context) -> Result:
        prompts = prompts_of(context, config, "held_out")
        answers = [
            _answers(context, config, prompts, name, dataclasses.replace(table, draw=drawing))
            for name in ("model", table.against)
        ]
        matches = [
            Match(p.number, tuple(asked), a, b)
            for p, (asked, a), (_, b) in zip(prompts, *answers, strict=True)
        ]
        judge = _judge(context, config, table, prompts)
        rate, decisions = judge_matches(matches, judge, seed=config.seed)
        write_lines(
            context.folder / "decisions.jsonl",
            (
                {
                    **dataclasses.asdict(decision),
                    "a": match.a.content,
                    "b": match.b.content,
                }
                for match, decision in zip(matches, decisions, strict=True)
            ),
        )
        context.say(f"round {number} over {table.against}: {rate}")
        figures = {**rate.to_json(), "judge": judge.name, "first": first_rate(decisions)}
        return Result({}, figures)

    needs = ("model", table.against, "held_out")
    needs = (*needs, "reward_model") if table.judge == "reward" else needs
    settings: dict[str, Any] = {"compare": to_table(table), "seed": config.seed}
    settings |= {"model": to_table(config.model), "system": config.system}
    return Stage("compare", needs, (), run, settings=settings)


def _answers(
    context: Context,
    config: RoundsConfig,
    prompts: Sequence[Prompt],
    name: str,
    table: CompareTable,
) -> list[tuple[Sequence[Message], Message]]:
    """What was asked and one model's answer to it."""
    folder = context.folder / ("a" if name == "model" else "b")
    model = model_table(context.inputs[name], config.model)
    draw(model, table.draw.drawing(1), prompts, folder, telling(context.say))
    _, records = read_samples(folder / SAMPLES, prompts)
    conversations = [conversation_of(record, record["responses"][0]) for record in records]
    return [(conversation[:-1], conversation[-1]) for conversation in conversations]


def _judge(
    context: Context, config: RoundsConfig, table: CompareTable, prompts: Sequence[Prompt]
) -> Judge:
    if table.judge == "reward":
        open_scorer = newest_scorer(context, config)
        assert open_scorer is not None
        scorer = open_scorer()
        return ScoreJudge(scorer, scorer.name, table.margin)
    verifiers = table.verifiers
    if verifiers is None:
        verifiers = config.score.verifiers if config.score else ()
    check_verifiers(verifiers, prompts)

    def passes(number: int, answer: Message) -> bool:
        return bool(all_passed(verify(verifiers, prompts[number], answer.content)))

    return PassJudge(passes, "+".join(verifier.name for verifier in verifiers))
