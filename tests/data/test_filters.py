import itertools

from sft_lightning.data.filters import filter_records
from sft_lightning.data.load_report import LoadReport
from sft_lightning.data.records import Record, SkippedRows


class EvenTruths:
    identity = "even"

    def __init__(self):
        self.chunks = []

    def faults(self, records):
        self.chunks.append(len(records))
        return [None if record.ground_truth % 2 == 0 else f"{record.ground_truth} is odd" for record in records]


def records(truths):
    return (Record("p", "r", truth, source=f"a:{line}") for line, truth in enumerate(truths, start=1))


def test_what_is_not_accepted_is_told_by_place_and_reason():
    load_report = LoadReport()
    kept = filter_records(records([2, None, 3, 4, None]), EvenTruths(), load_report)
    assert [record.source for record in kept] == ["a:1", "a:4"]
    assert load_report == LoadReport(
        ungraded_rows=SkippedRows(2, [("a:2", "no ground_truth"), ("a:5", "no ground_truth")]),
        rejected_rows=SkippedRows(1, [("a:3", "3 is odd")]),
    )


def test_zero_is_a_ground_truth():
    assert [record.ground_truth for record in filter_records(records([0]), EvenTruths(), LoadReport())] == [0]


def test_records_are_judged_in_chunks_as_they_are_asked_for():
    row_filter = EvenTruths()
    endless = filter_records(records(itertools.count()), row_filter, LoadReport())
    assert len(list(itertools.islice(endless, 600))) == 600
    assert row_filter.chunks == [1024, 1024]  # half of each is even
