"""The command line. Answers --help and --version, and finds mistakes in the command, before anything heavy loads."""

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
  prepare gsm8k       raw GSM8K rows -> prompt/response/ground_truth
  prepare quickstart  the embedded data set, with a tiny model and tokenizer made on the spot
  check               looks at the data before a GPU is busy, with the options of fit
  selftest            tries layouts, splits and resuming on your model and rows, with the options of fit
  fit                 train:               sft-lightning fit --config configs/sft_gsm8k.yaml
  validate            loss and graded answers on data.val_path
  test                loss and graded answers on data.test_path
  predict             answers to the prompts of data.test_path, as predictions.jsonl
  evaluate            graded answers of any model: the baseline and the final measurement
  compare             two evaluations on the same prompts: what changed, and whether it is more than chance
  report              a page with the results of a run, finished or not:  sft-lightning report checkpoints/sft
  replay              each row of a step that was not finite, alone through the model
  sweep               a fit for each number of training examples, one table and one plot

sft-lightning COMMAND --help explains a command's options; --version prints the version.
Exit code: 0 done, 1 the run failed, the data would spoil it or a check of selftest fails, 2 a mistake in the command,
the config or the data, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint of the last step, 130 ended by Ctrl-C."""

INTERRUPTED = 128 + 2  # as shells say it of SIGINT

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
    """Runs a command; returns the exit code. The entry point of ``sft-lightning``."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        return _run(args)
    except UserError as error:
        return _fail(error, exit_code=2)
    except RunFailedError as error:
        return 1 if error.everywhere and _is_told_elsewhere() else _fail(error, exit_code=1)
    except StoppedError as error:
        return error.code
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


def _is_told_elsewhere() -> bool:
    """Returns whether this is one of several processes of a run, and not the one that speaks for all."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def _fail(error: BaseException, *, exit_code: int) -> int:
    print(f"sft-lightning: error: {' '.join(str(error).split())}", file=sys.stderr)
    return exit_code
