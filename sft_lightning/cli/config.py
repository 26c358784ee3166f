"""Define the options of the Trainer commands and resolve the values that depend on them."""

import os
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_only

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.run_folder import (
    open_run_folder,
    refuse_other_run,
    starts_new_run,
)
from sft_lightning.checkpointing.run_state import read_run_state, scheduler_job
from sft_lightning.errors import UserError
from sft_lightning.system.files import user_path

# Argument of a class -> the option of the command that sets it. On the command line it has no other spelling.
_SET_BY = {
    "checkpoint.dirpath": "output_dir",
    "checkpoint.overwrite": "overwrite",
    "evaluation.output_dir": "output_dir",
    "model.resume_override": "resume_override",
}
# Argument -> the argument whose value it takes where the user leaves it unset.
_DEFAULTS_TO = {
    "data.grader": "evaluation.grader",
    "data.tokenizer_path": "model.model_path",
    "model.generator": "evaluation.generator",
}
# Without max_epochs and max_steps. Lightning's own default is 1000.
_MAX_EPOCHS = 3
# How this one start differs from the next one with the same config.
_OF_ONE_START = {"ckpt_path": None, "overwrite": False, "resume_override": False}
_CHECKPOINT_WORDS = ("auto", "last", "best")

# jsonargparse passes defaults such as the interval of Lightning's Timer to yaml as they are.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class ParsedFit(NamedTuple):
    """What ``fit`` would start with.

    Attributes:
        config: The resolved config.
        built: The same with ``data``, ``model``, ``evaluation`` and ``checkpoint`` instantiated.
        saved: The content of ``config.yaml``.
    """

    config: Any
    built: Any
    saved: dict[str, Any]


def add_options(parser: LightningArgumentParser) -> None:
    """Adds the options that belong to the command, not to a class."""
    parser.add_argument("--output_dir", type=str, default="checkpoints/sft", help="Folder of the run.")
    parser.add_argument(
        "--validate_every_n_steps",
        type=int | None,
        default=None,
        help="Validate every n optimizer steps; by default at the end of each epoch.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Delete the run in output_dir and start a new one.")
    parser.add_argument(
        "--resume_override",
        action="store_true",
        help="Resume with another learning rate, schedule, clipping, precision or optimizer options than before.",
    )


def resolve_max_epochs(trainer: Any) -> None:
    """Sets ``max_epochs`` if the user has not: no limit beside ``max_steps``, as in transformers."""
    if trainer.max_epochs is None:
        trainer.max_epochs = _MAX_EPOCHS if trainer.max_steps == -1 else -1


def config_to_save(parser: LightningArgumentParser, config: Any, command: str) -> dict[str, Any]:
    """Returns the content of ``config.yaml``: all options but those of this one start.

    Call it before ``resolve_options``: a saved config must follow another ``output_dir`` or ``model_path`` that the
    user gives with it.
    """
    saved = yaml.safe_load(parser.dump(config, skip_none=False, format="yaml"))[command]
    for name in _SET_BY:
        section, _, argument = name.partition(".")
        del saved[section][argument]
    return {**saved, **_OF_ONE_START}


def resolve_options(config: Any) -> None:
    """Fills in the arguments that follow from other options.

    Raises:
        UserError: If an argument is set that an option of the command sets, or an option is invalid.
    """
    try:
        config.output_dir = str(Path(user_path(config.output_dir)))
    except UserError as error:
        raise UserError(f"output_dir: {error}") from None
    for argument, option in _SET_BY.items():
        if config[argument]:
            raise UserError(f"{argument} cannot be set: remove it and use --{option}, which sets it")
        config[argument] = config[option]
    for argument, other in _DEFAULTS_TO.items():
        if config[argument] is None:
            config[argument] = config[other]
    if config.validate_every_n_steps is not None:
        if config.validate_every_n_steps < 1:
            raise UserError(f"validate_every_n_steps must be at least 1, got {config.validate_every_n_steps}")
        config.trainer.val_check_interval = config.validate_every_n_steps * config.trainer.accumulate_grad_batches
        config.trainer.check_val_every_n_epoch = None


def check_checkpoint_path(path: str | None) -> None:
    """Raises UserError unless the value of ``--ckpt_path`` is a folder, auto, last or best."""
    # For a file, Lightning would also let the checkpoint's hyperparameters override the command line's.
    if path and path not in _CHECKPOINT_WORDS and not os.path.isdir(path):  # noqa: PTH112 - false for a long path, too
        raise UserError(f"--ckpt_path '{path}' is not a folder; name a checkpoint-<step>, last, best or auto")


def resolve_start(config: Any, *, is_fit: bool) -> None:
    """Replaces the value of ``--ckpt_path`` by a folder, and locks the folder of the run.

    Raises:
        UserError: If last or best names no checkpoint, or ``output_dir`` holds another run, is in use by another
            process or cannot be written.
    """
    run = Path(config.output_dir)
    writes = is_fit and not config.trainer.fast_dev_run
    # Other ranks of this fit only read: rank 0 holds the lock.
    if writes and getattr(rank_zero_only, "rank", 0) == 0:
        open_run_folder(run)
    scheduler = _restarted_by() if is_fit else None
    if scheduler is not None and _is_of_this_job(run) and (config.ckpt_path is None or folders.checkpoints(run)):
        print(f"restarted by {scheduler}: continues as with --ckpt_path auto")
        config.ckpt_path, config.checkpoint.overwrite = "auto", False
    if config.ckpt_path in _CHECKPOINT_WORDS:
        _resolve_checkpoint_word(config, run)
    if writes and starts_new_run(config.ckpt_path, run) and not config.checkpoint.overwrite:
        refuse_other_run(run)


def _is_of_this_job(run: Path) -> bool:
    """Returns whether this scheduler's job started the run in a folder, rather than being about to replace it."""
    state = read_run_state(run)
    return state is None or state.job == scheduler_job()


def _resolve_checkpoint_word(config: Any, run: Path) -> None:
    word = config.ckpt_path
    folder = folders.find(run, word)
    if folder is None:
        print(f"--ckpt_path auto: no checkpoint in '{run}', starting fresh")
        # A run that died before its first checkpoint leaves only traces, which may be replaced.
        config.checkpoint.overwrite = not (run / "final").exists()
        config.ckpt_path = None
    else:
        print(f"--ckpt_path {word}: '{folder}'")
        config.ckpt_path = str(folder)


def _restarted_by() -> str | None:
    """Returns the name of the scheduler that restarted this command, None on its first start."""
    counts = {"SLURM": "SLURM_RESTART_COUNT", "torchrun": "TORCHELASTIC_RESTART_COUNT"}
    return next((name for name, variable in counts.items() if os.environ.get(variable, "0") != "0"), None)
