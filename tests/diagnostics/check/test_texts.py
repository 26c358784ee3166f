"""Test the findings about characters and the boundary of prompt and response."""

from sft_lightning.diagnostics.check.texts import Texts


def findings_of(rows_of, texts):
    rows, account, _ = rows_of(texts)
    looked = Texts("train")
    looked.add(rows)
    return {finding.name: finding for finding in looked.findings(account.sources)}


def test_unwanted_characters_are_found_with_their_field(rows_of, lines_of):
    found = findings_of(
        rows_of,
        [("a", " b"), ("a\r\n", " b"), ("a", " \ufffd"), ("\x1b[2J", " \x07"), ("\ufeffa", " b"), ("\ta\n", " b")],
    )
    assert {name: lines_of(finding) for name, finding in found.items()} == {
        "carriage_returns": [(2,)],
        "replacement_characters": [(3,)],
        "control_characters": [(4,), (5,)],
    }
    assert found["control_characters"].places[0].reason == "prompt and response"
    assert found["replacement_characters"].places[0].reason == "response"


def test_unusual_white_space_between_prompt_and_response_is_found(rows_of, lines_of):
    texts = [("a:", " b")] * 10 + [("a: ", "b"), ("a:", "b")] + [("a:", " b")] * 10
    found = findings_of(rows_of, texts)
    assert lines_of(found["odd_borders"]) == [(11,), (12,)]
    assert [place.reason for place in found["odd_borders"].places] == ["after the prompt", "none"]
    assert found["odd_borders"].severity == "info"


def test_mixed_white_space_at_the_boundary_gives_no_finding(rows_of):
    assert findings_of(rows_of, [("a:", " b"), ("a: ", "b"), ("a:", "b")] * 3) == {}


def test_accents_and_other_scripts_give_no_finding(rows_of):
    assert findings_of(rows_of, [("na\u00efve \u00a0 \u4e2d\u6587 \U0001f600", " \u2013 \u221a2")]) == {}
