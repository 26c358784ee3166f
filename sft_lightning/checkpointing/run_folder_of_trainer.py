"""Where the callbacks of a run write."""

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer, output_dir: str | None) -> Path:
    """Returns the folder of the run: the one that was asked for, else that of the checkpoints, else the Trainer's."""
    folder = output_dir or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return Path(folder).expanduser()
