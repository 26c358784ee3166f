"""Supervised fine-tuning of Hugging Face causal language models with PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sft_lightning.checkpointing.callback import HFCheckpoint as HFCheckpoint
    from sft_lightning.data.formats.base import Template as Template
    from sft_lightning.data.formats.prompt_response import Plain as Plain
    from sft_lightning.data.formats.r1_zero import R1Zero as R1Zero
    from sft_lightning.data.records import SFTDataset as SFTDataset
    from sft_lightning.data.tokenization import tokenize_prompt_and_output as tokenize_prompt_and_output
    from sft_lightning.errors import NonFiniteError as NonFiniteError
    from sft_lightning.errors import NoRowsError as NoRowsError
    from sft_lightning.errors import RunFailedError as RunFailedError
    from sft_lightning.errors import StoppedError as StoppedError
    from sft_lightning.errors import UserError as UserError
    from sft_lightning.evaluation.comparison import Comparison as Comparison
    from sft_lightning.evaluation.comparison import compare as compare
    from sft_lightning.evaluation.comparison import comparison_table as comparison_table
    from sft_lightning.evaluation.evaluate import evaluate as evaluate
    from sft_lightning.evaluation.result import EvaluationResult as EvaluationResult
    from sft_lightning.evaluation.result import read_samples as read_samples
    from sft_lightning.generation.base import Generation as Generation
    from sft_lightning.generation.base import Generator as Generator
    from sft_lightning.generation.openai_server import OpenAIServerGenerator as OpenAIServerGenerator
    from sft_lightning.generation.transformers_generator import TransformersGenerator as TransformersGenerator
    from sft_lightning.grading.base import Grade as Grade
    from sft_lightning.grading.base import Grader as Grader
    from sft_lightning.grading.graders import AnswerGrader as AnswerGrader
    from sft_lightning.grading.graders import ExactMatchGrader as ExactMatchGrader
    from sft_lightning.grading.graders import Gsm8kGrader as Gsm8kGrader
    from sft_lightning.grading.graders import R1ZeroGrader as R1ZeroGrader
    from sft_lightning.grading.graders import grade_all as grade_all
    from sft_lightning.losses.base import Loss as Loss
    from sft_lightning.losses.functional import compute_entropy as compute_entropy
    from sft_lightning.losses.functional import compute_sft_loss as compute_sft_loss
    from sft_lightning.losses.functional import get_response_log_probs as get_response_log_probs
    from sft_lightning.losses.functional import masked_normalize as masked_normalize
    from sft_lightning.losses.functional import sft_microbatch_train_step as sft_microbatch_train_step
    from sft_lightning.losses.token_loss import TokenLoss as TokenLoss
    from sft_lightning.reporting.page import write_report as write_report
    from sft_lightning.reporting.row_losses import describe_row_losses as describe_row_losses
    from sft_lightning.reporting.row_losses import read_row_losses as read_row_losses
    from sft_lightning.training.callbacks.defaults import run_defaults as run_defaults
    from sft_lightning.training.callbacks.generation_evaluation import GenerationEvaluation as GenerationEvaluation
    from sft_lightning.training.callbacks.predictions import PredictionWriter as PredictionWriter
    from sft_lightning.training.callbacks.progress import StepProgress as StepProgress
    from sft_lightning.training.callbacks.row_losses import RowLossRecorder as RowLossRecorder
    from sft_lightning.training.callbacks.run_report import RunReport as RunReport
    from sft_lightning.training.callbacks.saved_config import SavedConfig as SavedConfig
    from sft_lightning.training.callbacks.throughput import Throughput as Throughput
    from sft_lightning.training.datamodule import SFTDataModule as SFTDataModule
    from sft_lightning.training.loggers.metrics_csv import MetricsCSVLogger as MetricsCSVLogger
    from sft_lightning.training.module import SFTModule as SFTModule

# Public name -> the module that defines it. Configs, documents, cache keys and checkpoints name the short form, so that
# modules may move. Resolved on first use (PEP 562): `import sft_lightning` imports neither torch nor lightning.
_HOME = {
    "HFCheckpoint": "checkpointing.callback",
    "Plain": "data.formats.prompt_response",
    "R1Zero": "data.formats.r1_zero",
    "Template": "data.formats.base",
    "SFTDataset": "data.records",
    "tokenize_prompt_and_output": "data.tokenization",
    "NoRowsError": "errors",
    "NonFiniteError": "errors",
    "RunFailedError": "errors",
    "StoppedError": "errors",
    "UserError": "errors",
    "Comparison": "evaluation.comparison",
    "compare": "evaluation.comparison",
    "comparison_table": "evaluation.comparison",
    "evaluate": "evaluation.evaluate",
    "EvaluationResult": "evaluation.result",
    "read_samples": "evaluation.result",
    "Generation": "generation.base",
    "Generator": "generation.base",
    "OpenAIServerGenerator": "generation.openai_server",
    "TransformersGenerator": "generation.transformers_generator",
    "Grade": "grading.base",
    "Grader": "grading.base",
    "AnswerGrader": "grading.graders",
    "ExactMatchGrader": "grading.graders",
    "Gsm8kGrader": "grading.graders",
    "R1ZeroGrader": "grading.graders",
    "grade_all": "grading.graders",
    "Loss": "losses.base",
    "compute_entropy": "losses.functional",
    "compute_sft_loss": "losses.functional",
    "get_response_log_probs": "losses.functional",
    "masked_normalize": "losses.functional",
    "sft_microbatch_train_step": "losses.functional",
    "TokenLoss": "losses.token_loss",
    "write_report": "reporting.page",
    "describe_row_losses": "reporting.row_losses",
    "read_row_losses": "reporting.row_losses",
    "run_defaults": "training.callbacks.defaults",
    "GenerationEvaluation": "training.callbacks.generation_evaluation",
    "PredictionWriter": "training.callbacks.predictions",
    "StepProgress": "training.callbacks.progress",
    "RowLossRecorder": "training.callbacks.row_losses",
    "RunReport": "training.callbacks.run_report",
    "SavedConfig": "training.callbacks.saved_config",
    "Throughput": "training.callbacks.throughput",
    "SFTDataModule": "training.datamodule",
    "MetricsCSVLogger": "training.loggers.metrics_csv",
    "SFTModule": "training.module",
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
