"""Rules make identifiers and URLs of values, and say what is missing."""

from typing import Any

import pytest

from pipeline.templates import Unfilled, check, fill, names


@pytest.mark.parametrize(
    "rule", ["{id}", "{folder}:{image_path}", "https://a/{url:multimedia_commons_path}.jpg"]
)
def test_a_rule_is_one(rule: str) -> None:
    assert check(rule) == rule


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("same", "'same' is no rule: it needs a {name}"),
        ("", "is no rule"),
        ("{a.b}", "is no rule"),
        ("{id}:{url", "each brace its other one"),
        ("{id}}", "each brace its other one"),
        ("{url:foo}", "asks for foo; there is multimedia_commons_path"),
    ],
)
def test_another_text_is_none(rule: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(rule)
    assert message in str(caught.value)


def test_values_take_the_place_of_their_names() -> None:
    assert fill("{folder}:{n}", {"folder": "a/b", "n": 7}) == "a/b:7"
    assert fill("{a}{a}-{b}", {"a": "{b}", "b": 1.5}) == "{b}{b}-1.5"
    assert names("{folder}:{url:multimedia_commons_path}") == {"folder", "url"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "it has no 'id'"),
        ({"id": None}, "its id is null"),
        ({"id": {"a": 1}}, "its id is a dict, neither a text nor a number"),
        ({"id": True}, "its id is a bool"),
        ({"id": b"a"}, "its id is a bytes"),
        ({"id": ""}, "{id} gives nothing"),
    ],
)
def test_what_cannot_stand_in_a_text_is_said(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Unfilled) as caught:
        fill("{id}", values)
    assert message in str(caught.value)
