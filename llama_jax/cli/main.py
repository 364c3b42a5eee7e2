"""`llama-jax VERB`: finds the verb, turns errors into one line and an exit code.

Exit codes: 0 success, 2 a bad argument or config, 1 a failure, 130 or 143 after a signal.
A verb's module is imported only when it is asked for, so `--help` stays quick.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from llama_jax import __version__
from llama_jax.config.loading import ConfigError, nearest
from llama_jax.training.local_tpu import quiet_absent_tpu

# verb: what it does, one line. The module is `llama_jax.cli.<verb>`.
VERBS = {
    "train": "train a model as a run's TOML file says; resumes by itself",
    "plan": "compile a run for TPUs that aren't there: does it fit, how fast, at what cost",
    "generate": "continue prompts with a model of any format",
    "chat": "talk with a model in the terminal",
    "sample": "rejection sampling: K samples a prompt, scored and verified, the best kept",
    "rounds": "post-training in rounds: sample, score, train, average, compare",
    "average": "average checkpoints of one architecture",
    "convert": "turn a checkpoint into another format, and compare their logits",
    "data": "turn text into tokenised shards; look into batches",
    "tokenizer": "train a vocabulary; encode and decode text",
    "doctor": "what this machine has: devices, versions, memory, and what is wrong",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the `llama-jax` command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"llama-jax {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        return _fail(f"unknown verb '{verb}'{nearest(verb, list(VERBS))}", 2)
    return _run(verb, rest)


def _run(verb: str, arguments: list[str]) -> int:
    # Before any verb loads JAX, which tries a TPU wherever libtpu is installed.
    quiet_absent_tpu()
    module = importlib.import_module(f"llama_jax.cli.{verb}")
    parser = argparse.ArgumentParser(
        prog=f"llama-jax {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    try:
        return module.run(parsed)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader went away (`| head`); keep the interpreter from flushing into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # Only a verb that may have several processes has loaded it.
        peers = sys.modules.get("llama_jax.training.peers")
        shown = error if peers is None else peers.explain(error)
        if parsed.debug:
            if peers is not None:
                traceback.print_exception(error)
                peers.leave(1)
            raise
        code = _fail(_one_line(shown), 2 if isinstance(error, ConfigError) else 1)
        if peers is not None:
            peers.leave(code)
        return code


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message; --debug shows where"
    known = isinstance(error, ConfigError) or type(error).__module__.startswith("llama_jax")
    return text if known else f"{type(error).__name__}: {text}"


def _fail(message: str, code: int) -> int:
    print(f"llama-jax: error: {message}", file=sys.stderr)
    return code


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    return (
        f"usage: llama-jax VERB ...\n\n{verbs}\n\n"
        "`llama-jax VERB --help` shows a verb's options with an example, e.g.\n"
        "  llama-jax train quickstart --run-dir runs/quickstart"
    )


if __name__ == "__main__":
    sys.exit(main())
