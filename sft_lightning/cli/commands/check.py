"""Check the data of a config as fit reads it, before a model is loaded."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sft_lightning.cli.parser import CommandParser
from sft_lightning.errors import UserError

if TYPE_CHECKING:
    from sft_lightning.diagnostics.check.check import CheckReport, CheckSettings
    from sft_lightning.diagnostics.check.memory_estimate import Device

_DESCRIPTION = """\
Check the data of a config as fit reads it, without loading weights. Takes every option of fit as well, see
sft-lightning fit --help. Exit code: 0 if the data is fine, 1 if it would harm the run, 2 for a mistake in the command
or the config."""


def run(args: list[str]) -> int:
    """Runs the command; returns the exit code."""
    parser = CommandParser("check", _DESCRIPTION)
    parser.allow_abbrev = False
    parser.add_argument("--json", action="store_true", help="print one JSON document that lists every place")
    parser.add_argument("--memory_gib", type=float, help="memory of the training device; default: of this one")
    options, of_fit = parser.parse_known_args(args)
    if options.memory_gib is not None and not 0 < options.memory_gib < float("inf"):
        raise UserError(f"--memory_gib must be a positive number of GiB, got {options.memory_gib}")
    report = _check(of_fit, options.memory_gib)
    if options.json:
        print(json.dumps(report.as_dict(), indent=1))
    else:
        from rich.console import Console

        from sft_lightning.diagnostics.check.rendering import render

        render(report, Console(highlight=False, soft_wrap=False))
    return report.exit_code


def _check(of_fit: list[str], memory_gib: float | None) -> "CheckReport":
    from rich.console import Console

    from sft_lightning.cli.lightning_cli import parse_fit
    from sft_lightning.diagnostics.check.check import check
    from sft_lightning.models.loading import hide_progress_bars

    hide_progress_bars()
    parsed = parse_fit(of_fit)
    settings = _settings(parsed.config, parsed.built, memory_gib)
    # The report contains what the reader of rows warns about.
    with _only_errors("sft_lightning.data"), Console(stderr=True).status("") as status:
        return check(settings, status.update)


def _settings(config: Any, built: Any, memory_gib: float | None) -> "CheckSettings":
    """Returns the settings of the check, from the config of fit and the classes built from it."""
    from sft_lightning.data.batching.plan import StepShape
    from sft_lightning.diagnostics.check.check import CheckSettings
    from sft_lightning.diagnostics.check.rows import CheckedSet
    from sft_lightning.grading.graders import R1ZeroGrader
    from sft_lightning.models.precision import Precision

    data, trainer = built.data, config.trainer
    names = ["train", "val"] if "val" in data.sets else ["train"]
    return CheckSettings(
        sets=tuple(CheckedSet(name, data.settings(name), data.tokenizer) for name in names),
        step_shape=StepShape(data.batch_size, trainer.accumulate_grad_batches, _num_replicas(trainer)),
        layout=data.layout,
        pad_to_multiple_of=data.pad_to_multiple_of,
        seed=data.seed,
        grader=built.evaluation.grader or R1ZeroGrader(),
        num_graded_answers=built.evaluation.num_examples,
        model_path=config.model.model_path,
        precision=Precision.named(trainer.precision),
        gradient_checkpointing=config.model.gradient_checkpointing,
        with_entropy=config.model.log_token_statistics,
        device=_device(trainer, memory_gib),
    )


def _num_replicas(trainer: Any) -> int:
    """Returns the number of devices that share a step, as far as the config determines it."""
    devices = trainer.devices
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        num_devices = len(devices)
    elif isinstance(devices, int) and devices > 0:
        num_devices = devices
    else:
        num_devices = _num_cuda_devices() if trainer.accelerator != "cpu" else 1
    return max(1, num_devices) * trainer.num_nodes


def _num_cuda_devices() -> int:
    import torch

    return torch.cuda.device_count()


def _device(trainer: Any, memory_gib: float | None) -> "Device":
    import torch

    from sft_lightning.diagnostics.check.memory_estimate import Device

    on_cuda = trainer.accelerator != "cpu" and torch.cuda.is_available()
    if memory_gib is not None:
        return Device("the device asked for", int(memory_gib * 2**30), trainer.accelerator != "cpu", is_known=True)
    if on_cuda:
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, properties.total_memory, is_cuda=True, is_known=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("this machine's memory", memory, is_cuda=False, is_known=trainer.accelerator == "cpu")


@contextmanager
def _only_errors(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
