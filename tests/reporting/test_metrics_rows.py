import pytest

from sft_lightning.reporting.metrics_rows import read_metrics_rows
from sft_lightning.reporting.run_files import read_run

WHOLE = b"step,train/loss,val/loss\r\n1,2.5,\r\n2,2.25,3.0\r\n"
ROWS = [
    {"step": "1", "train/loss": "2.5", "val/loss": ""},
    {"step": "2", "train/loss": "2.25", "val/loss": "3.0"},
]


def read(tmp_path, content):
    (tmp_path / "metrics.csv").write_bytes(content)
    return read_metrics_rows(tmp_path / "metrics.csv")


def test_whole_rows_are_read(tmp_path, caplog):
    assert read(tmp_path, WHOLE) == (["step", "train/loss", "val/loss"], ROWS)
    assert read(tmp_path, WHOLE + b"3,2.1") == (["step", "train/loss", "val/loss"], ROWS)  # still being written
    assert read(tmp_path, WHOLE.replace(b"\r", b"")) == (["step", "train/loss", "val/loss"], ROWS)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (bytes(4096), "line 4"),
        (b"3,2.0,\r\n"[:4] + bytes(200_000) + b"\r\n", "line 4"),
        (b"3,2.\xff,\r\n", "line 4"),
        (b"3,2.0\r\n", "line 4"),
        (b"3,2.0,1,1\r\n", "line 4"),
        (b"three,2.0,1\r\n", "line 4"),
        (b'3,"2.0,1\r\n4\r\n', "line 4 and 1 more"),
    ],
)
def test_a_damaged_row_is_left_out_and_named(tmp_path, caplog, damage, place):
    assert read(tmp_path, WHOLE + damage)[1] == ROWS
    assert caplog.messages == [f"'{tmp_path / 'metrics.csv'}': left out what is damaged: {place}"]


def test_a_row_after_a_damaged_one_is_read(tmp_path):
    assert read(tmp_path, WHOLE + b"\0\0\0\r\n3,2.0,\r\n")[1] == [
        *ROWS,
        {"step": "3", "train/loss": "2.0", "val/loss": ""},
    ]


@pytest.mark.parametrize("header", [bytes(24), b"st\xffp,train/loss,val/loss", b"loss,train/loss,val/loss"])
def test_without_a_header_there_are_no_rows(tmp_path, caplog, header):
    assert read(tmp_path, header + WHOLE.partition(b"\r\n")[1] + WHOLE.partition(b"\r\n")[2]) == ([], [])
    assert caplog.messages == [f"'{tmp_path / 'metrics.csv'}': its header is damaged, so none of its rows can be read"]


def test_a_report_shows_the_whole_rows(tmp_path, caplog):
    (tmp_path / "metrics.csv").write_bytes(WHOLE + bytes(512))
    assert read_run(tmp_path).series == {"train/loss": [(1, 2.5), (2, 2.25)], "val/loss": [(2, 3.0)]}
    assert len(caplog.messages) == 1
