"""X-Robots-Tag: several headers, lists, agents, and values with colons and commas in them."""

import pytest

from pipeline.opt_out import opted_out

HONOURED = {"noai", "noimageai"}


@pytest.mark.parametrize(
    ("headers", "directive"),
    [
        ([], None),
        ([""], None),
        (["noindex, nofollow"], None),
        (["noai"], "noai"),
        (["noindex", "NoImageAI"], "noimageai"),
        (["noindex,noai , nofollow"], "noai"),
        (["evenmix: noai"], "noai"),
        (["EvenMix :  noai"], "noai"),
        (["*: noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: noindex, noai"], None),
        (["otherbot: noindex, evenmix: noai"], "noai"),
        (["noai, otherbot: noindex"], "noai"),
        (["otherbot: noindex", "noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
        (["unavailable_after: 2030-06-25T15:00:00Z, noai"], "noai"),
        (["otherbot: unavailable_after: 2030-06-25T15:00:00Z, noai"], None),
        (["max-snippet: 20, max-image-preview: large, noai"], "noai"),
        (["noairports, xnoai"], None),
    ],
)
def test_what_binds_us(headers: list[str], directive: str | None) -> None:
    assert opted_out(headers, "evenmix", HONOURED) == directive


def test_what_is_honoured_is_configurable() -> None:
    assert opted_out(["noai"], "evenmix", set()) is None
    assert opted_out(["noindex"], "evenmix", {"noindex"}) == "noindex"
