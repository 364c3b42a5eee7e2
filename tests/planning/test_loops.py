"""Trip counts against loops whose length is known by construction."""

import pytest
from jax import lax
from tpu_programs import analysis, compiled, module, on_one

from llama_jax.planning.loops import LoopError, trip_count
from llama_jax.planning.program_text import parse

STATE = "(s32[], s32[])"


def loop(*, start="0", bound="10", step="1", direction="LT", change="add", carried=False):
    """A loop over (counter, bound); `carried` reads the bound from the state."""
    limit = "get-tuple-element(%q), index=1" if carried else f"constant({bound})"
    return module(
        f"""%body (p: {STATE}) -> {STATE} {{
  %p = {STATE} parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %n = s32[]{{:T(128)}} get-tuple-element(%p), index=1
  %step = s32[]{{:T(128)}} constant({step})
  %next = s32[]{{:T(128)}} {change}(%i, %step)
  ROOT %t = {STATE} tuple(%next, %n)
}}""",
        f"""%condition (q: {STATE}) -> pred[] {{
  %q = {STATE} parameter(0)
  %j = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  %limit = s32[]{{:T(128)}} {limit}
  ROOT %more = pred[]{{:T(512)}} compare(%j, %limit), direction={direction}
}}""",
        f"""ENTRY %main (n: s32[]) -> {STATE} {{
  %n.1 = s32[]{{:T(128)}} parameter(0)
  %start = s32[]{{:T(128)}} constant({start})
  %copy = s32[]{{:T(128)}} copy(%start)
  %bound = s32[]{{:T(128)}} constant({bound})
  %init = {STATE} tuple(%copy, %bound)
  ROOT %while.3 = {STATE} while(%init), condition=%condition, body=%body
}}""",
    )


def trips(text, name="while.3", where="main"):
    program = parse(text)
    computation = program.computations[where]
    return trip_count(program, computation, computation.instructions[name])


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 10),
        ({"start": "3"}, 7),
        ({"step": "2", "bound": "11"}, 6),
        ({"step": "3", "direction": "LE"}, 4),
        ({"start": "9", "bound": "0", "step": "-1", "direction": "GT"}, 9),
        ({"start": "9", "bound": "0", "change": "subtract", "direction": "GE"}, 10),
        ({"bound": "16", "start": "1", "step": "2", "change": "multiply"}, 4),
        ({"direction": "NE", "carried": True}, 10),
        ({"start": "12"}, 0),
    ],
)
def test_a_counter_is_followed_whatever_its_start_step_and_direction(options, count):
    assert trips(loop(**options)) == count


def test_a_trip_count_that_the_text_knows_is_taken():
    known = 'body=%body, backend_config={"known_trip_count":{"n":"77"},"flag_configs":[]}'
    assert trips(loop().replace("body=%body", known)) == 77


def test_a_bound_from_an_argument_is_an_error_that_names_the_loop():
    text = loop(carried=True).replace("tuple(%copy, %bound)", "tuple(%copy, %n.1)")
    with pytest.raises(LoopError, match=r"loop while\.3 in main: .*parameter 0"):
        trips(text)


def test_a_loop_that_never_ends_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr("llama_jax.planning.loops.MAX_TRIPS", 50)
    with pytest.raises(LoopError, match="more than 50 trips"):
        trips(loop(step="0"))


NESTED = """%inner_body (p: (s32[], s32[])) -> (s32[], s32[]) {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}

%inner_condition (q: (s32[], s32[])) -> pred[] {
  %q = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %m = s32[] get-tuple-element(%q), index=1
  ROOT %less = pred[] fusion(%j, %m), kind=kLoop, calls=%less_than
}

%less_than (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}

%outer_body (o: (s32[], s32[])) -> (s32[], s32[]) {
  %o = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%o), index=0
  %width = s32[] get-tuple-element(%o), index=1
  %zero = s32[] constant(0)
  %init = (s32[], s32[]) tuple(%zero, %BOUND)
  %inner = (s32[], s32[]) while(%init), condition=%inner_condition, body=%inner_body
  %one.1 = s32[] constant(1)
  %next.1 = s32[] add(%k, %one.1)
  ROOT %t.1 = (s32[], s32[]) tuple(%next.1, %width)
}

%outer_condition (r: (s32[], s32[])) -> pred[] {
  %r = (s32[], s32[]) parameter(0)
  %l = s32[] get-tuple-element(%r), index=0
  %four = s32[] constant(4)
  ROOT %d = pred[] compare(%l, %four), direction=LT
}

ENTRY %main (x: s32[]) -> (s32[], s32[]) {
  %x = s32[] parameter(0)
  %zero.1 = s32[] constant(0)
  %seven = s32[] constant(7)
  %init.1 = (s32[], s32[]) tuple(%zero.1, %seven)
  ROOT %outer = (s32[], s32[]) while(%init.1), condition=%outer_condition, body=%outer_body
}
"""


def test_an_inner_loops_bound_is_found_in_the_state_that_an_outer_loop_hands_on():
    assert trips(NESTED.replace("%BOUND", "%width"), "inner", "outer_body") == 7


def test_an_inner_loop_that_grows_with_the_outer_is_an_error():
    with pytest.raises(LoopError, match=r"loop inner in outer_body: .*enclosing loop outer"):
        trips(NESTED.replace("%BOUND", "%k"), "inner", "outer_body")


def test_the_compilers_own_loops_have_the_length_they_were_written_with():
    def steps_of_two(x, w):
        def nested(c, w):
            return lax.fori_loop(0, 5, lambda i, c: c @ w, c), None

        x = lax.while_loop(lambda s: s[0] < 12, lambda s: (s[0] + 2, s[1] @ w[0]), (1, x))[1]
        return lax.scan(nested, x, w)[0]

    text = compiled(steps_of_two, on_one(128, 256), on_one(3, 256, 256)).as_text()
    assert sorted(analysis(text).loops.values()) == [3, 5, 6]
