import importlib.metadata
import subprocess
import sys

import pytest

import sft_lightning

PUBLIC_NAMES = {
    "SFTDataModule",
    "SFTModule",
    "SFTDataset",
    "HFCheckpoint",
    "GenerationEvaluation",
    "RunReport",
    "R1ZeroGrader",
    "tokenize_prompt_and_output",
    "compute_sft_loss",
    "masked_normalize",
    "compute_entropy",
    "get_response_log_probs",
    "sft_microbatch_train_step",
    "evaluate",
    "run_defaults",
    "__version__",
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


@pytest.mark.parametrize("name", sorted(PUBLIC_NAMES - {"__version__"}))
def test_every_public_name_resolves_to_what_it_says(name):
    value = getattr(sft_lightning, name)
    assert value.__name__ == name
    assert value.__module__.startswith("sft_lightning.")
    assert value.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sft_lightning' has no attribute 'SFTTrainer'"):
        sft_lightning.SFTTrainer  # noqa: B018


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("sft-lightning") == sft_lightning.__version__
