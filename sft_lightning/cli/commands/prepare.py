"""sft-lightning prepare: writes data to train on."""

import json
from pathlib import Path

from sft_lightning.cli.parser import CommandParser
from sft_lightning.system.files import write_atomically


def run(args: list[str]) -> int:
    """Runs ``prepare gsm8k`` or ``prepare quickstart``; returns the exit code."""
    parser = CommandParser("prepare", "Write data to train on.")
    parser.add_argument("source", choices=["gsm8k", "quickstart"], help="what to write")
    source, rest = parser.parse_args(args[:1]).source, args[1:]
    return {"gsm8k": _run_gsm8k, "quickstart": _run_quickstart}[source](rest)


def prepare_gsm8k(input_path: str, output_path: str, *, template_path: str | None = None) -> int:
    """Writes GSM8K rows in r1_zero form, one JSON object a line. Returns how many.

    Raises:
        UserError: If a row is no GSM8K row; nothing is left of the output then.
    """
    from sft_lightning.data.formats.r1_zero import R1Zero
    from sft_lightning.data.records import read_records
    from sft_lightning.data.settings import DataSettings

    num_rows = 0
    with write_atomically(Path(output_path)) as file:
        for record in read_records(DataSettings(input_path, template=R1Zero(template_path))):
            row = {"prompt": record.prompt, "response": record.response, "ground_truth": record.ground_truth}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def _run_gsm8k(args: list[str]) -> int:
    parser = CommandParser("prepare gsm8k", "Raw GSM8K rows -> prompt/response/ground_truth in r1_zero form.")
    parser.add_argument("--input", required=True, help="rows with question and answer: file, folder or glob")
    parser.add_argument("--output", required=True, help="the JSONL file to write")
    parser.add_argument("--template_path", help="text file with {question} in it, instead of the built-in preamble")
    options = parser.parse_args(args)
    num_rows = prepare_gsm8k(options.input, options.output, template_path=options.template_path)
    print(f"wrote {num_rows} rows to {options.output}")
    return 0


def _run_quickstart(args: list[str]) -> int:
    parser = CommandParser("prepare quickstart", "The embedded data set, with a tiny model and tokenizer.")
    parser.add_argument("--output", required=True, help="the folder to write into")
    output = parser.parse_args(args).output
    from sft_lightning.models.loading import hide_progress_bars
    from sft_lightning.quickstart.prepare import prepare_quickstart

    hide_progress_bars()
    prepare_quickstart(output)
    print(f"wrote arithmetic problems, a tokenizer and a model to {output}; it starts from random weights")
    return 0
