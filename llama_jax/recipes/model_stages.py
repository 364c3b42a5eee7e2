"""Averaging models and comparing them, as stages."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from llama_jax.config.loading import to_table
from llama_jax.evals.win_rate import Judge, Match, PassJudge, ScoreJudge, first_rate, judge_matches
from llama_jax.interchange.averaging import average
from llama_jax.interchange.conversion_options import Options
from llama_jax.recipes.data_stages import model_table, newest_scorer, prompts_of, telling
from llama_jax.recipes.settings import CompareTable, RoundsConfig
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

    def run(context: Context) -> Result:
        report = average(
            [context.inputs[name] for name in table.of],
            context.folder / "averaged",
            weights=table.weights,
            # What a killed call left there is written again.
            options=Options(overwrite=True),
        )
        shares = {
            name: each.weight for name, each in zip(table.of, report.ingredients, strict=True)
        }
        return Result({"model": context.folder / "averaged"}, {"shares": shares})

    needs = tuple(dict.fromkeys(table.of))
    return Stage("average", needs, ("model",), run, settings=to_table(table))


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
