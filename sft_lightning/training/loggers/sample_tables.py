"""Sample tables: what was generated and how it was graded, in the loggers that can show it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

# TensorBoard keeps the texts of every evaluation in one file and shows them one below the other.
_MOST_TENSORBOARD_ROWS = 20
_MOST_TENSORBOARD_CHARACTERS = 600
# What the W&B page still opens in a moment; predictions.jsonl has them all.
_MOST_WANDB_ROWS = 1000
_COLUMNS = ("index", "prompt", "response", "ground_truth", "grade", "failure", "num_tokens")
# Printable ASCII that neither Markdown nor HTML takes for anything inside the cell of a table.
_PLAIN_PUNCTUATION = set(" .,;:?'\"=+-/%$()")


def log_samples(loggers: Sequence[Logger], name: str, samples: Sequence[Mapping[str, Any]], step: int) -> None:
    """Gives samples to the loggers that have a place for tables: TensorBoard and W&B. To be called on one rank.

    Args:
        loggers: Of the Trainer; those of other kinds get nothing.
        name: What the table is called, e.g. ``val/samples``.
        samples: Rows of ``predictions.jsonl``. TensorBoard gets some that are right and some that are wrong, W&B the
            first thousand.
        step: Optimizer steps done.
    """
    if not samples:
        return
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(choose(samples, _MOST_TENSORBOARD_ROWS)), global_step=step)
        elif isinstance(logger, WandbLogger):
            rows = [list(_cells(sample)) for sample in samples[:_MOST_WANDB_ROWS]]
            logger.log_table(name, columns=list(_COLUMNS), data=rows, step=step)


def choose(samples: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Returns at most so many samples in their order: half of them wrong and half right, where there are enough.

    They are taken evenly from each kind, without chance: the same grades give the same choice.
    """
    right = [place for place, sample in enumerate(samples) if _is_right(sample)]
    wrong = [place for place, sample in enumerate(samples) if not _is_right(sample)]
    num_wrong = min(len(wrong), max(most // 2, most - len(right)))
    places = [*_evenly(wrong, num_wrong), *_evenly(right, most - num_wrong)]
    return [samples[place] for place in sorted(places)]


def markdown_table(samples: Sequence[Mapping[str, Any]]) -> str:
    """Returns the samples as a Markdown table, one a line. Nothing in a text is taken for Markdown or HTML."""
    lines = [" | ".join(name.replace("_", " ") for name in _COLUMNS), " | ".join(["---"] * len(_COLUMNS))]
    lines += [" | ".join(_escape(_shorten(str(cell))) for cell in _cells(sample)) for sample in samples]
    return "\n".join(f"| {line} |" for line in lines)


def _is_right(sample: Mapping[str, Any]) -> bool:
    return bool(sample["format_correct"] and sample["answer_correct"])


def _evenly(places: Sequence[int], number: int) -> list[int]:
    number = min(number, len(places))
    return [places[index * len(places) // number] for index in range(number)]


def _cells(sample: Mapping[str, Any]) -> tuple[int, str, str, str, str, str, int]:
    """Returns the values of ``_COLUMNS``. Of one type each, whatever a ground truth is: a W&B table wants that."""
    return (
        int(sample.get("index", 0)),
        _encodable(sample["prompt"]),
        _encodable(sample["response"]),
        _encodable(str(sample["ground_truth"])),
        "right" if _is_right(sample) else "wrong",
        sample["failure"] or "",
        int(sample["num_tokens"]),
    )


def _encodable(text: str) -> str:
    """Returns the text with lone surrogates, which are no UTF-8 and may come from a JSON file, as escapes."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _shorten(text: str) -> str:
    """Returns the text, or its two ends: a prompt ends with the question, and a response with the answer."""
    if len(text) <= _MOST_TENSORBOARD_CHARACTERS:
        return text
    half = _MOST_TENSORBOARD_CHARACTERS // 2
    return f"{text[:half]} ... {text[-half:]}"


def _escape(text: str) -> str:
    return "".join(_escape_character(character) for character in text)


def _escape_character(character: str) -> str:
    if character == "\n":
        return "<br>"
    if character.isalnum() or character in _PLAIN_PUNCTUATION:
        return character
    if character.isprintable():
        return f"&#{ord(character)};"
    # A control character has no place in HTML, not even as an entity.
    return f"&#92;u{ord(character):04x}"
