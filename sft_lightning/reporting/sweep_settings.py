"""The settings of a sweep: sizes from words, and the config that all its runs share."""

from collections.abc import Mapping, Sequence
from typing import Any

from sft_lightning.errors import UserError

FULL = "full"
# Each run has its own.
_OF_ONE_RUN = ("output_dir", "data.max_train_examples")
# They decide neither tokens nor weights.
_FREE = ("data.cache_dir", "data.num_workers")
# What the sweep gives to each run, and a user must not.
OPTIONS_OF_SWEEP = (
    "--output_dir",
    "--checkpoint.dirpath",
    "--evaluation.output_dir",
    "--data.max_train_examples",
    "--ckpt_path",
    "--overwrite",
)


def check_words(words: Sequence[str]) -> None:
    """Raises UserError that names the first size which is neither a number above 0 nor ``full``."""
    for word in words:
        if word != FULL and not (word.isascii() and word.isdigit() and int(word) > 0):
            raise UserError(f"--sizes '{word}' is no size: give numbers of training examples, at least 1, or {FULL}")


def sizes_of(words: Sequence[str], num_rows: int) -> dict[str, int]:
    """Returns label -> number of examples, smallest first, each number once; ``full`` stands for all rows.

    Raises:
        UserError: For a word that is no size, or a number above ``num_rows``.
    """
    check_words(words)
    sizes: dict[int, str] = {}
    for word in words:
        size = num_rows if word == FULL else int(word)
        if size > num_rows:
            raise UserError(
                f"--sizes {word} is more than the {num_rows} rows that data.train_path has to train on; "
                f"give at most that, or {FULL}"
            )
        if sizes.get(size) != FULL:
            sizes[size] = FULL if word == FULL else str(size)
    return {sizes[size]: size for size in sorted(sizes)}


def check_options(options: Sequence[str]) -> None:
    """Raises UserError for an option of ``fit`` that the sweep itself sets for each run."""
    for option in options:
        name = option.partition("=")[0]
        if name in OPTIONS_OF_SWEEP:
            raise UserError(f"sweep gives each size its own {name}: leave it out; --output names the sweep's folder")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UserError where runs of this config would share a folder, or leave nothing to compare."""
    for section, name in (("checkpoint", "dirpath"), ("evaluation", "output_dir")):
        if config[section][name] is not None:
            raise UserError(
                f"{section}.{name} is set in the config, but sweep gives each size a folder: set it to null"
            )
    if config["data"]["val_path"] is None or config["evaluation"]["num_examples"] == 0:
        raise UserError(
            "sweep compares graded answers: set data.val_path, and evaluation.num_examples above 0, "
            f"got {config['data']['val_path']} and {config['evaluation']['num_examples']}"
        )


def shared_config(config: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns, by dotted name, everything that must be the same in all runs of a sweep.

    Args:
        config: Of a run, as it is saved.
        fingerprint: Of the training set's tokens: paths and tokenizers may stay while what they name changes.
    """
    shared = dict(_leaves(config))
    for name in (*_OF_ONE_RUN, *_FREE):
        shared.pop(name, None)
    contents = {
        "the content of data.train_path": fingerprint["data"],
        "the tokenizer's content": fingerprint["tokenizer"],
    }
    return shared | contents


def check_same_config(saved: Mapping[str, Any], own: Mapping[str, Any], sweep: str) -> None:
    """Raises UserError that names the first difference from the config of the runs that a sweep holds."""
    for name in {**saved, **own}:
        if saved.get(name) != own.get(name):
            raise UserError(
                f"sweep '{sweep}' was begun with another config: {name} was {saved.get(name)!r} and is now "
                f"{own.get(name)!r}; set it back, or name another folder as --output"
            )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves += _leaves(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return leaves
