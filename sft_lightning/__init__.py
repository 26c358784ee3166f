"""Supervised fine-tuning of Hugging Face causal language models with PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sft_lightning.callbacks.generation_evaluation import GenerationEvaluation as GenerationEvaluation
    from sft_lightning.callbacks.run_report import RunReport as RunReport
    from sft_lightning.checkpoint import HFCheckpoint as HFCheckpoint
    from sft_lightning.data.records import SFTDataset as SFTDataset
    from sft_lightning.data.tokenization import tokenize_prompt_and_output as tokenize_prompt_and_output
    from sft_lightning.datamodule import SFTDataModule as SFTDataModule
    from sft_lightning.evaluation.evaluate import evaluate as evaluate
    from sft_lightning.evaluation.grading import R1ZeroGrader as R1ZeroGrader
    from sft_lightning.loss import compute_entropy as compute_entropy
    from sft_lightning.loss import compute_sft_loss as compute_sft_loss
    from sft_lightning.loss import get_response_log_probs as get_response_log_probs
    from sft_lightning.loss import masked_normalize as masked_normalize
    from sft_lightning.loss import sft_microbatch_train_step as sft_microbatch_train_step
    from sft_lightning.module import SFTModule as SFTModule

# Public name -> where it lives. Resolved on first use (PEP 562): `import sft_lightning` stays instant, because it
# imports neither torch nor lightning.
_HOME = {
    "SFTDataModule": "datamodule",
    "SFTModule": "module",
    "SFTDataset": "data.records",
    "HFCheckpoint": "checkpoint",
    "GenerationEvaluation": "callbacks.generation_evaluation",
    "RunReport": "callbacks.run_report",
    "R1ZeroGrader": "evaluation.grading",
    "tokenize_prompt_and_output": "data.tokenization",
    "compute_sft_loss": "loss",
    "masked_normalize": "loss",
    "compute_entropy": "loss",
    "get_response_log_probs": "loss",
    "sft_microbatch_train_step": "loss",
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
