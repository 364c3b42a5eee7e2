"""`--profile`: which steps are traced, and that the file holds them."""

import json
import subprocess
import sys

import pytest

from llama_jax.config.loading import ConfigError
from llama_jax.training.profiling import Profiler, ProfileRange


@pytest.mark.parametrize(
    ("text", "steps"), [("10:15", (10, 15)), (" 7 ", (7, 7)), ("1:1", (1, 1)), ("1:100", (1, 100))]
)
def test_a_range_is_two_steps_or_one(text, steps):
    found = ProfileRange.parse(text)
    assert (found.first, found.last) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10-15", "'10-15' is not of the form FIRST:LAST"),
        ("10:", "not of the form"),
        ("0:5", "the first step is 1"),
        ("15:10", "step 10 comes before step 15"),
        ("1:101", "101 steps; a trace of more than 100"),
    ],
)
def test_a_wrong_range_is_a_clear_error(text, message):
    with pytest.raises(ConfigError, match="--profile: ") as caught:
        ProfileRange.parse(text)
    assert message in str(caught.value)


def test_a_range_that_the_run_does_not_come_by_is_a_clear_error():
    ProfileRange(10, 15).check(steps=15, done=9)
    with pytest.raises(ConfigError, match="the run ends with step 14"):
        ProfileRange(10, 15).check(steps=14, done=0)
    with pytest.raises(ConfigError, match=r"goes on from step 12; the next one .* is 13"):
        ProfileRange(10, 15).check(steps=20, done=12)


# Traces are made and read in a process of their own: one that has compiled for TPUs that aren't
# there, as other tests do, can't trace (libtpu's part of the tracer crashes).
TRACE = """
import json, sys
from pathlib import Path

import jax
import jax.numpy as jnp

from llama_jax.training.profiling import Profiler, ProfileRange

folder, first, last, steps = Path(sys.argv[1]), *map(int, sys.argv[2:])
said = []
profiler = Profiler(ProfileRange(first, last), folder, said.append)
work = jax.jit(lambda x: x @ x)
x = jnp.ones((64, 64))
for step in range(1, steps + 1):
    profiler.before(step)
    with profiler.step(step):
        x = work(x) / 64
    profiler.after(step, x)
profiler.close()
print(json.dumps(said))
"""

# As XProf reads them: numbers of the trace's step events, and how many events there are.
READ = """
import json, sys
from pathlib import Path

import jax

(file,) = (Path(sys.argv[1]) / "profile").glob("plugins/profile/*/*.xplane.pb")
steps, events = [], 0
for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    for line in plane.lines:
        for event in line.events:
            events += 1
            if event.name == "train":
                steps.append(int(dict(event.stats)["step_num"]))
print(json.dumps([sorted(steps), events]))
"""


def in_a_process(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.short
def test_the_trace_holds_the_steps_of_the_range_and_their_work(tmp_path):
    (line,) = in_a_process(TRACE, tmp_path, 3, 5, 8)
    steps, events = in_a_process(READ, tmp_path)
    assert steps == [3, 4, 5]
    assert events > 20  # what the device did in them
    assert line.startswith(f"profile: {tmp_path}/profile/plugins/profile/")
    assert line.endswith(f"open it with: tensorboard --logdir {tmp_path}")


def test_a_run_that_ends_within_the_range_leaves_what_it_has(tmp_path):
    in_a_process(TRACE, tmp_path, 2, 9, 3)
    assert in_a_process(READ, tmp_path)[0] == [2, 3]


def test_without_a_range_nothing_is_traced(tmp_path):
    profiler = Profiler(None, tmp_path)
    profiler.before(1)
    with profiler.step(1):
        pass
    profiler.after(1, None)
    profiler.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_traces_the_steps_that_it_is_asked_for(tmp_path):
    settings = [
        "model.embed_dim=32", "model.mlp_dim=64", "data.seq_len=32", "training.steps=4",
        "schedule.warmup_steps=1", "training.sample_prompts=[]", "data.held_out=[]",
        "data.sources.0.text.max_bytes=20000", "metrics.progress=false",
    ]  # fmt: skip

    def run(profile):
        command = [sys.executable, "-m", "llama_jax.cli.main", "train", "tiny"]
        command += ["--run-dir", str(tmp_path), "--profile", profile]
        command += [part for setting in settings for part in ("--set", setting)]
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    past_the_end = run("3:5")
    assert past_the_end.returncode == 2
    assert "the run ends with step 4" in past_the_end.stderr
    done = run("2:3")
    assert done.returncode == 0, done.stderr
    assert "open it with: tensorboard --logdir" in done.stdout
    assert in_a_process(READ, tmp_path)[0] == [2, 3]
    # Of a run that is done nothing is left to trace.
    again = run("2:3")
    assert again.returncode == 2
    assert "goes on from step 4" in again.stderr
