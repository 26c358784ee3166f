import json

import pyarrow
import pytest
from pyarrow import parquet

from sft_lightning.data.sources.files import digest, read_rows, resolve_files
from sft_lightning.errors import UserError

GOOD = b'{"prompt": "a", "response": "b"}\n'


def write(file, content):
    file.write_bytes(content)
    return file


def rows_of(file):
    """Returns (line, row) of each row that can be read, and (line, reason) of each that cannot."""
    rows = [(source.removeprefix(f"{file}:"), row) for source, row in read_rows(file)]
    return [(int(line), str(row) if isinstance(row, ValueError) else row) for line, row in rows]


def error_of(call, *arguments):
    with pytest.raises(UserError) as error:
        list(call(*arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


# Finding files


def test_a_folder_resolves_to_its_sorted_data_files(tmp_path):
    for name in ("b.jsonl", "a.parquet", "c.txt", "d.json"):
        (tmp_path / name).touch()
    (tmp_path / "e.jsonl").mkdir()
    assert resolve_files(tmp_path) == [tmp_path / "a.parquet", tmp_path / "b.jsonl"]


def test_a_glob_resolves_to_sorted_files(tmp_path):
    for name in ("part-2.jsonl", "part-1.jsonl", "other.jsonl", "part-[1].jsonl"):
        (tmp_path / name).touch()
    assert resolve_files(f"{tmp_path}/part-?.jsonl") == [tmp_path / "part-1.jsonl", tmp_path / "part-2.jsonl"]


def test_an_existing_file_is_not_read_as_a_glob(tmp_path):
    for name in ("part-1.jsonl", "part-[1].jsonl"):
        (tmp_path / name).touch()
    assert resolve_files(f"{tmp_path}/part-[1].jsonl") == [tmp_path / "part-[1].jsonl"]


@pytest.mark.parametrize("name", ["missing.jsonl", "*.jsonl"])
def test_a_path_without_files_is_an_error(tmp_path, name):
    message = error_of(resolve_files, tmp_path / name)
    assert message.startswith(f"data path '{tmp_path / name}' is not a file or folder and matches no file")


def test_a_folder_without_data_files_is_an_error(tmp_path):
    message = error_of(resolve_files, tmp_path)
    assert message.startswith(f"data folder '{tmp_path}' holds no .jsonl and no .parquet file")


# JSONL


def test_bom_crlf_and_blank_lines_keep_line_numbers(tmp_path):
    content = b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n") + b"\r\n" + GOOD.strip()
    row = {"prompt": "a", "response": "b"}
    assert rows_of(write(tmp_path / "a.jsonl", content)) == [(1, row), (3, row)]
    assert rows_of(write(tmp_path / "a.jsonl", GOOD + b"\n  \n")) == [(1, row)]


def test_unicode_line_separators_end_no_line(tmp_path):
    row = {"prompt": "a\u2028b\x85c", "response": "\U0001f600"}
    file = write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False).encode() + b"\n" + GOOD)
    assert rows_of(file) == [(1, row), (2, {"prompt": "a", "response": "b"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{oops}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
        (b"[1]", "not a JSON object, but list"),
        (b'{"prompt": "a\xff", "response": "b"}', "not UTF-8: byte 0xff at position 14"),
    ],
)
def test_an_unreadable_line_is_yielded_as_its_reason(tmp_path, line, reason):
    file = write(tmp_path / "a.jsonl", GOOD + line + b"\n" + GOOD)
    row = {"prompt": "a", "response": "b"}
    assert rows_of(file) == [(1, row), (2, reason), (3, row)]


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"])
def test_json_that_python_refuses_is_unreadable(tmp_path, line):
    ((number, reason),) = rows_of(write(tmp_path / "a.jsonl", b"\n" + line + b"\n"))
    assert number == 2
    assert reason.startswith("not JSON that can be read: ")


def test_a_file_that_cannot_be_opened_is_one_line(tmp_path):
    message = error_of(read_rows, tmp_path / "gone.jsonl")
    assert message.startswith(f"cannot read data file '{tmp_path}/gone.jsonl': ")


# Parquet


def test_parquet_rows_are_numbered_across_row_groups_and_batches(tmp_path):
    responses = ["b"] * 2500
    responses[2100] = None
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"] * 2500, "response": responses}), file, row_group_size=700)
    rows = rows_of(file)
    assert [line for line, _ in rows] == list(range(1, 2501))
    assert rows[2100] == (2101, {"prompt": "a", "response": None})


def test_a_parquet_value_with_invalid_utf8_is_one_bad_row(tmp_path):
    values = pyarrow.array([b"x", b"y\xff", b"z"]).view(pyarrow.string())
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": values, "response": ["b"] * 3}), file)
    (_, first), unreadable, (_, third) = rows_of(file)
    assert unreadable == (2, "not UTF-8: byte 0xff at position 2")
    assert (first["prompt"], third["prompt"]) == ("x", "z")


def test_a_parquet_column_name_with_invalid_utf8_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a"], "response": ["b"]}), file, store_schema=False)
    write(file, file.read_bytes().replace(b"prompt", b"prom\xffx"))
    assert f"cannot read '{file}' as Parquet: 'utf-8' codec can't decode byte 0xff" in error_of(read_rows, file)


def test_a_file_without_parquet_content_is_refused(tmp_path):
    file = write(tmp_path / "a.parquet", GOOD)
    assert error_of(read_rows, file).startswith(f"cannot read '{file}' as Parquet: ")


def test_digest_of_files_depends_on_their_order_and_ends(tmp_path):
    for name, content in {"a": b"abc", "b": b"", "c": b"ab", "d": b"c"}.items():
        (tmp_path / name).write_bytes(content)
    orders = ("a", "ab", "ba", "cd")
    assert len({digest([tmp_path / name for name in order]) for order in orders}) == len(orders)
