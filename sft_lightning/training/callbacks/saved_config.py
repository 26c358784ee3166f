"""Write a run's config.yaml, from which ``fit --config`` repeats the run."""

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary, ProgressBar
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from sft_lightning.checkpointing.callback import HFCheckpoint
from sft_lightning.checkpointing.run_folder import register_file
from sft_lightning.lightning_compat.trainer import callback_of, callbacks_of, datamodule_of, is_dry_run
from sft_lightning.optim.factory import target_of
from sft_lightning.system.files import write_atomically
from sft_lightning.system.identity import public_name
from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation
from sft_lightning.training.datamodule import SFTDataModule
from sft_lightning.training.module import SFTModule

# On the command line output_dir and options of one start set these.
_NOT_SAVED = {"dirpath", "output_dir", "overwrite", "resume_override"}
# Arguments that a Trainer keeps as attributes of the same name.
_TRAINER_ARGUMENTS = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "gradient_clip_val",
    "limit_predict_batches",
    "limit_test_batches",
    "limit_train_batches",
    "limit_val_batches",
    "log_every_n_steps",
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "num_nodes",
    "overfit_batches",
    "precision",
    "val_check_interval",
)


class SavedConfig(Callback):
    """Writes ``config.yaml`` into the folder of the run when training starts.

    A resumed run leaves ``config.yaml`` as it is and writes ``config.resume-<step>.yaml``.

    Args:
        output_dir: Folder of the run.
        config: Content of the file. By default it is read from the Trainer, the module and the data module; what
            ``fit`` cannot repeat, such as a callback of your own, is listed at the top of the file. Graders,
            generators and templates must keep each constructor argument as an attribute of the same name.
    """

    def __init__(self, output_dir: str, config: Mapping[str, Any] | None = None) -> None:
        self._run = Path(output_dir).expanduser()
        self._config = config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        step = trainer.global_step
        name = "config.yaml" if step == 0 else f"config.resume-{step}.yaml"
        register_file(self._run, name)
        with write_atomically(self._run / name) as file:
            file.write(self._text(trainer, pl_module))

    def _text(self, trainer: Trainer, module: LightningModule) -> str:
        if self._config is not None:
            return yaml.safe_dump(dict(self._config), sort_keys=False)
        config, not_repeated = config_of_run(trainer, module)
        header = "".join(f"# fit does not repeat {each}\n" for each in not_repeated)
        return header + yaml.safe_dump({"output_dir": str(self._run), **config}, sort_keys=False)


def config_of_run(trainer: Trainer, module: LightningModule) -> tuple[dict[str, Any], list[str]]:
    """Returns the config that makes ``fit`` repeat a run which was started from Python.

    Omits arguments that have their default value, except the Trainer's, for which ``fit`` has other defaults.

    Returns:
        The config without ``output_dir``, and a description of each part of the run that it cannot express.
    """
    not_repeated: list[str] = []
    config: dict[str, Any] = {"seed_everything": _seed()}
    parts = (
        ("data", SFTDataModule, datamodule_of(trainer)),
        ("model", SFTModule, module),
        ("checkpoint", HFCheckpoint, callback_of(trainer, HFCheckpoint) or HFCheckpoint()),
        ("evaluation", GenerationEvaluation, callback_of(trainer, GenerationEvaluation) or GenerationEvaluation(0)),
    )
    for section, expected, part in parts:
        if type(part) is not expected:
            not_repeated.append(f"the class {type(part).__name__}: it uses {expected.__name__}")
        config[section] = _arguments(part, expected, section, not_repeated)
    config["trainer"] = _trainer_arguments(trainer, not_repeated)
    for callback in callbacks_of(trainer):
        if not _is_from_here(callback) and not isinstance(callback, ModelSummary | ProgressBar):
            not_repeated.append(f"{type(callback).__name__}: add it to trainer.callbacks")
    for logger in trainer.loggers:
        if not _is_from_here(logger):
            not_repeated.append(f"{type(logger).__name__}: add it to trainer.logger")
    if config["seed_everything"] is False and config["model"].get("init") == "random":
        not_repeated.append("the random weights: call seed_everything before the run")
    return config, not_repeated


def _is_from_here(part: Any) -> bool:
    return type(part).__module__.startswith("sft_lightning.")


def _seed() -> int | bool:
    """Returns the seed of ``seed_everything``, False if it was not called."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return False if seed is None else int(seed)


def _arguments(part: Any, signature_of: type, place: str, not_repeated: list[str]) -> dict[str, Any]:
    """Returns the constructor arguments of an object that differ from their defaults, as they are written in YAML.

    A hyperparameter or an attribute of its name holds an argument. One that neither holds is added to ``not_repeated``.
    """
    hyperparameters = getattr(part, "hparams", {})
    arguments = {}
    for name, parameter in inspect.signature(signature_of).parameters.items():
        if name in _NOT_SAVED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        try:
            value = hyperparameters[name] if name in hyperparameters else getattr(part, name)
            if value != parameter.default:
                arguments[name] = _as_yaml(value, f"{place}.{name}", not_repeated)
        except (AttributeError, ValueError):
            not_repeated.append(f"{place}.{name}, which cannot be read from {type(part).__name__}")
    return arguments


def _as_yaml(value: Any, place: str, not_repeated: list[str]) -> Any:
    """Returns plain values as they are and an object as its class_path and init_args.

    Raises:
        ValueError: For an object whose class cannot be imported.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _as_yaml(each, place, not_repeated) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [_as_yaml(each, place, not_repeated) for each in value]
    if isinstance(value, type | partial) or inspect.isfunction(value):
        factory: Any = value  # of an optimizer
        kind: Any = target_of(factory)
        keywords = factory.keywords if isinstance(factory, partial) else {}
        arguments = {name: _as_yaml(each, place, not_repeated) for name, each in keywords.items()}
    else:
        kind = type(value)
        arguments = _arguments(value, kind, f"{place}.init_args", not_repeated)
    if not inspect.isclass(kind) or "<locals>" in kind.__qualname__:
        raise ValueError(f"{kind.__qualname__} cannot be imported as a class")
    return {"class_path": public_name(kind), **({"init_args": arguments} if arguments else {})}


def _trainer_arguments(trainer: Trainer, not_repeated: list[str]) -> dict[str, Any]:
    arguments: dict[str, Any] = {name: getattr(trainer, name) for name in _TRAINER_ARGUMENTS}
    algorithm = trainer.gradient_clip_algorithm
    arguments["gradient_clip_algorithm"] = None if algorithm is None else algorithm.value
    sanity_steps = trainer.num_sanity_val_steps
    arguments["num_sanity_val_steps"] = -1 if sanity_steps == float("inf") else sanity_steps
    if torch.are_deterministic_algorithms_enabled():
        arguments["deterministic"] = "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else True
    arguments["accelerator"] = trainer.accelerator.name()
    arguments["devices"] = trainer.num_devices
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        sizes = {f"{name}_size": strategy.device_mesh[name].size() for name in ("data_parallel", "tensor_parallel")}
        arguments["strategy"] = {"class_path": public_name(ModelParallelStrategy), "init_args": sizes}
    elif isinstance(strategy, DDPStrategy):
        arguments["strategy"] = "ddp"
    elif not isinstance(strategy, SingleDeviceStrategy):
        not_repeated.append(f"{type(strategy).__name__}: set trainer.strategy")
    return arguments
