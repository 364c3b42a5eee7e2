"""Strict loading: every mistake is one line that names source, key and the nearest right name."""

import dataclasses
import tomllib
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.config.loading import (
    ConfigError,
    Range,
    apply_overrides,
    check_ranges,
    fingerprint,
    from_table,
    read_toml,
    to_table,
    to_toml,
)

pytestmark = pytest.mark.short


@dataclasses.dataclass(frozen=True)
class Circle:
    radius: Annotated[float, Range(above=0)]
    kind: Literal["circle"] = "circle"

    def __post_init__(self):
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Square:
    side: int = 1
    kind: Literal["square"] = "square"


@dataclasses.dataclass(frozen=True)
class Drawing:
    shape: Circle | Square
    title: str = "untitled"
    colour: Literal["red", "green"] = "red"
    points: tuple[Square, ...] = ()
    limit: Annotated[int, Range(at_least=1)] | None = None
    visible: bool = True

    def __post_init__(self):
        check_ranges(self)


def message(table):
    with pytest.raises(ConfigError) as caught:
        from_table(Drawing, table, "drawing.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


GOOD = {"shape": {"kind": "circle", "radius": 2}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"titel": "x"}, "drawing.toml: titel: unknown key (did you mean 'title'?)"),
        (
            {"shape": {"kind": "circle", "radios": 2.0}},
            "drawing.toml: shape.radios: unknown key (did you mean 'radius'?)",
        ),
        ({"shape": {"kind": "circle"}}, "drawing.toml: shape.radius: missing key"),
        ({"shape": {}}, "drawing.toml: shape.kind: missing key; one of circle, square"),
        (
            {"shape": {"kind": "squar"}},
            "drawing.toml: shape.kind: unknown kind 'squar' (did you mean 'square'?)",
        ),
        (
            {"shape": {"kind": "circle", "radius": 0}},
            "drawing.toml: shape.radius: 0.0 must be above 0",
        ),
        (
            {"shape": {"kind": "circle", "radius": float("nan")}},
            "drawing.toml: shape.radius: nan is not finite",
        ),
        (
            {"colour": "reed"},
            "drawing.toml: colour: unknown value 'reed' (did you mean 'red'?)",
        ),
        (
            {"points": [{}, {"side": "1"}]},
            "drawing.toml: points.1.side: expected an integer, got the string '1'",
        ),
        ({"points": {}}, "drawing.toml: points: expected a list, got a table"),
        ({"limit": 0}, "drawing.toml: limit: 0 is below the least allowed, 1"),
        ({"limit": 1.5}, "drawing.toml: limit: expected an integer, got the float 1.5"),
        ({"limit": True}, "drawing.toml: limit: expected an integer, got the boolean True"),
        ({"visible": 1}, "drawing.toml: visible: expected true or false, got the int 1"),
        ({"shape": 3}, "drawing.toml: shape: expected a table, got the int"),
    ],
)
def test_a_mistake_is_one_line_naming_file_key_and_nearest_name(change, expected):
    assert message({**GOOD, **change}) == expected


def test_a_missing_table_is_named():
    assert message({}) == "drawing.toml: shape: missing key"


def test_an_integer_is_taken_where_a_number_is_wanted():
    assert from_table(Drawing, GOOD, "x").shape == Circle(2.0)


def test_bounds_hold_for_python_callers_too():
    with pytest.raises(ConfigError, match="radius"):
        Circle(-1.0)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("a.b=1e-3", ("a", "b"), 1e-3),
        ("a.b=true", ("a", "b"), True),
        ("a.new.c=[1, 2]", ("a", "new", "c"), [1, 2]),
        ('name="no"', ("name",), "no"),
        ("name=no", ("name",), "no"),
        ("name=a=b", ("name",), "a=b"),
        ("items.1.x=7", ("items", 1, "x"), 7),
    ],
)
def test_set_takes_toml_values(override, path, value):
    table = {"a": {"b": 0}, "items": [{"x": 0}, {"x": 1}]}
    result = apply_overrides(table, [override])
    for key in path:
        result = result[key]
    assert result == value
    assert type(result) is type(value)
    assert table == {"a": {"b": 0}, "items": [{"x": 0}, {"x": 1}]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b", "'a.b' is not of the form key=value"),
        ("=1", "'=1' is not of the form key=value"),
        ("a.b.c.d=1", "--set: a.b.c: its parent is not a table"),
        ("items.5.x=1", "--set: items.5: '5' is not an item number below 1"),
    ],
)
def test_a_bad_override_is_named(override, expected):
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": {"b": 0}, "items": [{}]}, [override])
    assert expected in str(caught.value)


def test_a_malformed_file_names_its_line(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("a = 1\nb = \n")
    with pytest.raises(ConfigError, match=r"bad\.toml: .*line 2"):
        read_toml(path)
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        read_toml(tmp_path / "absent.toml")


@settings(deadline=None)
@given(
    st.builds(
        Drawing,
        shape=st.builds(Circle, radius=st.floats(min_value=1e-300, allow_infinity=False)),
        title=st.text(st.characters(exclude_categories=["Cs"])),
        points=st.lists(st.builds(Square, side=st.integers())).map(tuple),
        limit=st.none() | st.integers(min_value=1),
        visible=st.booleans(),
    )
)
def test_what_is_written_reads_back_the_same(drawing):
    text = to_toml(to_table(drawing))
    assert from_table(Drawing, tomllib.loads(text), "again") == drawing


def test_the_fingerprint_changes_with_any_field_and_with_nothing_else():
    base = Drawing(shape=Circle(1.0))
    changed = [
        Drawing(shape=Circle(2.0)),
        Drawing(shape=Square()),
        Drawing(shape=Circle(1.0), title="x"),
        Drawing(shape=Circle(1.0), limit=3),
        Drawing(shape=Circle(1.0), points=(Square(),)),
    ]
    marks = {fingerprint(d) for d in [base, *changed]}
    assert len(marks) == 6
    assert fingerprint(base) == fingerprint(Drawing(shape=Circle(1.0)))
