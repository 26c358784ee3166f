import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sft_lightning

PUBLIC_NAMES = {
    "__version__",
    # training
    "SFTDataModule",
    "SFTModule",
    "run_defaults",
    "HFCheckpoint",
    "GenerationEvaluation",
    "PredictionWriter",
    "RowLossRecorder",
    "RunReport",
    "SavedConfig",
    "StepProgress",
    "Throughput",
    "MetricsCSVLogger",
    "Loss",
    "TokenLoss",
    # data
    "SFTDataset",
    "Template",
    "Plain",
    "R1Zero",
    # answers and grades
    "Generation",
    "Generator",
    "TransformersGenerator",
    "OpenAIServerGenerator",
    "Grade",
    "Grader",
    "R1ZeroGrader",
    "AnswerGrader",
    "Gsm8kGrader",
    "ExactMatchGrader",
    "grade_all",
    "evaluate",
    "EvaluationResult",
    "read_samples",
    "compare",
    "Comparison",
    "comparison_table",
    # reports
    "write_report",
    "read_row_losses",
    "describe_row_losses",
    # functions of the guide
    "tokenize_prompt_and_output",
    "compute_sft_loss",
    "masked_normalize",
    "compute_entropy",
    "get_response_log_probs",
    "sft_microbatch_train_step",
    # errors
    "UserError",
    "NoRowsError",
    "RunFailedError",
    "NonFiniteError",
    "StoppedError",
}


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, sft_lightning; sft_lightning.__version__; dir(sft_lightning); "
        "print(sorted({'torch', 'lightning', 'transformers', 'numpy', 'matplotlib', 'rich'} & sys.modules.keys()))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output == "[]\n"


def test_the_public_names_are_those_of_the_documentation():
    assert set(sft_lightning.__all__) == PUBLIC_NAMES
    assert set(dir(sft_lightning)) >= PUBLIC_NAMES


def test_type_checkers_see_the_same_public_names():
    tree = ast.parse(Path(sft_lightning.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(node.module, alias.name, alias.asname) for node in block.body for alias in node.names}
    assert seen == {(f"sft_lightning.{module}", name, name) for name, module in sft_lightning._HOME.items()}


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES - {"__version__"}))
def test_every_public_name_resolves_to_its_definition(name):
    value = getattr(sft_lightning, name)
    assert value.__name__ == name
    assert value.__module__ == f"sft_lightning.{sft_lightning._HOME[name]}"
    assert inspect.getdoc(value)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sft_lightning' has no attribute 'SFTTrainer'"):
        sft_lightning.SFTTrainer  # noqa: B018


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("sft-lightning") == sft_lightning.__version__
