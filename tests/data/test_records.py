import json
import logging
import math
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from sft_lightning.data.formats.base import Record
from sft_lightning.data.formats.prompt_response import Plain
from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.data.records import SFTDataset, check_ground_truth, check_text, check_weight, read_records
from sft_lightning.data.settings import DataSettings
from sft_lightning.errors import UserError

GSM8K = Path(os.environ.get("SFT_GSM8K_DIR", Path(__file__).parents[3] / "shared" / "gsm8k"))
GOOD = b'{"prompt": "a", "response": "b"}\n'


def write(file, content):
    file.write_bytes(content)
    return file


def read(path, **options):
    return list(read_records(DataSettings(path, **options)))


def error_of(path, **options):
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Reading


def test_records_are_in_file_order_with_their_lines(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        b'{"prompt": "1+1=", "response": "2", "ground_truth": 2, "weight": 0.5}\n'
        b'{"prompt": "2+2=", "response": "4", "ground_truth": ["4", 4.0], "extra": null}\n',
    )
    assert read(file) == [
        Record("1+1=", "2", 2, 0.5, f"{file}:1"),
        Record("2+2=", "4", ["4", 4.0], 1.0, f"{file}:2"),
    ]


def test_parquet_gives_the_same_records_as_jsonl(tmp_path):
    table = {"question": ["1+1?", "2+2?"], "answer": ["t\n#### 2", "u\n#### 4"], "weight": [None, 0.5]}
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(table), file)
    lines = [json.dumps({key: values[row] for key, values in table.items()}) for row in (0, 1)]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(lines).encode())
    assert [r.source for r in read(file)] == [f"{file}:1", f"{file}:2"]
    assert [(r.prompt, r.response, r.ground_truth, r.weight) for r in read(file)] == [
        (r.prompt, r.response, r.ground_truth, r.weight) for r in read(jsonl)
    ]


def test_each_of_several_files_gets_its_own_template(tmp_path):
    write(tmp_path / "b.jsonl", GOOD)
    write(tmp_path / "a.jsonl", b'{"question": "q", "answer": "t\\n#### 1"}\n')
    assert [record.response for record in read(tmp_path)] == [" t </think> <answer> 1 </answer>", "b"]


# Bad rows

BAD_ROWS = [
    (b"{oops}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
    (b'{"prompt": "a", "resp', "not JSON: Unterminated string starting at (column 17)"),
    (b"[1]", "not a JSON object, but list"),
    (b"null", "not a JSON object, but NoneType"),
    (b'{"prompt": "a\xff", "response": "b"}', "not UTF-8: byte 0xff at position 14"),
    (b'{"prompt": "a"}', "field 'response' is missing"),
    (b'{"prompt": null, "response": "b"}', "field 'prompt' is missing"),
    (b'{"prompt": "", "response": "b"}', "field 'prompt' is empty"),
    (b'{"prompt": "a", "response": " \\n"}', "field 'response' is empty"),
    (b'{"prompt": ["a"], "response": "b"}', "field 'prompt' must be text, got list"),
    (b'{"prompt": "a", "response": 4}', "field 'response' must be text, got int"),
    (
        b'{"prompt": "a", "response": "\\ud83d"}',
        "field 'response' holds half a surrogate pair, which is not a character: surrogates not allowed",
    ),
    (
        b'{"prompt": "a", "response": "b", "weight": -1}',
        "field 'weight' must be a finite number, at least 0, got -1",
    ),
    (
        b'{"prompt": "a", "response": "b", "weight": NaN}',
        "field 'weight' must be a finite number, at least 0, got nan",
    ),
    (
        b'{"prompt": "a", "response": "b", "weight": 1e999}',
        "field 'weight' must be a finite number, at least 0, got inf",
    ),
    (
        b'{"prompt": "a", "response": "b", "weight": true}',
        "field 'weight' must be a finite number, at least 0, got True",
    ),
    (
        b'{"prompt": "a", "response": "b", "weight": "1"}',
        "field 'weight' must be a finite number, at least 0, got '1'",
    ),
    (
        b'{"prompt": "a", "response": "b", "ground_truth": {"x": 1}}',
        "field 'ground_truth' must be text, a number or a list of those, got {'x': 1}",
    ),
    (
        b'{"prompt": "a", "response": "b", "ground_truth": ["1", null]}',
        "field 'ground_truth' must be text, a number or a list of those, got None",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, row, reason):
    file = write(tmp_path / "bad.jsonl", GOOD + row + b"\r\n" + GOOD)
    assert error_of(file) == f"too many bad rows (1, data.max_bad_rows is 0): {file}:2: {reason}"
    assert [record.source for record in read(file, max_bad_rows=1)] == [f"{file}:1", f"{file}:3"]


def test_a_bad_first_row_does_not_choose_the_template(tmp_path):
    file = write(tmp_path / "bad.jsonl", b'{"prompt": "a"}\n' + GOOD)
    assert error_of(file).endswith(f"{file}:1: field 'response' is missing")
    assert len(read(file, max_bad_rows=1)) == 1


def test_a_row_that_its_template_rejects_is_a_bad_row(tmp_path):
    file = write(tmp_path / "bad.jsonl", b'{"question": "q", "answer": "no number"}\n')
    assert error_of(file).endswith(f"{file}:1: field 'answer' must be a worked solution that ends with '#### <number>'")


def test_an_empty_rendered_response_is_a_bad_row(tmp_path):
    class Silent(Plain):
        def render(self, row):
            return {"prompt": row["prompt"], "response": ""}

    file = write(tmp_path / "a.jsonl", GOOD)
    assert error_of(file, template=Silent()).endswith(f"{file}:1: rendered response is empty")


def test_too_many_bad_rows_are_counted_and_five_named(tmp_path):
    file = write(tmp_path / "bad.jsonl", GOOD + b"x\n" * 7 + GOOD)
    message = error_of(file, max_bad_rows=6)
    assert message.startswith(f"too many bad rows (7, data.max_bad_rows is 6): {file}:2: not JSON")
    assert f"{file}:6: " in message
    assert f"{file}:7: " not in message
    assert message.endswith("; and 2 more")


def test_no_record_follows_too_many_bad_rows(tmp_path):
    file = write(tmp_path / "bad.jsonl", GOOD + b"x\n" + GOOD)
    records = read_records(DataSettings(file))
    assert next(records).source == f"{file}:1"
    with pytest.raises(UserError):
        next(records)


def test_skipped_rows_are_logged_as_a_warning(tmp_path, caplog):
    file = write(tmp_path / "bad.jsonl", GOOD + b"7\n")
    with caplog.at_level(logging.WARNING):
        read(file, max_bad_rows=3)
    assert caplog.messages == [f"bad rows skipped (1): {file}:2: not a JSON object, but int"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path, content):
    file = write(tmp_path / "a.jsonl", content)
    assert error_of(file) == f"data path '{file}' has no usable row: it is empty"


def test_only_bad_rows_are_an_error_under_any_limit(tmp_path):
    file = write(tmp_path / "a.jsonl", b"1\n2\n")
    assert error_of(file, max_bad_rows=9).startswith(
        f"data path '{file}' has no usable row: {file}:1: not a JSON object"
    )


# Fields

deep = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize("value", ["a", " \u2028x", "\x00", "\U0001f600"])
def test_valid_text_passes(value):
    check_text("field 'prompt'", value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "field 'prompt' is missing"),
        (3, "field 'prompt' must be text, got int"),
        (deep, "field 'prompt' must be text, got list"),
        (" \n\u2028", "field 'prompt' is empty"),
        ("x\ud800", "field 'prompt' holds half a surrogate pair, which is not a character: surrogates not allowed"),
    ],
)
def test_invalid_text_is_refused_with_the_reason(value, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        check_text("field 'prompt'", value)


@pytest.mark.parametrize("value", [0, 0.0, 1, 0.5, 1e308])
def test_valid_weights_pass(value):
    check_weight(value)


@pytest.mark.parametrize("value", [-1, -1e-9, math.inf, math.nan, 10**400, True, "1", None, deep, [1]])
def test_an_invalid_weight_is_refused(value):
    with pytest.raises(ValueError, match=r"^field 'weight' must be a finite number, at least 0, got .{1,40}$"):
        check_weight(value)


@pytest.mark.parametrize("value", [None, "", "a", 3, -0.5, 10**400, [], ["a", 3]])
def test_valid_ground_truths_pass(value):
    check_ground_truth(value)


@pytest.mark.parametrize("value", [math.nan, -math.inf, True, {}, [None], [["a"]], ["a", math.inf], deep, [deep]])
def test_an_invalid_ground_truth_is_refused(value):
    with pytest.raises(
        ValueError, match=r"^field 'ground_truth' must be text, a number or a list of those, got .{1,40}$"
    ):
        check_ground_truth(value)


@pytest.mark.parametrize("value", ["\ud800", ["a", "x\udfff"]])
def test_a_ground_truth_that_is_not_utf8_is_refused(value):
    with pytest.raises(ValueError, match=r"^field 'ground_truth' holds half a surrogate pair"):
        check_ground_truth(value)


# Columns and templates


def test_columns_map_our_names_to_the_names_in_the_file(tmp_path):
    row = b'{"instruction": "a", "output": "b", "prompt": "not this", "label": "c"}\n'
    file = write(tmp_path / "a.jsonl", row)
    columns = {"prompt": "instruction", "response": "output", "ground_truth": "label"}
    assert read(file, columns=columns) == [Record("a", "b", "c", 1.0, f"{file}:1")]


def test_columns_can_swap_names_and_repeat_one(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD)
    columns = {"prompt": "response", "response": "prompt", "ground_truth": "prompt"}
    assert read(file, columns=columns) == [Record("b", "a", "a", 1.0, f"{file}:1")]


def test_a_mapped_column_loses_its_old_name(tmp_path):
    file = write(tmp_path / "a.jsonl", b'{"prompt": "q", "response": "t\\n#### 1"}\n')
    record = read(file, columns={"question": "prompt", "answer": "response"})[0]
    assert record.response == " t </think> <answer> 1 </answer>"


def test_a_mapped_column_that_a_row_lacks_is_named(tmp_path):
    file = write(tmp_path / "a.jsonl", GOOD + b'{"prompt": "x", "response": "y"}\n')
    message = error_of(file, template=Plain(), columns={"prompt": "instruction"}, max_bad_rows=1)
    assert f"{file}:1: field 'prompt' (column 'instruction') is missing" in message


def test_keys_that_fit_no_template_are_listed_with_their_place(tmp_path):
    file = write(tmp_path / "a.jsonl", b'{"in": "a", "out": "b"}\n' * 3)
    assert error_of(file).startswith(f"{file}:1: found the keys ['in', 'out'], expected 'prompt' and 'response'")


def test_a_named_template_wins_over_the_keys(tmp_path):
    row = b'{"prompt": "a", "response": "b", "question": "q", "answer": "t #### 1"}\n'
    file = write(tmp_path / "a.jsonl", row)
    assert read(file, template=R1Zero())[0].ground_truth == "1"


# The guide's dataset


def test_sft_dataset_gives_dictionaries(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        GOOD + b'{"prompt": "c", "response": "d", "ground_truth": 0, "weight": 2}\nnot read\n',
    )
    dataset = SFTDataset(file, max_examples=2)
    assert len(dataset) == 2
    assert list(dataset) == [
        {"prompt": "a", "response": "b"},
        {"prompt": "c", "response": "d", "ground_truth": 0, "weight": 2.0},
    ]
    assert len(SFTDataset(file, max_examples=9, max_bad_rows=1)) == 2


def test_sft_dataset_refuses_to_be_empty(tmp_path):
    with pytest.raises(UserError, match="max_examples is 0; give at least 1"):
        SFTDataset(write(tmp_path / "a.jsonl", GOOD), max_examples=0)


def test_the_real_gsm8k_training_file_has_no_bad_row():
    file = GSM8K / "train.jsonl"
    if not file.is_file():
        pytest.skip("no GSM8K here: set SFT_GSM8K_DIR to a folder with train.jsonl")
    records = read(file)
    assert len(records) == 7473
    assert records[0].ground_truth == "72"
    assert records[0].response == (
        " Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May."
        " </think> <answer> 72 </answer>"
    )
    assert records[-1].source == f"{file}:7473"
    for record in records:
        assert record.prompt.endswith("\nAssistant: <think>")
        assert "<<" not in record.response
        assert record.response.endswith(f" </think> <answer> {record.ground_truth} </answer>")
        float(record.ground_truth)
