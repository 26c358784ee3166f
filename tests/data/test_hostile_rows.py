"""Test that every line of mutated JSONL or Parquet is a record, or a bad row with its file, line and reason."""

import json
import random
import sys

import pyarrow
import pytest
from pyarrow import parquet

from sft_lightning.cli.main import main
from sft_lightning.data.load_report import SkippedRows
from sft_lightning.data.records import read_records
from sft_lightning.data.settings import DataSettings
from sft_lightning.data.token_store import load_or_build_tokens
from sft_lightning.errors import UserError

PIECES = [
    b"\x00", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\r", b"\r\n", b"\n",
    b'"', b"\\", b"\\u", b"\\ud800", b"\\udc00\\ud800", b"\\u0000", b"{", b"}", b"[", b"]", b",", b":", b"NaN",
    b"-Infinity", b"1e999", b"9" * 400, b"9" * 5000, b"-0", b"0x10", b"\xe2\x80\xa8", b"\x85", b"\x1c", b"/*", b"null",
]  # fmt: skip
DEEP = [
    depth * opening + depth * closing
    for depth in (50, 990, 3000, 100_000)
    for opening, closing in ("[]", ('{"a":', "}"))
]
VALUES = [
    "null", "true", "3", "-1", "1e400", "-1e400", "1e308", "9" * 400, "9" * 5000, "NaN", "Infinity", "[]", "{}", '""',
    '" "', '"\\u0000"', '"\\ud800"', '"\\udfff x"', '["a", 1]', '["\\ud800"]', "[NaN]", "[[1]]", "[null]", '"\\u2028"',
    '"' + "x" * 3000 + '"', *(deep.replace("{\"a\":}", "{}") for deep in DEEP),
]  # fmt: skip
FIELDS = ["prompt", "response", "ground_truth", "weight", "extra"]


def good_line(number):
    row = {
        "prompt": f"Q{number}: h\u00e9?",
        "response": f" {number} \U0001f600",
        "ground_truth": str(number),
        "weight": 0.5,
    }
    return json.dumps(row, ensure_ascii=number % 2 == 0).encode()


def mutated(line, rng):
    """Returns a line that something happened to, possibly nothing that matters."""
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(line) + 1)
        kind = rng.randrange(7)
        if kind == 0 and line:
            place = min(place, len(line) - 1)
            line = line[:place] + bytes([line[place] ^ 1 << rng.randrange(8)]) + line[place + 1 :]
        elif kind == 1:
            line = line[:place]
        elif kind == 2:
            end = min(len(line), place + rng.randrange(1, 20))
            line = line[:end] + line[place:]
        elif kind == 3:
            line = line[:place] + rng.choice(PIECES) + line[place:]
        elif kind == 4:
            line = line[:place] + line[place + rng.randrange(1, 9) :]
        elif kind == 5:
            line = line[:place] + rng.randbytes(rng.randrange(1, 6)) + line[place:]
        else:
            fields = {name: json.dumps(name) for name in FIELDS} | {rng.choice(FIELDS): rng.choice(VALUES)}
            fields = {name: value for name, value in fields.items() if rng.random() < 0.97}
            if fields.get("weight") == '"weight"':
                fields["weight"] = "1"
            line = ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()
    return line


class AllSkippedRows(SkippedRows):
    """Keeps every one."""

    def add(self, source, reason):
        self.count += 1
        self.first.append((source, reason))


def write_mutated(path, num_lines, seed):
    """Writes a good line behind each mutated one. Returns {line number: number of the good line}."""
    rng = random.Random(seed)
    good, number = {}, 1
    with path.open("wb") as file:
        for row in range(num_lines):
            bad = mutated(good_line(row), rng)
            file.write(bad + b"\n" + good_line(row) + b"\n")
            number += bad.count(b"\n") + 2
            good[number - 1] = row
    return good


def read_all(path):
    skipped = AllSkippedRows()
    records = list(read_records(DataSettings(path, max_bad_rows=sys.maxsize), skipped))
    return records, skipped


def assert_each_line_is_told_of(path, good):
    records, skipped = read_all(path)
    by_source = {record.source: record for record in records}
    reasons = dict(skipped.first)
    assert len(by_source) == len(records)
    assert len(reasons) == skipped.count
    assert not by_source.keys() & reasons.keys()
    written = [line.strip() for line in path.read_bytes().removesuffix(b"\n").split(b"\n")]
    expected = {f"{path}:{number}" for number, line in enumerate(written, start=1) if line}
    assert by_source.keys() | reasons.keys() == expected
    for number, row in good.items():
        record = by_source[f"{path}:{number}"]
        assert (record.prompt, record.response) == (f"Q{row}: h\u00e9?", f" {row} \U0001f600")
        assert (record.ground_truth, record.weight) == (str(row), 0.5)
    for record in records:
        assert record.prompt.strip()
        assert record.response.strip()
        assert 0 <= record.weight <= sys.float_info.max
        # Whatever a record holds can be written again, by predictions.jsonl among others.
        json.dumps([record.prompt, record.response, record.ground_truth], allow_nan=False, ensure_ascii=False).encode()
    for source, reason in reasons.items():
        assert reason.isprintable(), (source, reason)
        assert 0 < len(reason) < 200, (source, reason)
    return records, reasons


def test_mutated_lines_are_records_or_named_bad_rows(tmp_path, tokenizer, note_fault):
    path = tmp_path / "train.jsonl"
    good = write_mutated(path, 2_000, seed=1)
    records, reasons = assert_each_line_is_told_of(path, good)
    assert len(reasons) > 500
    settings = DataSettings(path, max_bad_rows=sys.maxsize, max_length=512, cache_dir=tmp_path / "cache")
    store = load_or_build_tokens(settings, tokenizer)
    assert len(store) + store.load_report.num_rows >= len(records)
    with pytest.raises(
        UserError, match=rf"^too many bad rows \({len(reasons)}, data.max_bad_rows is 0\): {path}:\d+: "
    ):
        list(read_records(DataSettings(path)))
    note_fault(
        "line of JSONL that is not a row (also: not UTF-8, no prompt or response, a wrong type)",
        provoked="2,000 good lines mutated: bits, cuts, copies, insertions, other types, huge numbers, deep nesting, "
        "NUL, BOM, half surrogate pairs, CRLF; a slow test does the same with 100,000",
        outcome="named by file, line and reason; skipped up to `data.max_bad_rows` (0), else the run stops before a "
        "model is loaded (exit 2); good lines are still read",
        tries=2_000,
    )


def test_mutated_gsm8k_rows_are_read_or_named(tmp_path):
    rng = random.Random(5)
    path = tmp_path / "train.jsonl"
    good = b'{"question": "What is 2+2?", "answer": "2+2 = <<2+2=4>>4\\n#### 4"}'
    path.write_bytes(b"\n".join([good, *(mutated(good, rng).replace(b"\n", b" ") for _ in range(1_000)), good]))
    records, skipped = read_all(path)
    assert len(records) + skipped.count >= 990  # some lines are empty
    assert all(record.response.rstrip().endswith("</answer>") for record in records)
    assert all(source.rpartition(":")[2].isdigit() for source, _ in skipped.first)


def test_mutated_parquet_is_read_or_named(tmp_path):
    rng = random.Random(6)
    path = tmp_path / "train.parquet"
    rows = [{"prompt": f"Q{row}", "response": f" {row}", "ground_truth": str(row)} for row in range(50)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    whole = path.read_bytes()
    refusals = []
    for _ in range(300):
        path.write_bytes(mutated(whole, rng))
        try:
            records, _ = read_all(path)
        except UserError as error:
            refusals.append(str(error))
        else:
            assert all(isinstance(record.prompt, str) for record in records)
    assert len(refusals) > 50
    assert [text for text in refusals if str(path) not in text or len(text.splitlines()) > 1] == []


def test_check_shows_mutated_rows_to_a_terminal(tmp_path, model_folder, capsys):
    path = tmp_path / "train.jsonl"
    write_mutated(path, 150, seed=7)
    config = ["--data.train_path", str(path), "--model.model_path", model_folder, "--trainer.accelerator", "cpu"]
    assert main(["check", *config]) == 1  # too many bad rows
    assert main(["check", *config, "--data.max_bad_rows", "1000"]) in (0, 1)
    printed = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in printed)


@pytest.mark.slow
def test_many_mutated_lines_are_records_or_named_bad_rows(tmp_path):
    for seed in range(2, 12):
        path = tmp_path / f"{seed}.jsonl"
        _, reasons = assert_each_line_is_told_of(path, write_mutated(path, 10_000, seed))
        assert len(reasons) > 2_500
        path.unlink()
