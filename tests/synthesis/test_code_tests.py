"""Programs run apart: every way in which they end, what is kept from them, and real problems."""

import gzip
import json
import os
import subprocess
import time

import pytest

from llama_jax.synthesis import isolation
from llama_jax.synthesis.code_tests import CodeTests, code_of
from llama_jax.synthesis.isolation import Limits, can_isolate, run_apart
from llama_jax.synthesis.prompts import SynthesisError, make_prompts

# Two cores are shared by many; a limit that a program reaches by computing must be real.
QUICK = Limits(timeout_s=1.0, memory_mib=512)
ROOMY = Limits(timeout_s=20.0)

needs_namespaces = pytest.mark.skipif(not can_isolate(), reason="no user namespaces here")
pytestmark = needs_namespaces


@pytest.mark.parametrize(
    ("program", "ending", "detail"),
    [
        ("x = 1", "finished", "ran to its last line"),
        ("x = 1\nassert x == 2, 'so\\nnot'", "raised", "AssertionError: so not (line 2)"),
        ("def", "raised", "SyntaxError: invalid syntax (program.py, line 1)"),
        ("import sys\nsys.exit(0)", "ended_early", "sys.exit (line 2)"),
        (
            "import os; os._exit(0)",
            "ended_early",
            "the process ended before its last line",
        ),
        # Codes above 128 are a signal's only where there is such a signal.
        ("import os; os._exit(-1)", "ended_early", "the process ended before its last line"),
        ("import os; os._exit(200)", "ended_early", "the process ended before its last line"),
        ("import ctypes; ctypes.string_at(0)", "killed", "killed by SIGSEGV"),
        ("x = 'a' * 10**10", "out_of_memory", "out of memory"),
        ("input()", "raised", "EOFError: EOF when reading a line (line 1)"),
        (
            "open('big', 'wb').write(bytes(10**8))",
            "raised",
            "OSError: [Errno 27] File too large (line 1)",
        ),
    ],
)
def test_a_program_ends_as_it_does_and_says_so(program, ending, detail):
    execution = run_apart(program, ROOMY)
    assert (execution.ending, execution.detail) == (ending, detail)


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_a_program_without_end_is_ended(program):
    begun_s = time.monotonic()
    assert run_apart(program, QUICK).detail == "not done after 1 s"
    assert time.monotonic() - begun_s < 5.0


def test_the_network_is_not_there():
    program = "import socket\nsocket.create_connection(('127.0.0.1', 9), 2)"
    assert (
        run_apart(program, ROOMY).detail == "OSError: [Errno 101] Network is unreachable (line 2)"
    )


def test_neither_the_environment_nor_other_processes_are_there(monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    program = "import os\nassert 'A_SECRET' not in os.environ\nassert os.getpid() == 1"
    assert run_apart(program, ROOMY).ending == "finished"


def test_what_a_program_started_ends_with_it(tmp_path):
    mark = f"{os.getpid()}.125"
    program = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\n"
    assert run_apart(program, ROOMY).ending == "finished"
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert f"sleep {mark}" not in listed


def test_a_machine_without_namespaces_is_refused_unless_the_network_is_allowed(monkeypatch):
    monkeypatch.setattr(isolation, "can_isolate", lambda: False)
    with pytest.raises(SynthesisError, match="doesn't let a process give up its network"):
        run_apart("pass", ROOMY)
    assert run_apart("pass", Limits(timeout_s=20.0, network=True)).ending == "finished"


def test_code_is_what_the_fences_hold():
    assert code_of("x = 1") == "x = 1"
    assert code_of("Well:\n```python\nx = 1\n```\nand\n```\ny = 2\n```\n```bash\nls\n```") == (
        "x = 1\n\ny = 2\n"
    )


def verdict(tests, response, **reference):
    (prompt,) = make_prompts([{"prompt": "f", "tests": tests, **reference}])
    return CodeTests(limits=ROOMY)(prompt, response)


def test_a_verdict_has_the_error_as_its_reason():
    right = "```python\ndef f(x):\n    return x + 1\n```"
    assert verdict(["assert f(1) == 2"], right).to_json() == {
        "passed": True,
        "reason": "its tests pass",
    }
    wrong = verdict(["assert f(1) == 2", "assert f(1) == 3"], right)
    assert (wrong.passed, wrong.reason) == (False, "AssertionError (line 6)")
    quitting = verdict("assert f(1) == 3", "def f(x): return 1\nraise SystemExit")
    assert quitting.reason == "ended before its tests did: sys.exit (line 3)"


def test_what_stands_before_the_code_may_be_a_list_of_statements():
    before = ["import math", "one = 1"]
    assert verdict("assert f() == 3.0", "def f(): return math.sqrt(4) + one", before=before).passed
    (prompt,) = make_prompts([{"prompt": "f", "tests": "f()", "before": {"import": "math"}}])
    with pytest.raises(SynthesisError, match="prompt 1: 'before' is neither a text nor a list"):
        CodeTests().check(prompt)


@pytest.mark.parametrize("tests", [[], "", 3, [1]])
def test_tests_that_are_none_are_refused(tests):
    (prompt,) = make_prompts([{"prompt": "f", "tests": tests}])
    with pytest.raises(SynthesisError, match="prompt 1: 'tests' is neither a text nor a list"):
        CodeTests().check(prompt)


def problems(shared):
    with gzip.open(shared / "data" / "humaneval" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def humaneval(problem, completion):
    tests = f"{problem['test']}\ncheck({problem['entry_point']})"
    return verdict(tests, completion, before=problem["prompt"])


def test_a_solution_of_humaneval_passes_and_an_empty_one_does_not(shared):
    for problem in problems(shared)[:4]:
        solution = problem["canonical_solution"]
        # A completion goes on in the middle of a function, so the two are joined by a line's end.
        assert humaneval(problem, solution).passed
        assert not humaneval(problem, "    return None\n").passed


@pytest.mark.slow
def test_all_solutions_of_humaneval_pass(shared):
    assert sum(humaneval(p, p["canonical_solution"]).passed for p in problems(shared)) == 164
