"""Train on growing numbers of examples and compare the results in one table and one plot.

    DIR/size-128/ ... DIR/size-full/    runs of `fit`, each in its own process
    DIR/sweep.json                      the config they share, the sizes and the results so far
    DIR/sweep.md  DIR/sweep.png         the tables and the plot

The files are rewritten after each run. A run that fails ends the sweep with the exit code of its `fit`: the cause
usually affects the next, larger run too. The same command resumes the sweep, however it ended.
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

FULL = "full"
# Set by the sweep for each run, so the user must not.
_OPTIONS_OF_SWEEP = ("--output_dir", "--data.max_train_examples", "--ckpt_path", "--overwrite")
# Each run has its own value.
_OF_ONE_RUN = ("output_dir", "data.max_train_examples")
# Affect neither tokens nor weights.
_FREE = ("data.cache_dir", "data.num_workers")
_SECONDS_TO_END = 10
_EPILOG = (
    "All other options are those of fit, such as --trainer.max_epochs 1, and apply to every size. A larger size "
    "contains the smaller ones: each is the first rows in file order. After a crash or Ctrl-C, the same command "
    "resumes the sweep."
)


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = CommandParser(
        "sweep", "Train on growing subsets of the data and compare the answers, to see how much is needed."
    )
    parser.allow_abbrev = False
    parser.epilog = _EPILOG
    parser.add_argument("--config", action="append", required=True, help="config of fit; may be repeated")
    parser.add_argument("--sizes", nargs="+", required=True, help="numbers of training examples; full means all")
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
    # Tokenize before training: this counts the rows, and every run then finds the tokens in the cache.
    tokens = parsed.built.data.training_tokens
    sizes = sizes_of(words, len(tokens))
    shared = shared_config(config, tokens.fingerprint)
    state = _read(sweep)
    if state is not None:
        check_same_config(state["config"], shared, str(sweep))
    known = {} if state is None else state["num_examples"]
    for label in sizes:
        if label not in known and is_run(run_folder(sweep, label)):
            raise UserError(f"'{run_folder(sweep, label)}' holds a run that is not part of this sweep; move it away")
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
            print(f"sweep: stopped in size {label} (exit code {code}); the same command resumes it", file=sys.stderr)
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
    """Runs ``fit`` in its own process, which shares the terminal. Returns its exit code.

    Each run starts with free memory, and a killed run does not kill the sweep.
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
                # A Ctrl-C in a terminal reaches the run too, which then ends by itself.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SECONDS_TO_END)
        finally:  # also after a second Ctrl-C
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
    """Writes the results so far; returns the table."""
    from sft_lightning.reporting.sweep import read_results, report, size_table
    from sft_lightning.reporting.sweep_plot import draw
    from sft_lightning.system.files import write_atomically

    try:
        sweep.mkdir(parents=True, exist_ok=True)
        results = read_results(sweep, state["num_examples"])
        content = {**state, "results": [result.as_dict() for result in results]}
        with write_atomically(sweep / "sweep.json") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        if results:
            with write_atomically(sweep / "sweep.md") as file:
                file.write(report(results))
            draw(results, sweep / "sweep.png")
    except OSError as error:
        raise UserError(f"--output '{sweep}' cannot be written: {error}") from None
    return size_table(results)


def check_words(words: Sequence[str]) -> None:
    """Raises UserError for the first size that is neither a positive number nor ``full``."""
    for word in words:
        if word != FULL and not (word.isascii() and word.isdigit() and int(word) > 0):
            raise UserError(f"--sizes '{word}' is not a size: give numbers of training examples, at least 1, or {FULL}")


def sizes_of(words: Sequence[str], num_rows: int) -> dict[str, int]:
    """Returns label -> number of examples, smallest first, each number once; ``full`` means all rows.

    Raises:
        UserError: For a word that is not a size, or a number above ``num_rows``.
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
        if name in _OPTIONS_OF_SWEEP:
            raise UserError(f"sweep sets {name} for each size: remove it; --output names the folder of the sweep")


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UserError if runs of this config would have no graded answers to compare."""
    val_path, num_examples = config["data"]["val_path"], config["evaluation"]["num_examples"]
    if val_path is None or num_examples == 0:
        raise UserError(
            "sweep compares graded answers: set data.val_path, and evaluation.num_examples above 0, "
            f"got {val_path} and {num_examples}"
        )


def shared_config(config: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns, by dotted name, all settings that must be equal in all runs of a sweep.

    Args:
        config: Content of a run's ``config.yaml``.
        fingerprint: Fingerprint of the training tokens: the files behind a path or a tokenizer's name may change.
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
    """Raises UserError for the first setting that differs from the config of the sweep's runs."""
    for name in {**saved, **own}:
        if saved.get(name) != own.get(name):
            raise UserError(
                f"sweep '{sweep}' was started with another config: {name} was {saved.get(name)!r} and is now "
                f"{own.get(name)!r}; set it back, or give another folder as --output"
            )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves += _leaves(value, f"{name}.") if isinstance(value, Mapping) and value else [(name, value)]
    return leaves
