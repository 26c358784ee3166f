"""Compare the settings and the steps of a run with those of the checkpoint that it resumes from."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import AdamW

from sft_lightning.errors import UserError
from sft_lightning.lightning_compat.averaging import check_averaging
from sft_lightning.lightning_compat.loops import set_loop_position
from sft_lightning.lightning_compat.trainer import steps_per_epoch
from sft_lightning.losses.base import Loss
from sft_lightning.losses.token_loss import TokenLoss
from sft_lightning.optim.factory import OptimizerFactory, arguments_of, target_of
from sft_lightning.system.identity import identity, public_name
from sft_lightning.training.saved_state import check_trainer_state

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Hyperparameters of SFTModule that a resumed run may change: they decide how a result is computed, not which one, or
# what a run does about steps that cannot be taken.
_FREE = frozenset(
    {
        *("model_path", "attn_implementation", "gradient_checkpointing", "compile"),
        *("log_token_statistics", "on_nonfinite", "max_nonfinite_steps"),
    }
)
# What may differ between a checkpoint and a run that resumes from it only if resume_override is set.
_NEEDS_OVERRIDE = frozenset(
    {
        *("model.optimizer", "model.learning_rate", "model.weight_decay", "model.betas", "model.eps"),
        *("model.lr_schedule", "model.warmup_steps", "model.warmup_ratio", "model.min_lr_factor"),
        *("trainer.precision", "trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"),
    }
)
# Entries of a model's config that do not decide what it computes.
_BOOKKEEPING = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
        *("id2label", "label2id", "problem_type", "tokenizer_class", "output_attentions", "output_hidden_states"),
    }
)
_DEFAULT_OPTIMIZER = public_name(AdamW)


def optimizer_identity(factory: OptimizerFactory | None) -> str | None:
    """Returns a text of an optimizer's class and arguments, None for the default optimizer.

    Raises:
        UserError: If the factory cannot be called with parameter groups and ``lr``.
    """
    if factory is None:
        return None
    arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments_of(factory).items()}
    described = ", ".join(f"{name}={identity(value)}" for name, value in sorted(arguments.items()))
    return f"{public_name(target_of(factory))}({described})"


def loss_identity(loss: Loss | None) -> str | None:
    """Returns a text of a loss's class and settings, None for the default loss."""
    default = identity(TokenLoss())
    text = default if loss is None else identity(loss)
    return None if text == default else text


def model_identity(config: "PretrainedConfig") -> dict[str, Any]:
    """Returns the entries of a model's config that decide what the model computes, as plain values."""
    entries = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in entries.items() if name not in _BOOKKEEPING}


def trajectory(module: Any) -> dict[str, Any]:
    """Returns everything, beside the data, that decides how the weights of an SFTModule change, by name.

    That is its hyperparameters except for those that a resumed run may change, its optimizer and loss, the
    model's config, and the precision and clipping of its Trainer.
    """
    assert module.model is not None
    trainer = module.trainer
    clips, algorithm = trainer.gradient_clip_val or None, trainer.gradient_clip_algorithm
    return {
        **{f"model.{name}": text for name, text in module.identities.items()},
        **{f"model.{name}": _plain(value) for name, value in module.hparams.items() if name not in _FREE},
        **{f"{name} in the model's config.json": value for name, value in model_identity(module.model.config).items()},
        "trainer.precision": trainer.precision,
        "trainer.gradient_clip_val": clips,
        "trainer.gradient_clip_algorithm": None if clips is None else getattr(algorithm, "value", "norm"),
        "trainer.overfit_batches": getattr(trainer, "overfit_batches", 0),
    }


def check_checkpoint(module: Any, checkpoint: dict[str, Any]) -> None:
    """Checks that a run may resume from a checkpoint, before any of it is loaded, and sets its place in the loops.

    Args:
        module: The SFTModule of the run.
        checkpoint: As Lightning passes it to ``on_load_checkpoint``. Its loop counters are changed in place.

    Raises:
        UserError: If something is missing or malformed, or the run has other settings.
    """
    if "trajectory" not in checkpoint:
        raise UserError(
            "cannot resume: another version of sft-lightning wrote this checkpoint; start from its weights with "
            "--model.model_path"
        )
    check_trainer_state(checkpoint, module.trainer)
    check_averaging(module.trainer, checkpoint)
    check_resumable(trajectory(module), checkpoint["trajectory"], override=module.resume_override)
    set_loop_position(
        checkpoint["loops"]["fit_loop"],
        global_step=checkpoint["global_step"],
        steps_per_epoch=steps_per_epoch(module.trainer),
        accumulate=module.trainer.accumulate_grad_batches,
    )


def check_resumable(own: Mapping[str, Any], saved: Mapping[str, Any], *, override: bool = False) -> None:
    """Checks that a run may resume from a checkpoint.

    Args:
        own: What decides the tokens, the steps and the weights of the run, by name.
        saved: The same of the checkpoint. A name that one of the two lacks counts as None.
        override: Whether options of the optimizer, clipping and precision may differ. The class of the optimizer may
            not, since its state would not fit.

    Raises:
        UserError: For the first difference.
    """
    new_class, old_class = (_optimizer_class(each.get("model.optimizer")) for each in (own, saved))
    if new_class != old_class:
        raise UserError(
            f"cannot resume: model.optimizer is {new_class}, the checkpoint holds the state of {old_class}; set it "
            "back, or start from the checkpoint's weights with --model.model_path"
        )
    for name in {**own, **saved}:
        if own.get(name) == saved.get(name) or (override and name in _NEEDS_OVERRIDE):
            continue
        instead = "start from the checkpoint's weights with --model.model_path"
        if name in _NEEDS_OVERRIDE:
            instead = "pass --resume_override to continue with the new one"
        raise UserError(
            f"cannot resume: {name} is {own.get(name)!r}, the checkpoint was trained with {saved.get(name)!r}; set it "
            f"back, or {instead}"
        )


def _optimizer_class(text: str | None) -> str:
    return _DEFAULT_OPTIMIZER if text is None else text.partition("(")[0]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # YAML has no tuples
