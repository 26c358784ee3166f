"""Writes the quickstart's folder: the data, and a tiny model with a tokenizer trained on that data."""

import json
from pathlib import Path

from sft_lightning.data.formats.r1_zero import R1_ZERO_PROMPT
from sft_lightning.errors import UserError
from sft_lightning.quickstart.arithmetic import write_arithmetic
from sft_lightning.quickstart.tiny_model import write_tiny_model


def prepare_quickstart(output_dir: str | Path, *, seed: int = 0) -> None:
    """Writes ``train.jsonl``, ``heldout.jsonl`` and the folder ``model/``, replacing files of these names.

    Args:
        output_dir: Folder to write into; made where missing.
        seed: Seed of the problems and of the model's random weights.

    Raises:
        UserError: If ``output_dir`` is a file.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output '{folder}' is a file; name a folder to write the quickstart into")
    write_arithmetic(folder, seed=seed)
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    # Prompt and response stay apart, as they are tokenised apart in training.
    texts = [text for row in rows for text in (row["prompt"], row["response"])]
    before_question, after_question = R1_ZERO_PROMPT.split("{question}")
    write_tiny_model(folder / "model", texts, fixed_texts=(before_question.rstrip(" "), after_question), seed=seed)
