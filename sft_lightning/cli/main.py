"""Dispatch commands. Import heavy packages only after --help, --version and unknown commands are handled."""

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from sft_lightning import __version__
from sft_lightning.errors import RunFailedError, StoppedError, UserError

HELP = """\
usage: sft-lightning COMMAND [options]

Supervised fine-tuning of Hugging Face causal language models with PyTorch Lightning.

commands:
  prepare gsm8k       convert raw GSM8K rows to prompt/response/ground_truth
  prepare quickstart  write the built-in data set, a tiny model and its tokenizer
  check               check the data of a config before training; takes the options of fit
  selftest            test gradients and resuming on your model and rows, before training; takes the options of fit
  fit                 train:  sft-lightning fit --config configs/sft_gsm8k.yaml
  validate            compute the loss of a model and grade its answers on data.val_path, with a config of fit
  test                the same on data.test_path
  predict             answer the prompts of data.test_path without grading; writes predictions.jsonl
  evaluate            generate and grade answers of any model or server, without a config
  compare             show what changed between two evaluations of the same prompts, with a significance test
  report              write a page with the results of a run, also of one that has not finished
  replay              find the row behind a step whose loss or gradient was NaN or infinite
  sweep               train on growing subsets of the data, to see how much of it is needed

sft-lightning COMMAND --help explains a command's options; --version prints the version.
Exit code: 0 success; 1 a run, check or selftest failed; 2 a mistake in the command, the config or the data;
75 stopped by SIGTERM or SIGUSR1, with a checkpoint of the last step; 130 stopped by Ctrl-C."""

INTERRUPTED = 128 + 2  # the exit code of shells for SIGINT

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_OWN_COMMANDS = (  # each a file in commands/
    "prepare",
    "check",
    "selftest",
    "evaluate",
    "compare",
    "report",
    "replay",
    "sweep",
)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. This is the entry point of ``sft-lightning``."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        return _run(args)
    except UserError as error:
        return _fail(error, exit_code=2)
    except RunFailedError as error:
        return 1 if error.everywhere and _is_reported_elsewhere() else _fail(error, exit_code=1)
    except StoppedError as error:
        return error.code
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return _fail(UserError(f"path '{str(error.filename)[:60]}...' is too long"), exit_code=2)
    except KeyboardInterrupt:
        return _fail(KeyboardInterrupt("interrupted"), exit_code=INTERRUPTED)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if args else 2
    if args[0] == "--version":
        print(f"sft-lightning {__version__}")
        return 0
    command, rest = args[0], args[1:]
    if command in _OWN_COMMANDS:
        return importlib.import_module(f"sft_lightning.cli.commands.{command}").run(rest)
    if command in _TRAINER_COMMANDS:
        from sft_lightning.cli.lightning_cli import run_trainer_command

        run_trainer_command([command, *rest])
        return 0
    raise UserError(f"unknown command '{command}'; sft-lightning --help lists the commands")


def _is_reported_elsewhere() -> bool:
    """Returns whether another process of the run reports the error: all of them fail with it."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def _fail(error: BaseException, *, exit_code: int) -> int:
    print(f"sft-lightning: error: {' '.join(str(error).split())}", file=sys.stderr)
    return exit_code
