"""What fields must be, and reasons of one short line for what they are not."""

import math

import pytest

from sft_lightning.data.fields import check_ground_truth, check_text, check_weight

deep = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize("value", ["a", " \u2028x", "\x00", "\U0001f600"])
def test_text_is_text(value):
    check_text("field 'prompt'", value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "field 'prompt' is missing"),
        (3, "field 'prompt' must be text, got int"),
        (deep, "field 'prompt' must be text, got list"),
        (" \n\u2028", "field 'prompt' is empty"),
        ("x\ud800", "field 'prompt' holds half a surrogate pair, which is no character: surrogates not allowed"),
    ],
)
def test_what_is_no_text(value, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        check_text("field 'prompt'", value)


@pytest.mark.parametrize("value", [0, 0.0, 1, 0.5, 1e308])
def test_weights(value):
    check_weight(value)


@pytest.mark.parametrize("value", [-1, -1e-9, math.inf, math.nan, 10**400, True, "1", None, deep, [1]])
def test_what_is_no_weight(value):
    with pytest.raises(ValueError, match=r"^field 'weight' must be a finite number, at least 0, got .{1,40}$"):
        check_weight(value)


@pytest.mark.parametrize("value", [None, "", "a", 3, -0.5, 10**400, [], ["a", 3]])
def test_ground_truths(value):
    check_ground_truth(value)


@pytest.mark.parametrize("value", [math.nan, -math.inf, True, {}, [None], [["a"]], ["a", math.inf], deep, [deep]])
def test_what_is_no_ground_truth(value):
    with pytest.raises(
        ValueError, match=r"^field 'ground_truth' must be text, a number or a list of those, got .{1,40}$"
    ):
        check_ground_truth(value)


@pytest.mark.parametrize("value", ["\ud800", ["a", "x\udfff"]])
def test_a_ground_truth_that_cannot_be_written_is_refused(value):
    with pytest.raises(ValueError, match=r"^field 'ground_truth' holds half a surrogate pair"):
        check_ground_truth(value)
