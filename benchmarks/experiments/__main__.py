"""What the stages of post-training do to a small model, with figures on what they were not shown.

    python benchmarks/experiments sft --checkpoint DIR --gsm8k DIR
    python benchmarks/experiments reward --checkpoint DIR --gsm8k DIR
    python benchmarks/experiments preference --checkpoint DIR
    python benchmarks/experiments distill --checkpoint DIR --gsm8k DIR

DIR of --checkpoint is any that `llama-jax convert` reads; docs/results has SmolLM2-135M-Instruct's,
made with the defaults, distillation with --teacher from the first seed of sft. --gsm8k is a folder
with train_first2500.jsonl, test.jsonl and model_solutions_first500.jsonl of
openai/grade-school-math. Each experiment writes NAME.json, NAME.md and NAME.png into --out; runs
stay in --work, and a call that was killed goes on from them. With other settings it refuses to:
name another folder then.
"""

import argparse
from pathlib import Path

import distill
import preference
import reward
import sft
from reports import Report
from runs import Setup

EXPERIMENTS = {"sft": sft, "reward": reward, "preference": preference, "distill": distill}


def main() -> None:
    """One experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, module in EXPERIMENTS.items():
        verb = verbs.add_parser(
            name,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("--checkpoint", required=True, help="the model it starts from")
        verb.add_argument("--out", type=Path, default=Path("docs/results"))
        verb.add_argument("--work", type=Path, default=Path("runs/experiments"))
        verb.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
        verb.add_argument("--batch-size", type=int, default=module.BATCH_SIZE, help="rows a step")
        module.add_arguments(verb)
    arguments = parser.parse_args()
    setup = Setup(
        arguments.checkpoint,
        arguments.work / arguments.experiment,
        tuple(arguments.seeds),
        arguments.batch_size,
    )
    report = Report(arguments.experiment, arguments.out, vars(arguments))
    EXPERIMENTS[arguments.experiment].run(setup, arguments, report)
    report.write()


if __name__ == "__main__":
    main()
