"""sft-lightning sweep: one training for each number of examples, one table and one plot.

    DIR/size-128/ ... DIR/size-full/    runs of `fit`, each in a process of its own
    DIR/sweep.json                      the config they share, which are finished, their results
    DIR/sweep.md  DIR/sweep.png         the tables and the plot

The files are written anew after each run. A run that fails ends the sweep with the exit code of its `fit`: what made
it fail mostly waits for the next, larger one too. The same command goes on where the last one ended, whatever ended it.
"""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError

_SECONDS_TO_END = 10
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
_EPILOG = (
    "All other options are those of fit, such as --trainer.max_epochs 1, and hold for every size. A larger size "
    "contains the smaller: each is the first rows in file order. The same command goes on after a crash or a Ctrl-C."
)


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = CommandParser("sweep", "Train on more and more examples, and compare the answers.")
    parser.allow_abbrev = False
    parser.epilog = _EPILOG
    parser.add_argument("--config", action="append", required=True, help="config of fit; may be given several times")
    parser.add_argument("--sizes", nargs="+", required=True, help="numbers of training examples; full: all of them")
    parser.add_argument("--output", required=True, help="folder of the sweep")
    options, rest = parser.parse_known_args(args)
    check_words(options.sizes)
    check_options(rest)
    fit_options = [word for path in options.config for word in ("--config", path)] + rest
    return _sweep(Path(options.output).expanduser(), options.sizes, fit_options)


def _sweep(sweep: Path, words: Sequence[str], options: Sequence[str]) -> int:
    from sft_lightning.checkpointing.folder import is_run
    from sft_lightning.cli.lightning_cli import parse_fit
    from sft_lightning.reporting.sweep import is_finished, run_folder

    parsed = parse_fit([*options, "--data.max_train_examples", "null"])
    config = parsed.saved
    check_config(config)
    # Before anything is trained: the tokens that every run will find in the cache, and how many rows there are.
    tokens = parsed.built.data.training_tokens
    sizes = sizes_of(words, len(tokens))
    shared = shared_config(config, tokens.fingerprint)
    state = _read(sweep)
    if state is not None:
        check_same_config(state["config"], shared, str(sweep))
    known = {} if state is None else state["num_examples"]
    for label in sizes:
        if label not in known and is_run(run_folder(sweep, label)):
            raise UserError(f"'{run_folder(sweep, label)}' holds a run that this sweep does not know; move it away")
    state = {"config": shared, "num_rows": len(tokens), "num_examples": {**known, **sizes}}
    _write(sweep, state)
    for label, size in sizes.items():
        if is_finished(run_folder(sweep, label)):
            print(f"sweep: size {label} is finished", flush=True)
            continue
        print(f"sweep: size {label}, {size} of {len(tokens)} rows", flush=True)
        try:
            code = _fit(_arguments(sweep, label, options))
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        if code != 0:
            _write(sweep, state)
            print(f"sweep: stopped in size {label} (exit code {code}); the same command goes on", file=sys.stderr)
            return code
        _write(sweep, state)
    print(_write(sweep, state))
    print(f"table: {sweep / 'sweep.md'}\nplot:  {sweep / 'sweep.png'}")
    return 0


def _arguments(sweep: Path, label: str, options: Sequence[str]) -> list[str]:
    from sft_lightning.reporting.sweep import run_folder

    size = "null" if label == FULL else label
    own = ["--output_dir", str(run_folder(sweep, label)), "--data.max_train_examples", size, "--ckpt_path", "auto"]
    return ["fit", *options, *own]


def _fit(arguments: Sequence[str]) -> int:
    """Runs ``fit`` in a process of its own, which shares the terminal. Returns its exit code.

    Memory is then as after a fresh start, and what kills a run spares the sweep.
    """

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    process = subprocess.Popen([sys.executable, "-m", "sft_lightning", *arguments])
    try:
        code = process.wait()
    except BaseException as error:
        try:
            if isinstance(error, KeyboardInterrupt):
                # A Ctrl-C in a terminal reaches the run, too, which then ends by itself.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SECONDS_TO_END)
        finally:  # after a second Ctrl-C, too
            process.terminate()
            process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return 128 - code if code < 0 else code


def _read(sweep: Path) -> dict[str, Any] | None:
    path = sweep / "sweep.json"
    if not path.exists():
        return None
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(state[name]) for name in ("config", "num_examples")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read as the state of a sweep: {error!r}; move it away") from None


def _write(sweep: Path, state: dict[str, Any]) -> str:
    """Writes what is known by now; returns the table."""
    from sft_lightning.evaluation.result import write_whole
    from sft_lightning.reporting.sweep import read_results, report, size_table
    from sft_lightning.reporting.sweep_plot import draw

    try:
        sweep.mkdir(parents=True, exist_ok=True)
        results = read_results(sweep, state["num_examples"])
        content = {**state, "results": [result.as_dict() for result in results]}
        write_whole(sweep / "sweep.json", json.dumps(content, indent=1) + "\n")
        if results:
            write_whole(sweep / "sweep.md", report(results))
            draw(results, sweep / "sweep.png")
    except OSError as error:
        raise UserError(f"--output '{sweep}' cannot be written: {error}") from None
    return size_table(results)


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
