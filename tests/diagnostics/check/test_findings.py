"""Test findings as dicts, and the share of rows above which they are errors."""

import pytest

from sft_lightning.diagnostics.check.findings import Finding, Place, by_share


def test_a_finding_as_dict_has_all_places_without_empty_fields():
    finding = Finding("twice", "warning", "m", "f", 2, [Place("a:1", "a:2"), Place("a:3", reason="why")])
    assert finding.as_dict() == {
        "name": "twice",
        "severity": "warning",
        "message": "m",
        "fix": "f",
        "count": 2,
        "places": [{"source": "a:1", "other": "a:2"}, {"source": "a:3", "reason": "why"}],
    }


@pytest.mark.parametrize(("count", "severity"), [(1, "warning"), (10, "warning"), (11, "error")])
def test_more_than_one_in_a_hundred_rows_is_an_error(count, severity):
    assert by_share(count, 1000) == severity
