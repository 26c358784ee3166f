"""Test that line ends and byte-order marks are found by file and line."""

from sft_lightning.diagnostics.check.files import check_files


def test_crlf_lines_and_byte_order_marks_are_located(tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\n{"a": 3}\r\n')
    two.write_bytes(b'{"a": 4}\n')
    mark, ends = check_files("train", [one, two])
    assert (mark.name, mark.severity, [place.source for place in mark.places]) == (
        "byte_order_mark",
        "info",
        [f"{one}:1"],
    )
    assert (ends.name, ends.count, [place.source for place in ends.places]) == (
        "crlf_line_ends",
        2,
        [f"{one}:1", f"{one}:3"],
    )
    assert "2 of 4 lines" in ends.message


def test_plain_lines_and_an_inner_bom_give_no_finding(tmp_path):
    file = tmp_path / "plain.jsonl"
    file.write_bytes(b'{"a": "\\r\\n"}\n{"a": "\xef\xbb\xbf"}\n')
    assert check_files("val", [file]) == []


def test_parquet_files_are_skipped(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"\r\n")
    assert check_files("train", [file]) == []
