"""Supervised fine-tuning of Hugging Face causal language models with PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sft_lightning.checkpointing.callback import HFCheckpoint as HFCheckpoint
    from sft_lightning.data.records import SFTDataset as SFTDataset
    from sft_lightning.data.tokenization import tokenize_prompt_and_output as tokenize_prompt_and_output
    from sft_lightning.evaluation.evaluate import evaluate as evaluate
    from sft_lightning.grading.graders import R1ZeroGrader as R1ZeroGrader
    from sft_lightning.losses.base import Loss as Loss
    from sft_lightning.losses.functional import compute_entropy as compute_entropy
    from sft_lightning.losses.functional import compute_sft_loss as compute_sft_loss
    from sft_lightning.losses.functional import get_response_log_probs as get_response_log_probs
    from sft_lightning.losses.functional import masked_normalize as masked_normalize
    from sft_lightning.losses.functional import sft_microbatch_train_step as sft_microbatch_train_step
    from sft_lightning.losses.token_loss import TokenLoss as TokenLoss
    from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation as GenerationEvaluation
    from sft_lightning.training.callbacks.run_report import RunReport as RunReport
    from sft_lightning.training.datamodule import SFTDataModule as SFTDataModule
    from sft_lightning.training.module import SFTModule as SFTModule

# Public name -> where it lives. Resolved on first use (PEP 562): `import sft_lightning` stays instant, because it
# imports neither torch nor lightning.
_HOME = {
    "SFTDataModule": "training.datamodule",
    "SFTModule": "training.module",
    "SFTDataset": "data.records",
    "HFCheckpoint": "checkpointing.callback",
    "GenerationEvaluation": "training.callbacks.generation_evaluation",
    "RunReport": "training.callbacks.run_report",
    "R1ZeroGrader": "grading.graders",
    "Loss": "losses.base",
    "TokenLoss": "losses.token_loss",
    "tokenize_prompt_and_output": "data.tokenization",
    "compute_sft_loss": "losses.functional",
    "masked_normalize": "losses.functional",
    "compute_entropy": "losses.functional",
    "get_response_log_probs": "losses.functional",
    "sft_microbatch_train_step": "losses.functional",
    "evaluate": "evaluation.evaluate",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sft_lightning' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"sft_lightning.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
