"""SFTCLI: fit, validate, test and predict by LightningCLI, with a run folder and errors of one line."""

import importlib.util
import os
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.checkpointing.run_folder import prepare_run_folder, register_file, starts_new_run
from sft_lightning.cli.console import set_up_logging, shorten
from sft_lightning.errors import UserError
from sft_lightning.lightning_compat.loops import reruns_end
from sft_lightning.system.out_of_memory import translate_out_of_memory
from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation
from sft_lightning.training.callbacks.predictions import PredictionWriter
from sft_lightning.training.callbacks.progress import StepProgress
from sft_lightning.training.callbacks.row_losses import RowLossRecorder
from sft_lightning.training.callbacks.run_report import RunReport
from sft_lightning.training.callbacks.throughput import Throughput
from sft_lightning.training.datamodule import SFTDataModule
from sft_lightning.training.loggers.metrics_csv import MetricsCSVLogger
from sft_lightning.training.module import SFTModule

# The guide's hyperparameters, where Lightning's own defaults differ.
_TRAINER_DEFAULTS = {"max_epochs": 3, "accumulate_grad_batches": 8, "gradient_clip_val": 1.0, "log_every_n_steps": 10}
_CHECKPOINT_WORDS = ("auto", "last", "best")
# What runs out of memory in the steps of a run has more to say than this.
_BESIDE_STEPS = "what stands around the steps: loading, moving or saving the model, reading data"
_BESIDE_STEPS_ADVICE = (
    "What helps: a smaller model; --trainer.precision bf16-true; several devices with configs/overlays/fsdp2.yaml; "
    "--data.num_workers 0. Checkpoints that were written are untouched"
)
# Any one of the packages will do; the extra of the first one's name installs it.
_LOGGER_PACKAGES = {"TensorBoardLogger": ("tensorboard", "tensorboardX"), "WandbLogger": ("wandb",)}


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, without the usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(shorten(message)) from ex


class SFTCLI(LightningCLI):
    """LightningCLI with one run folder: ``output_dir`` holds the checkpoints, the config, metrics and evaluations."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--output_dir", type=str, default="checkpoints/sft", help="Folder of the run.")
        parser.add_argument(
            "--validate_every_n_steps",
            type=int | None,
            default=None,
            help="Validate after every so many optimizer steps; by default at the end of each epoch.",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="Replace the run that output_dir holds, file by file."
        )
        parser.add_argument(
            "--resume_override",
            action="store_true",
            help="Go on from a checkpoint with another learning rate or schedule than it was trained with.",
        )
        parser.add_lightning_class_args(HFCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GenerationEvaluation, "evaluation")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in _CHECKPOINT_WORDS and not Path(path).is_dir():
            # A file, besides, would make Lightning let the checkpoint's hyperparameters override the command line's.
            raise UserError(f"--ckpt_path '{path}' is not a folder; name a checkpoint-<step>, last, best or auto")

    def before_instantiate_classes(self) -> None:
        """Fills in what follows from other options, and makes sure of the folder of a run that begins."""
        self.fill_in_config()
        config = self.config[self.subcommand]
        run = Path(config.checkpoint.dirpath)
        scheduler = _restarted_by() if self.subcommand == "fit" else None
        if scheduler is not None and (config.ckpt_path is None or folders.checkpoints(run)):
            print(f"started again by {scheduler}: goes on as with --ckpt_path auto")
            config.ckpt_path, config.checkpoint.overwrite = "auto", False
        config.ckpt_path = self._resolve_checkpoint(config.ckpt_path)
        begins = self.subcommand == "fit" and starts_new_run(config.ckpt_path, run)
        if begins and not config.checkpoint.overwrite and not config.trainer.fast_dev_run:
            prepare_run_folder(run, overwrite=False)

    def fill_in_config(self) -> None:
        """Fills in what follows from other options, where the user left it open."""
        # Saved as it is now: with another output_dir or model_path the same file shall follow those.
        self.config_to_save = self._config_to_save()
        config = self.config[self.subcommand]
        config.output_dir = str(Path(config.output_dir).expanduser())
        config.checkpoint.dirpath = str(Path(config.checkpoint.dirpath or config.output_dir).expanduser())
        config.evaluation.output_dir = config.evaluation.output_dir or config.output_dir
        config.data.tokenizer_path = config.data.tokenizer_path or config.model.model_path
        config.checkpoint.overwrite = config.checkpoint.overwrite or config.overwrite
        config.model.resume_override = config.model.resume_override or config.resume_override
        if config.model.generator is None:
            config.model.generator = config.evaluation.generator
        if config.data.grader is None:
            config.data.grader = config.evaluation.grader
        if config.validate_every_n_steps is not None:
            if config.validate_every_n_steps < 1:
                raise UserError(f"validate_every_n_steps must be at least 1, got {config.validate_every_n_steps}")
            config.trainer.val_check_interval = config.validate_every_n_steps * config.trainer.accumulate_grad_batches
            config.trainer.check_val_every_n_epoch = None
        _check_logger_packages(config.trainer.logger)

    def _config_to_save(self) -> dict[str, Any]:
        """Returns the whole config but for what a user says to this one start: where from, and over what."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False, format="yaml"))[self.subcommand]
        config.update(ckpt_path=None, overwrite=False, resume_override=False)
        config["checkpoint"]["overwrite"] = config["model"]["resume_override"] = False
        return config

    def _resolve_checkpoint(self, word: str | None) -> str | None:
        """Returns the folder that --ckpt_path stands for."""
        config = self.config[self.subcommand]
        if word not in _CHECKPOINT_WORDS:
            return word
        run = Path(config.checkpoint.dirpath)
        folder = folders.find(run, word)
        if folder is None:
            print(f"--ckpt_path auto: no checkpoint in '{run}', starting fresh")
            # Of a run that died before its first checkpoint there are only traces, which may be replaced.
            config.checkpoint.overwrite = not (run / "final").exists()
            return None
        print(f"--ckpt_path {word}: '{folder}'")
        return str(folder)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        chosen = config.trainer
        callbacks: list[Callback] = [Throughput(), SavedConfig(self), PredictionWriter(config.output_dir)]
        if self.subcommand == "fit":
            callbacks.append(RowLossRecorder(config.output_dir))
        has_bar = any(isinstance(callback, ProgressBar) for callback in chosen.callbacks or [])
        if chosen.enable_progress_bar is not False and not has_bar:
            callbacks.append(StepProgress(every_n_steps=chosen.log_every_n_steps or 10))
        if self.subcommand == "fit":
            callbacks.append(RunReport(config.output_dir))
        self.trainer_defaults["callbacks"] = callbacks
        loggers: Any = chosen.logger
        if self.subcommand == "fit" and loggers is not False and not chosen.fast_dev_run:
            others = [] if loggers in (None, True) else loggers if isinstance(loggers, list) else [loggers]
            loggers = [*others, MetricsCSVLogger(config.output_dir)]
        elif loggers in (None, True):
            loggers = False
        root = chosen.default_root_dir or config.output_dir
        return super().instantiate_trainer(logger=loggers, default_root_dir=root, **kwargs)

    def after_fit(self) -> None:
        """Says so when there was nothing left to do, or nothing but the end."""
        path = self.config[self.subcommand].ckpt_path
        if path is None or not (Path(path) / folders.MANIFEST).is_file():  # pruned since
            return
        if folders.read_manifest(Path(path)).get("step") != self.trainer.global_step:
            return
        steps = f"the run has finished its {self.trainer.global_step} optimizer steps"
        if reruns_end(self.trainer):
            print(f"{steps}, but had died before its end, which is made good")
        else:
            print(f"nothing to do: {steps}; raise --trainer.max_epochs or --trainer.max_steps to go on")


class SavedConfig(Callback):
    """Writes the resolved config beside the checkpoints, once training is sure to start.

    A resumed run leaves ``config.yaml`` alone and writes ``config.resume-<step>.yaml``.
    """

    def __init__(self, cli: SFTCLI) -> None:
        self._cli = cli

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        cli = self._cli
        run = Path(cli.config[cli.subcommand].output_dir)
        step = trainer.global_step
        name = "config.yaml" if step == 0 else f"config.resume-{step}.yaml"
        register_file(run, name)
        text = yaml.safe_dump(cli.config_to_save, sort_keys=False)
        (run / name).write_text(text, encoding="utf-8")


def run_trainer_command(args: list[str]) -> None:
    """Runs fit, validate, test or predict.

    Raises:
        UserError: For a mistake in the command, the config or the data, Lightning's own kinds included.
    """
    _start(_cli_for(args[0]), args)


class ParsedFit(NamedTuple):
    """What ``fit`` would start with.

    Attributes:
        config: The resolved config.
        built: The same with ``data``, ``model``, ``evaluation`` and ``checkpoint`` instantiated.
        saved: What would be in ``config.yaml``.
    """

    config: Any
    built: Any
    saved: dict[str, Any]


def parse_fit(args: list[str]) -> ParsedFit:
    """Returns what ``fit`` would start with, without a Trainer, weights or a run folder. Nothing is written.

    Args:
        args: The options of ``fit``.

    Raises:
        UserError: As ``fit`` does.
    """
    cli = _start(_fit_without_run(), ["fit", *args])
    return ParsedFit(cli.config["fit"], cli.config_init["fit"], cli.config_to_save)


def _start(cli: type[SFTCLI], args: list[str]) -> SFTCLI:
    set_up_logging()
    options: dict[str, Any] = {
        "parser_class": OneLineParser,
        "seed_everything_default": 42,
        "trainer_defaults": dict(_TRAINER_DEFAULTS),
        "save_config_callback": None,
        "auto_configure_optimizers": False,
        "parser_kwargs": {"default_env": True, "env_prefix": "SFT"},
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with translate_out_of_memory(lambda: _BESIDE_STEPS, lambda: _BESIDE_STEPS_ADVICE, lambda: device):
            return cli(SFTModule, SFTDataModule, args=args, **options)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if "multiplied should equal the world size" not in str(error):
            raise
        raise UserError(
            f"trainer.strategy: {error} Set data_parallel_size to the number of devices and tensor_parallel_size to 1"
        ) from error
    except SystemExit as error:
        # Lightning's own way out after Ctrl-C, with the code of any failure.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def _restarted_by() -> str | None:
    """Returns who starts this command for another time, as it stands in its environment."""
    counts = {"SLURM": "SLURM_RESTART_COUNT", "torchrun": "TORCHELASTIC_RESTART_COUNT"}
    return next((name for name, variable in counts.items() if os.environ.get(variable, "0") != "0"), None)


def _check_logger_packages(loggers: Any) -> None:
    """Raises UserError for a logger whose package is not there, which jsonargparse would bury in a union's errors."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        name = str(getattr(logger, "class_path", "")).rpartition(".")[2]
        packages = _LOGGER_PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise UserError(f"trainer.logger {name} needs a package: pip install 'sft-lightning[{packages[0]}]'")


def _cli_for(command: str) -> type[SFTCLI]:
    """Returns an SFTCLI that knows one command: the parsers of all four take three times as long to build."""
    parameters_not_offered = SFTCLI.subcommands()[command]

    class CommandCLI(SFTCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: parameters_not_offered}

    return CommandCLI


def _fit_without_run() -> type[SFTCLI]:
    """Returns an SFTCLI that stops when the classes of `fit` stand, but for its Trainer."""

    class ParsedCLI(_cli_for("fit")):  # type: ignore[misc]
        def before_instantiate_classes(self) -> None:
            self.fill_in_config()
            trainer = self.config[self.subcommand].trainer
            trainer.logger = trainer.callbacks = None  # some write as soon as they are made

        def instantiate_classes(self) -> None:
            self.config_init = self.parser.instantiate_classes(self.config)
            self.subcommand = None  # which LightningCLI would run now

    return ParsedCLI
