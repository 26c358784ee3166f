"""Test the sample tables, and read back what a run logs from the files of TensorBoard and W&B."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from sft_lightning.training.loggers.sample_tables import choose, log_samples, markdown_table

HOSTILE = [
    '<script>alert("x")</script><img src=x onerror=alert(1)>',
    "a | b \\| c || &#124; &lt;td&gt;",
    "**bold** _it_ `code` ~~no~~ [link](javascript:alert(1)) ![i](http://x) <http://auto.link> # no heading",
    "line one\nline two\n\n- no list\n    no code\n```\nno fence\n```",
    "\x1b[31mred\x00\x07\u202e \ud800 lone",
    "4 \N{MULTIPLICATION SIGN} 2 = \N{SUPERSCRIPT TWO} \N{CJK UNIFIED IDEOGRAPH-4E2D} \N{GRINNING FACE}",
]


def sample(index, *, right=True, **changes):
    made = {
        "index": index,
        "sample": 0,
        "prompt": f"What is {index}+1?",
        "response": f"{index + 1}",
        "ground_truth": str(index + 1),
        "format_correct": True,
        "answer_correct": right,
        "failure": None if right else "wrong",
        "num_tokens": 3,
    }
    return {**made, **changes}


class Cells(HTMLParser):
    """The text of each cell of a table's body, and the names of all tags."""

    def __init__(self, source):
        super().__init__()
        self.rows, self.tags, self.attributes = [], set(), []
        self._text = None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self._text = ""
        elif tag == "br":
            self._text += "\n"

    def handle_endtag(self, tag):
        if tag == "td":
            self.rows[-1].append(self._text)
            self._text = None

    def handle_data(self, data):
        if self._text is not None:
            self._text += data


# Which samples are shown


def test_half_of_the_samples_are_wrong_and_evenly_spaced():
    samples = [sample(i, right=i % 10 != 9) for i in range(100)]  # ten are wrong: 9, 19, ... 99
    assert [s["index"] for s in choose(samples, 4)] == [0, 9, 50, 59]


@pytest.mark.parametrize(("num_right", "num_wrong", "shown"), [(30, 3, (17, 3)), (3, 30, (3, 17)), (2, 1, (2, 1))])
def test_right_samples_fill_up_for_rare_wrong_ones(num_right, num_wrong, shown):
    samples = [sample(i, right=i < num_right) for i in range(num_right + num_wrong)]
    chosen = choose(samples, 20)
    rights = [s["answer_correct"] for s in chosen]
    assert (rights.count(True), rights.count(False)) == shown
    assert len({s["index"] for s in chosen}) == len(chosen)


def test_a_right_answer_in_a_wrong_format_is_wrong():
    samples = [sample(0, format_correct=False, failure="no_answer_tag"), sample(1)]
    table = markdown_table(samples).splitlines()
    assert table[2:] == [
        "| 0 | What is 0+1? | 1 | 1 | wrong | no&#95;answer&#95;tag | 3 |",
        "| 1 | What is 1+1? | 2 | 2 | right |  | 3 |",
    ]


# TensorBoard


def test_texts_are_escaped_in_the_tensorboard_table():
    plugin_util = pytest.importorskip("tensorboard.plugin_util")
    samples = [sample(i, prompt=text, response=text[::-1], ground_truth=[text]) for i, text in enumerate(HOSTILE)]
    cells = Cells(plugin_util.markdown_to_safe_html(markdown_table(samples)))
    assert cells.tags == {"table", "thead", "tbody", "tr", "th", "td", "br"}
    assert cells.attributes == []
    expected = [
        *HOSTILE[:4],
        "\\u001b[31mred\\u0000\\u0007\\u202e \\ud800 lone",
        HOSTILE[5],
    ]
    for row, text in zip(cells.rows[1:], expected, strict=True):
        assert re.sub(" +", " ", row[1]) == re.sub(" +", " ", text)
        assert len(row) == 7


def test_long_texts_keep_both_ends():
    row = markdown_table([sample(0, prompt="p" * 290 + "P" * 1000 + "q" * 290)]).splitlines()[2]
    assert row.split(" | ")[1] == "p" * 290 + "P" * 10 + " ... " + "P" * 10 + "q" * 290


def test_tensorboard_gets_twenty_rows_as_text_at_its_step(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path)
    for step in (0, 8):
        log_samples([logger], "val/samples", [sample(i, right=step > 0) for i in range(50)], step)
    logger.save()
    events = accumulator.EventAccumulator(logger.log_dir).Reload()
    first, second = events.Tensors("val/samples/text_summary")
    assert (first.step, second.step) == (0, 8)
    lines = second.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 22
    assert lines[2] == "| 0 | What is 0+1? | 1 | 1 | right |  | 3 |"


def test_other_loggers_and_empty_samples_are_skipped(tmp_path):
    log_samples([CSVLogger(tmp_path)], "val/samples", [sample(0)], 1)
    log_samples([TensorBoardLogger(tmp_path)], "val/samples", [], 1)
    assert list(tmp_path.iterdir()) == []


# W&B. Its run is another process, which outlives a test that fails: here it ends with a process of ours.


def wandb_records(folder):
    """Yields the records of an offline run: LevelDB's log format, a protobuf a record."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, position, whole = path.read_bytes(), 7, b""  # the file's own header
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        size, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        whole += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def wandb_history(folder):
    """Returns what was logged, as one dictionary of names and values for each time."""
    rows = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def wandb_series(folder, name):
    return [(row["trainer/global_step"], row[name]) for row in wandb_history(folder) if name in row]


def processes_named(name):
    command_lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command_lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return [line for line in command_lines if name in line]


def run_python(*arguments):
    """Runs a program that uses W&B offline, and waits for the process that W&B started to end, too."""
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_OFFLINE"] = "1"
    before = len(processes_named("wandb-core"))
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    deadline = time.monotonic() + 60
    while len(processes_named("wandb-core")) > before:
        assert time.monotonic() < deadline, "W&B's own process did not end"
        time.sleep(0.2)
    return done


TABLES = """
import json, sys
from lightning.pytorch.loggers import WandbLogger
from sft_lightning.training.loggers.sample_tables import log_samples

folder, samples = sys.argv[1], json.load(open(sys.argv[2]))
logger = WandbLogger(save_dir=folder, project="tables", offline=True)
for step in (0, 8):
    log_samples([logger], "val/samples", samples, step)
"""


@pytest.mark.slow
def test_wandb_gets_all_samples_up_to_its_limit(tmp_path):
    pytest.importorskip("wandb")
    samples = [sample(i, prompt=text, ground_truth=i) for i, text in enumerate(HOSTILE)]
    samples += [sample(i, ground_truth=[str(i), i]) for i in range(len(HOSTILE), 1500)]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    (tmp_path / "program.py").write_text(TABLES)
    run_python(tmp_path / "program.py", tmp_path, tmp_path / "samples.json")
    assert [step for step, _ in wandb_series(tmp_path, "val/samples/_type")] == [0, 8]
    tables = sorted(tmp_path.glob("wandb/offline-run-*/files/media/table/val/samples_*.table.json"))
    table = json.loads(tables[-1].read_text())
    assert table["columns"] == ["index", "prompt", "response", "ground_truth", "grade", "failure", "num_tokens"]
    assert len(table["data"]) == 1000
    assert table["data"][0] == [0, HOSTILE[0], "1", "0", "right", "", 3]
    assert table["data"][4][1] == HOSTILE[4].replace("\ud800", "\\ud800")


@pytest.mark.slow
def test_all_loggers_get_equal_metrics_at_equal_steps(tmp_path, model_folder, train_file, val_file):
    pytest.importorskip("wandb")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    loggers = [
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(tmp_path), "name": "board"}},
        {"class_path": "WandbLogger", "init_args": {"save_dir": str(tmp_path), "project": "p", "offline": True}},
    ]
    config = {
        "output_dir": str(run),
        "data": {"train_path": train_file, "val_path": val_file, "batch_size": 4, "max_length": 512},
        "model": {"model_path": model_folder, "learning_rate": 1e-2},
        "validate_every_n_steps": 2,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 1,
            "logger": loggers,
        },
        "evaluation": {
            "num_examples": 3,
            "generator": {"class_path": "TransformersGenerator", "init_args": {"max_new_tokens": 3}},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run_python("-m", "sft_lightning", "fit", "--config", tmp_path / "config.yaml")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    events = accumulator.EventAccumulator(str(tmp_path / "board" / "version_0")).Reload()
    steps = {"train/loss": [1, 2, 3, 4, 5, 6], "val/loss": [2, 4, 6], "val/answer_accuracy": [0, 2, 4, 6]}
    for name, expected_steps in steps.items():
        written = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert [step for step, _ in written] == expected_steps
        assert wandb_series(tmp_path, name) == written
        board = events.Scalars(name)
        assert [event.step for event in board] == expected_steps
        values = [value for _, value in written]
        assert [event.value for event in board] == pytest.approx(values, rel=1e-6)  # TensorBoard keeps float32
    assert [event.step for event in events.Tensors("val/samples/text_summary")] == [0, 2, 4, 6]
    assert [step for step, _ in wandb_series(tmp_path, "val/samples/_type")] == [0, 2, 4, 6]
    configs = [record for record in wandb_records(tmp_path) if record.WhichOneof("record_type") == "config"]
    keys = {item.key: json.loads(item.value_json) for record in configs for item in record.config.update}
    assert keys["learning_rate"] == 1e-2
