"""The command line. Answers --help and --version, and finds mistakes in the command, before anything heavy loads."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from sft_lightning import __version__
from sft_lightning.errors import NonFiniteError, UserError

HELP = """\
usage: sft-lightning COMMAND [options]

Supervised fine-tuning of Hugging Face causal language models with PyTorch Lightning.

commands:
  prepare gsm8k       raw GSM8K rows -> prompt/response/ground_truth
  prepare quickstart  the embedded data set, with a tiny model and tokenizer made on the spot
  fit                 train:               sft-lightning fit --config configs/sft_gsm8k.yaml
  validate            loss and graded answers on data.val_path
  test                loss and graded answers on data.test_path
  predict             answers to the prompts of data.test_path, as predictions.jsonl
  evaluate            graded answers of any model: the baseline and the final measurement

sft-lightning COMMAND --help explains a command's options; --version prints the version.
Exit code: 0 done, 1 the run failed, 2 a mistake in the command, the config or the data."""

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


class _OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code. The entry point of ``sft-lightning``."""
    args = list(sys.argv[1:] if args is None else args)
    try:
        return _run(args)
    except UserError as error:
        return _fail(error, exit_code=2)
    except NonFiniteError as error:
        return _fail(error, exit_code=1)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if args else 2
    if args[0] == "--version":
        print(f"sft-lightning {__version__}")
        return 0
    command, rest = args[0], args[1:]
    if command == "prepare":
        return _prepare(rest)
    if command == "evaluate":
        return _evaluate(rest)
    if command in _TRAINER_COMMANDS:
        from sft_lightning.trainer_cli import run_trainer_command

        run_trainer_command([command, *rest])
        return 0
    raise UserError(f"unknown command '{command}'; sft-lightning --help lists the commands")


def _prepare(args: list[str]) -> int:
    parser = _OneLineParser(prog="sft-lightning prepare", description="Write data to train on.")
    sources = parser.add_subparsers(dest="source", required=True, metavar="{gsm8k,quickstart}")
    gsm8k = sources.add_parser("gsm8k", help="raw GSM8K rows -> prompt/response/ground_truth in r1_zero form")
    gsm8k.add_argument("--input", required=True, help="JSONL or Parquet with question and answer: file, folder or glob")
    gsm8k.add_argument("--output", required=True, help="the JSONL file to write")
    gsm8k.add_argument("--template_path", help="text file with {question} in it, instead of the built-in preamble")
    quickstart = sources.add_parser("quickstart", help="the embedded data set, tiny model and tokenizer")
    quickstart.add_argument("--output", required=True, help="the folder to write into")
    options = parser.parse_args(args)
    if options.source == "gsm8k":
        from sft_lightning.commands import prepare_gsm8k

        num_rows = prepare_gsm8k(options.input, options.output, template_path=options.template_path)
        print(f"wrote {num_rows} rows to {options.output}")
    else:
        from sft_lightning.modeling import hide_progress_bars
        from sft_lightning.quickstart.prepare import prepare_quickstart

        hide_progress_bars()
        prepare_quickstart(options.output)
        print(f"wrote arithmetic problems, a tokenizer and a model to {options.output}; it starts from random weights")
    return 0


def _evaluate(args: list[str]) -> int:
    parser = _OneLineParser(prog="sft-lightning evaluate", description="Graded answers of a model.")
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument("--data", required=True, help="JSONL or Parquet: file, folder or glob")
    parser.add_argument("--output", required=True, help="folder for predictions.jsonl and metrics.json")
    parser.add_argument("--template", default="auto", choices=["auto", "Plain", "R1Zero"], help="default: auto")
    parser.add_argument("--num_examples", type=int, help="the first so many rows; default: all")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="default: 1024")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1.0")
    parser.add_argument("--greedy", action="store_true", help="take the most likely token each time")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")
    parser.add_argument("--grader", default="R1ZeroGrader", choices=["R1ZeroGrader"], help="default: R1ZeroGrader")
    parser.add_argument("--batch_tokens", type=int, default=65536, help="tokens of a batch at the most; default: 65536")
    options = parser.parse_args(args)
    from sft_lightning.commands import evaluate_model

    result = evaluate_model(**vars(options))
    for name in ("format", "answer"):
        correct, rate = getattr(result, f"num_{name}_correct"), getattr(result, f"{name}_accuracy")
        print(f"{name} accuracy  {rate:.3f}  ({correct} of {result.num_examples})")
    print(f"samples: {options.output}/predictions.jsonl")
    return 0


def _fail(error: Exception, *, exit_code: int) -> int:
    print(f"sft-lightning: error: {' '.join(str(error).split())}", file=sys.stderr)
    return exit_code
