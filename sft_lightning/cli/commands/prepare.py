"""Write training data: GSM8K in r1_zero form, or the quickstart's data, model and tokenizer."""

import json
from pathlib import Path

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError
from sft_lightning.system.files import write_atomically


def run(args: list[str]) -> int:
    """Runs ``prepare gsm8k`` or ``prepare quickstart``; returns the exit code."""
    parser = CommandParser("prepare", "Write data to train on.")
    parser.add_argument("source", choices=["gsm8k", "quickstart"], help="data to write")
    source, rest = parser.parse_args(args[:1]).source, args[1:]
    return {"gsm8k": _run_gsm8k, "quickstart": _run_quickstart}[source](rest)


def prepare_gsm8k(input_path: str, output_path: str, *, template_path: str | None = None) -> int:
    """Writes GSM8K rows in r1_zero form, one JSON object per line. Returns the number of rows.

    Raises:
        UserError: If a row is not a GSM8K row; no output is left then.
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


def prepare_quickstart(output_dir: str | Path, *, seed: int = 0) -> None:
    """Writes ``train.jsonl``, ``heldout.jsonl`` and the folder ``model/``; replaces files with these names.

    Each is there as a whole or not at all, also after an interruption or if another process does the same.

    Args:
        output_dir: Folder to write into; created if missing.
        seed: Seed of the problems and of the model's random weights.

    Raises:
        UserError: If ``output_dir``, or ``model`` in it, is a file.
    """
    from sft_lightning.data.formats.r1_zero import R1_ZERO_PROMPT
    from sft_lightning.quickstart.arithmetic import write_arithmetic
    from sft_lightning.quickstart.tiny_model import write_tiny_model

    folder = Path(output_dir)
    for path in (folder, folder / "model"):
        if path.exists() and not path.is_dir():
            raise UserError(f"output '{path}' is a file; name a folder to write the quickstart into")
    write_arithmetic(folder, seed=seed)
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    # Training tokenizes prompt and response separately, so the tokenizer is trained on them separately.
    texts = [text for row in rows for text in (row["prompt"], row["response"])]
    before_question, after_question = R1_ZERO_PROMPT.split("{question}")
    write_tiny_model(folder / "model", texts, fixed_texts=(before_question.rstrip(" "), after_question), seed=seed)


def _run_gsm8k(args: list[str]) -> int:
    parser = CommandParser("prepare gsm8k", "Convert raw GSM8K rows to prompt/response/ground_truth in r1_zero form.")
    parser.add_argument("--input", required=True, help="rows with question and answer: file, folder or glob")
    parser.add_argument("--output", required=True, help="JSONL file to write")
    parser.add_argument("--template_path", help="text file that contains {question}; default: the built-in prompt")
    options = parser.parse_args(args)
    num_rows = prepare_gsm8k(options.input, options.output, template_path=options.template_path)
    print(f"wrote {num_rows} rows to {options.output}")
    return 0


def _run_quickstart(args: list[str]) -> int:
    parser = CommandParser("prepare quickstart", "Write the built-in data set, a tiny model and its tokenizer.")
    parser.add_argument("--output", required=True, help="folder to write into")
    output = parser.parse_args(args).output
    from sft_lightning.models.loading import hide_progress_bars

    hide_progress_bars()
    prepare_quickstart(output)
    print(f"wrote arithmetic problems, a tokenizer and a model with random weights to {output}")
    return 0
