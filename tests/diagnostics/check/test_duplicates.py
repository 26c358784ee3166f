"""Test rows that occur twice, nearly twice, and in both sets."""

import numpy as np

from sft_lightning.diagnostics.check.duplicates import RowDigests, check_duplicates, check_overlap


def digests_of(rows_of, texts, name="train"):
    rows, account, _ = rows_of(texts, name=name)
    digests = RowDigests(name, account.sources)
    digests.add(rows[:2])
    digests.add(rows[2:])
    return digests


def test_equal_rows_are_listed_with_the_first_one(rows_of, lines_of):
    texts = [("a", " 1"), ("b", " 1"), ("a", " 1"), ("a", " 2"), ("a", " 1"), ("A ", " 2"), ("ab", " 1"), ("b", "  1 ")]
    found = {finding.name: finding for finding in check_duplicates(digests_of(rows_of, texts))}
    assert set(found) == {"duplicate_rows", "near_duplicate_rows", "several_responses"}
    assert lines_of(found["duplicate_rows"]) == [(3, 1), (5, 1)]
    assert lines_of(found["near_duplicate_rows"]) == [(6, 4), (8, 2)]
    # Prompt a has the responses 1 and 2, once each beside the repeats; prompt b has two that differ in spaces.
    assert lines_of(found["several_responses"]) == [(1,), (2,)]
    assert found["several_responses"].severity == "info"
    assert "2 prompts have several responses, 4 rows together" in found["several_responses"].message


def test_rows_split_differently_are_not_equal(rows_of):
    assert check_duplicates(digests_of(rows_of, [("ab", "c"), ("a", "bc")])) == []


def test_overlap_lists_both_lines_and_compares_responses(rows_of, lines_of):
    train = digests_of(rows_of, [("x", " 1"), ("y", " 2"), ("z", " 3")])
    val = digests_of(rows_of, [("w", " 1"), ("Z  ", " 3"), ("x", " 9")], name="val")
    (finding,) = check_overlap(train, val)
    assert lines_of(finding) == [(2, 3), (3, 1)]
    assert [place.reason for place in finding.places] == ["same response", "another response"]
    assert finding.places[0].source.startswith(val.sources[0].removesuffix(":1"))
    assert finding.places[0].other == train.sources[2]
    assert finding.severity == "error"


def test_one_validation_row_of_hundreds_is_a_warning(rows_of):
    train = digests_of(rows_of, [("row 7", " 1")])
    val = digests_of(rows_of, [(f"row {number}", " 1") for number in range(200)], name="val")
    (finding,) = check_overlap(train, val)
    assert (finding.severity, finding.count) == ("warning", 1)


def test_disjoint_sets_do_not_overlap(rows_of):
    train, val = digests_of(rows_of, [("a", " 1")]), digests_of(rows_of, [("b", " 1"), ("0", " 1")], name="val")
    assert check_overlap(train, val) == []


def test_digests_keep_their_zeros(rows_of):
    digests = digests_of(rows_of, [(f"{number}", " 1") for number in range(600)])
    assert digests.of("row").dtype == np.dtype("S16")
    assert len(np.unique(digests.of("row"))) == 600
