"""Check that layouts, splits and resuming give equal results on the user's model and data."""

import copy
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from sft_lightning.diagnostics.selftest.result import Outcome
    from sft_lightning.diagnostics.selftest.setup import SelftestSetup

_DESCRIPTION = """\
Test a few optimizer steps of a config on one device, with its model and its first rows. Compares the gradients of every
layout (padded, packed, shared_prefix), with the step split into micro-batches in several ways, with those of each row
alone through the model's own forward, and a resumed run with an uninterrupted one. Takes every option of fit as well,
see sft-lightning fit --help. Prints the largest differences and leaves nothing in output_dir. Exit code: 0 if all
checks pass, 1 if one fails, 2 for a mistake in the command, the config or the data."""
_HALF_ATTENTION = ("flash_attention_2", "flash_attention_3", "varlen")


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = CommandParser("selftest", _DESCRIPTION)
    parser.allow_abbrev = False
    parser.add_argument("--num_steps", type=int, default=2, help="optimizer steps to compare; the last one is short")
    parser.add_argument(
        "--tolerance", type=float, help="allowed difference of gradients; default: 1e-5 in float32, 5e-2 in 16 bits"
    )
    options, of_fit = parser.parse_known_args(args)
    if options.num_steps < 2:
        raise UserError(f"--num_steps must be at least 2, a full step and a short one, got {options.num_steps}")
    if options.tolerance is not None and not 0 < options.tolerance < math.inf:
        raise UserError(f"--tolerance must be a positive number, got {options.tolerance}")
    outcomes = _outcomes(of_fit, options.num_steps, options.tolerance)
    print(_table(outcomes))
    num_failed = sum(outcome.failed for outcome in outcomes)
    num_compared = sum(outcome.difference is not None for outcome in outcomes)
    print(f"{num_failed} of {num_compared} checks FAIL" if num_failed else f"all {num_compared} checks pass")
    return 1 if num_failed else 0


def _outcomes(of_fit: list[str], num_steps: int, tolerance: float | None) -> "list[Outcome]":
    from rich.console import Console

    from sft_lightning.cli.lightning_cli import parse_fit
    from sft_lightning.diagnostics.selftest.gradients import check_gradients, settled
    from sft_lightning.diagnostics.selftest.resume import check_resume

    parsed = parse_fit(of_fit)
    outcomes = []
    with (
        tempfile.TemporaryDirectory(prefix="sft-selftest-") as folder,
        _quiet(),
        Console(stderr=True).status("") as status,
    ):
        setup = _setup(parsed.config, parsed.built, num_steps, Path(folder))
        for each in _precisions(setup):
            for outcome in settled(check_gradients(each, tolerance), each, tolerance):
                outcomes.append(replace(outcome, check=f"{outcome.check}, {each.precision.name}"))
                status.update(f"{outcome.check}: {outcome.verdict}")
        status.update("save and resume")
        outcomes.append(check_resume(setup))
    return outcomes


def _setup(config: Any, built: Any, num_steps: int, folder: Path) -> "SelftestSetup":
    """Returns the setup of the selftest from the config of fit and the objects built from it."""
    from sft_lightning.diagnostics.selftest.setup import SelftestSetup
    from sft_lightning.models.precision import Precision

    built.data.settings("train")  # raises UserError without a training set
    trainer = config.trainer
    clipping = {name: trainer[name] for name in ("gradient_clip_val", "gradient_clip_algorithm")}
    return SelftestSetup(
        data=built.data,
        model=built.model,
        accumulate=trainer.accumulate_grad_batches,
        clipping=clipping,
        accelerator=trainer.accelerator,
        precision=Precision.named(trainer.precision),
        seed=config.seed_everything if isinstance(config.seed_everything, int) else 42,
        num_steps=num_steps,
        folder=folder,
    )


def _precisions(setup: "SelftestSetup") -> "Iterator[SelftestSetup]":
    """Yields the setup in an exact precision, which shows small differences, then in its own precision if different."""
    from sft_lightning.models.precision import Precision

    attention = setup.model.hparams["attn_implementation"]
    exact = Precision.named("32-true") if setup.precision.is_16_bit else setup.precision
    model = setup.model
    if attention in _HALF_ATTENTION:  # these kernels take 16 bits only
        model = copy.deepcopy(model)
        model.hparams["attn_implementation"] = "auto"
    yield replace(setup, precision=exact, model=model)
    if exact != setup.precision:
        yield setup


def _table(outcomes: "list[Outcome]") -> str:
    rows = [("check", "largest difference", "allowed", "", "where")]
    for each in outcomes:
        difference = "" if each.difference is None else f"{each.difference:.1e}" if each.difference else "0"
        allowed = f"{each.allowed:.0e}" if each.allowed else "0"
        rows.append((each.check, difference, allowed, each.verdict, each.note))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<{widths[3]}}  {row[4]}".rstrip()
        for row in rows
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the log messages and warnings of the runs."""
    loggers = [logging.getLogger(name) for name in ("sft_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
