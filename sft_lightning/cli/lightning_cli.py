"""Run fit, validate, test and predict through LightningCLI."""

from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.cli.config import (
    ParsedFit,
    add_options,
    check_checkpoint_path,
    config_to_save,
    resolve_max_epochs,
    resolve_options,
    resolve_start,
)
from sft_lightning.cli.console import set_up_logging
from sft_lightning.cli.mistakes import Builder, check_values, is_refused_by_lightning, shorten
from sft_lightning.errors import UserError
from sft_lightning.lightning_compat.loops import fit_loop_kind
from sft_lightning.lightning_compat.support import check_strategy
from sft_lightning.system.lock import unlock_folders
from sft_lightning.system.out_of_memory import translate_out_of_memory
from sft_lightning.training.callbacks.defaults import run_defaults
from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation
from sft_lightning.training.datamodule import SFTDataModule
from sft_lightning.training.module import SFTModule

# The reference script's hyperparameters (docs/coming-from.md), where Lightning's own defaults differ.
_TRAINER_DEFAULTS = {"accumulate_grad_batches": 8, "gradient_clip_val": 1.0, "log_every_n_steps": 10}
# The steps of a run have advice of their own.
_OUTSIDE_STEPS = "loading, moving or saving the model, or reading data"
_OUTSIDE_STEPS_ADVICE = (
    "What helps: a smaller model; --trainer.precision bf16-true; several devices with configs/overlays/fsdp2.yaml; "
    "--data.num_workers 0. Checkpoints already written are intact"
)


class OneLineParser(LightningArgumentParser):
    """Reports an error as one line, without the usage text; its usage names the command as users type it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(shorten(message)) from ex

    @property
    def prog(self) -> str:
        """The command, without the "[options]" that jsonargparse puts in front of a command's name."""
        return self._prog

    @prog.setter
    def prog(self, name: str) -> None:
        self._prog = name.replace(" [options]", "")


class SFTCLI(LightningCLI):
    """LightningCLI with one run folder: ``output_dir`` holds checkpoints, config, metrics and evaluations."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.builder = Builder()
        parser.add_instantiator(self.builder, object)
        add_options(parser)
        parser.add_lightning_class_args(HFCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GenerationEvaluation, "evaluation")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        check_values(self.config[self.config.subcommand])
        check_checkpoint_path(self.config[self.config.subcommand].get("ckpt_path"))

    def before_instantiate_classes(self) -> None:
        """Resolves the options that follow from others, and prepares the folder of a new run."""
        self.resolve_config()
        resolve_start(self.config[self.subcommand], is_fit=self.subcommand == "fit")

    def resolve_config(self) -> None:
        """Keeps the config that is saved, then fills in what follows from other options."""
        resolve_max_epochs(self.config[self.subcommand].trainer)
        self.config_to_save = config_to_save(self.parser, self.config, str(self.subcommand))
        resolve_options(self.config[self.subcommand])

    def instantiate_classes(self) -> None:
        """Builds the objects of the config and the Trainer. What they refuse becomes one line."""
        try:
            super().instantiate_classes()
        except Exception as error:
            raise self.builder.explain(error, self.config_to_save) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        built = self.config_init[self.subcommand]
        arguments = {**built.trainer, **kwargs}
        loggers = arguments["logger"]
        arguments.update(
            run_defaults(
                built.output_dir,
                callbacks=[*_as_list(arguments["callbacks"]), built.checkpoint, built.evaluation],
                loggers=_as_list(loggers),
                shows_progress=arguments["enable_progress_bar"] is not False,
                config=self.config_to_save,
            )
        )
        if self.subcommand != "fit" or loggers is False:
            arguments["logger"] = _as_list(loggers) or False  # without metrics.csv
        arguments["default_root_dir"] = arguments["default_root_dir"] or built.output_dir
        trainer = Trainer(**arguments)
        check_strategy(trainer)
        return trainer

    def after_fit(self) -> None:
        """Reports when no step was left to run."""
        path = self.config[self.subcommand].ckpt_path
        if path is None or not (Path(path) / folders.MANIFEST).is_file():  # pruned since
            return
        if folders.read_manifest(Path(path)).get("step") != self.trainer.global_step:
            return
        kind = fit_loop_kind(self.trainer)
        steps = f"the run has finished its {self.trainer.global_step} optimizer steps"
        if kind == "with_end":
            print(f"{steps}, but had stopped before its end, which is now complete")
        elif kind == "nothing":
            print(
                f"nothing to do: the run was stopped early, after optimizer step {self.trainer.global_step}; change "
                "what stopped it, such as EarlyStopping's patience, or pass --resume_override to train further"
            )
        else:
            print(f"nothing to do: {steps}; raise --trainer.max_epochs or --trainer.max_steps to train further")


def run_trainer_command(args: list[str]) -> None:
    """Runs fit, validate, test or predict.

    Raises:
        UserError: For a mistake in the command, the config or the data, also one that Lightning reports.
    """
    try:
        _start(_cli_for(args[0]), args)
    finally:
        unlock_folders()


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
        "parser_kwargs": {"prog": "sft-lightning", "default_env": True, "env_prefix": "SFT"},
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with translate_out_of_memory(lambda: _OUTSIDE_STEPS, lambda: _OUTSIDE_STEPS_ADVICE, lambda: device):
            return cli(SFTModule, SFTDataModule, args=args, **options)
    except Exception as error:
        if not is_refused_by_lightning(error):
            raise
        advice = " Set data_parallel_size to the number of devices and tensor_parallel_size to 1"
        is_about_sizes = "multiplied should equal the world size" in str(error)
        raise UserError(f"trainer.strategy: {error}{advice}" if is_about_sizes else str(error)) from error
    except SystemExit as error:
        # Lightning exits like this after Ctrl-C, with the exit code of a failure.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def _as_list(value: Any) -> list[Any]:
    """Returns callbacks or loggers as a list; None and a boolean name none."""
    if isinstance(value, list):
        return value
    return [] if value is None or isinstance(value, bool) else [value]


def _cli_for(command: str) -> type[SFTCLI]:
    """Returns an SFTCLI with one command: building the parsers of all four takes three times as long."""
    parameters_not_offered = SFTCLI.subcommands()[command]

    class CommandCLI(SFTCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: parameters_not_offered}

    return CommandCLI


def _fit_without_run() -> type[SFTCLI]:
    """Returns an SFTCLI that instantiates the classes of ``fit`` except its Trainer, and runs nothing."""

    class ParsedCLI(_cli_for("fit")):  # type: ignore[misc]
        def before_instantiate_classes(self) -> None:
            self.resolve_config()
            trainer = self.config[self.subcommand].trainer
            trainer.logger = trainer.callbacks = None  # some write files when they are instantiated

        def instantiate_trainer(self, **kwargs: Any) -> None:
            self.subcommand = None  # LightningCLI would run it now

    return ParsedCLI
