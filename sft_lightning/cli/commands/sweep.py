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
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError

_SECONDS_TO_END = 10
_EPILOG = (
    "All other options are those of fit, such as --trainer.max_epochs 1, and hold for every size. A larger size "
    "contains the smaller: each is the first rows in file order. The same command goes on after a crash or a Ctrl-C."
)


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    from sft_lightning.reporting.sweep_settings import check_options, check_words

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
    from sft_lightning.reporting.sweep_settings import check_config, check_same_config, shared_config, sizes_of

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
    from sft_lightning.reporting.sweep_settings import FULL

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
    from sft_lightning.reporting.sweep import read_results
    from sft_lightning.reporting.sweep_plot import draw
    from sft_lightning.reporting.sweep_table import report, size_table
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
