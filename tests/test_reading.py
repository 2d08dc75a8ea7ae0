"""JSON that others wrote: what is of the kind comes back, and all else is refused in one sentence that names it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from surgery.tables import DEEPEST, LARGEST, json_of, read_json

ROW = {"name": str, "share": float, "count": int, "sizes": {str: [int]}, "items?": [float], "more?": object}
GOOD = {"name": "a", "share": 0.5, "count": 3, "sizes": {"x": [1, 2], "y": []}}
HUGE = 10**400
WRONG = {
    "name": [None, 3, [], {}, True],
    "share": [None, "1", [], True, float("nan"), float("inf"), HUGE, -HUGE],
    "count": [None, "1", 1.0, 2.5, True, -1, HUGE, 1 << 63],
    "sizes": [None, [], 3, {"x": 3}, {"x": [1.0]}, {"x": [1, None]}, {"x": {}}],
    "items": [None, {}, "ab", [None], ["a"], [float("nan")]],
}


def refused(text: str | bytes, kind: Any = object) -> str:
    with pytest.raises(ValueError, match=r"^\S") as caught:
        json_of(text, "some.json", kind)
    said = str(caught.value)
    assert said.startswith("some.json")
    assert "\n" not in said
    assert len(said) < 300
    return said


@pytest.mark.parametrize("more", [{}, {"items": [1, 2.5, -3]}, {"more": [None, {"a": -1}]}, {"unknown": None}])
def test_what_is_of_the_kind_comes_back_as_it_is(more: dict[str, Any]) -> None:
    text = json.dumps({**GOOD, **more})
    assert json_of(text, "some.json", ROW) == json_of(text.encode(), "some.json", ROW) == {**GOOD, **more}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_of_another_kind_is_refused_by_its_name(name: str, value: Any) -> None:
    assert f'"{name}"' in refused(json.dumps({**GOOD, name: value}), ROW)


@pytest.mark.parametrize("name", list(GOOD))
def test_what_is_missing_is_named(name: str) -> None:
    assert f'"{name}" is missing' in refused(json.dumps({key: GOOD[key] for key in GOOD if key != name}), ROW)


@pytest.mark.parametrize("value", [None, 3, "a", [], [GOOD]])
def test_the_whole_may_be_of_another_kind(value: Any) -> None:
    assert "expected an object" in refused(json.dumps(value), ROW)


@pytest.mark.parametrize(
    "text",
    ["", "{", "nothing", b"\xff", b"\xef\xbb\xbf{}", '"\\ud800"', '{"\\udfff": 1}', b'"\xed\xa0\x80"', "9" * 5000],
)
def test_what_is_no_json(text: str | bytes) -> None:
    assert refused(text).startswith("some.json is not JSON: ")


@pytest.mark.parametrize("pair", ["[]", ('{"a":', "}")])
def test_it_may_be_so_deep_and_no_deeper(pair: Any) -> None:
    left, right = pair
    for depth in (1, DEEPEST - 1):
        json_of(left * depth + "1" * (left != "[") + right * depth, "some.json")
    for depth in (DEEPEST + 1, 900, 100_000):
        said = refused(left * depth + "1" * (left != "[") + right * depth)
        assert "levels deep" in said or "recursion" in said


def test_it_may_be_so_large_and_no_larger(tmp_path: Any) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b" " * (LARGEST - 2) + b"]")
    assert read_json(path) == []
    path.write_bytes(b"[" + b" " * (LARGEST - 1) + b"]")
    with pytest.raises(ValueError, match=r"a\.json is too large"):
        read_json(path)


def test_a_long_list_takes_no_long_time() -> None:
    start = time.process_time()
    assert len(json_of(json.dumps(list(range(300_000))), "some.json", [int])) == 300_000
    assert time.process_time() - start < 5
