import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft_lightning.system.remote_code import without_remote_code

LOADERS = {"AutoConfig": AutoConfig, "AutoModelForCausalLM": AutoModelForCausalLM, "AutoTokenizer": AutoTokenizer}


@pytest.fixture
def folder_with_code(tmp_path, monkeypatch):
    """A folder of a model type that only its own code knows, for somebody who answers "y" to every question."""
    monkeypatch.setattr("builtins.input", lambda *arguments: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    auto_map = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoTokenizer": ["own.T", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "of-its-own", "auto_map": auto_map}))
    return tmp_path


@pytest.mark.parametrize("name", LOADERS)
def test_nobody_is_asked_and_no_code_runs(folder_with_code, name):
    load = LOADERS[name].from_pretrained
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        without_remote_code(load, folder_with_code)
    assert not (folder_with_code / "executed").exists()


@pytest.mark.parametrize("name", LOADERS)
def test_the_code_would_run_without_it(folder_with_code, name):
    with pytest.raises(AttributeError):  # the code has no such class
        LOADERS[name].from_pretrained(folder_with_code)
    assert (folder_with_code / "executed").is_dir()
