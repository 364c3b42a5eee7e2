"""`--profile`: which steps are traced, and that the file holds them."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from llama_jax.config.files import load_run_config
from llama_jax.config.loading import ConfigError
from llama_jax.training.profiling import Profiler, ProfileRange
from llama_jax.training.run import train


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


def traced_steps(run_dir):
    """Step numbers of the trace's step events, as XProf reads them, and the number of all."""
    (file,) = (run_dir / "profile").glob("plugins/profile/*/*.xplane.pb")
    steps, events = [], 0
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                events += 1
                if event.name == "train":
                    steps.append(int(dict(event.stats)["step_num"]))
    return sorted(steps), events


def run_loop(profiler, steps):
    work = jax.jit(lambda x: x @ x)
    x = jnp.ones((64, 64))
    for step in range(1, steps + 1):
        profiler.before(step)
        with profiler.step(step):
            x = work(x) / 64
        profiler.after(step, x)
    profiler.close()


# Of jaxlib 0.12's reader on Python 3.12; as an error it would be thrown through C++.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type .* has no __module__")


@pytest.mark.short
def test_the_trace_holds_the_steps_of_the_range_and_their_work(tmp_path):
    said = []
    run_loop(Profiler(ProfileRange(3, 5), tmp_path, said.append), steps=8)
    steps, events = traced_steps(tmp_path)
    assert steps == [3, 4, 5]
    assert events > 20  # what the device did in them
    (line,) = said
    assert line.startswith(f"profile: {tmp_path}/profile/plugins/profile/")
    assert line.endswith(f"open it with: tensorboard --logdir {tmp_path}")


def test_a_run_that_ends_within_the_range_leaves_what_it_has(tmp_path):
    run_loop(Profiler(ProfileRange(2, 9), tmp_path, lambda line: None), steps=3)
    assert traced_steps(tmp_path)[0] == [2, 3]


def test_without_a_range_nothing_is_traced(tmp_path):
    run_loop(Profiler(None, tmp_path), steps=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_traces_the_steps_that_it_is_asked_for(tmp_path):
    settings = [
        "model.embed_dim=32", "model.mlp_dim=64", "data.seq_len=32", "training.steps=4",
        "schedule.warmup_steps=1", "training.sample_prompts=[]", "data.held_out=[]",
        "data.sources.0.text.max_bytes=20000", "metrics.progress=false",
    ]  # fmt: skip
    config = load_run_config("tiny", settings)
    text = io.StringIO()
    console = Console(file=text, width=200)
    with pytest.raises(ConfigError, match="the run ends with step 4"):
        train(config, tmp_path, console, profile=ProfileRange(3, 5))
    train(config, tmp_path, console, profile=ProfileRange(2, 3))
    steps, _ = traced_steps(tmp_path)
    assert steps == [2, 3]
    assert "open it with: tensorboard --logdir" in text.getvalue()
    # Of a run that is done nothing is left to trace.
    with pytest.raises(ConfigError, match="goes on from step 4"):
        train(config, tmp_path, console, profile=ProfileRange(2, 3))
