import json

import pytest
from transformers import AutoTokenizer

from sft_lightning.errors import UserError
from sft_lightning.quickstart.prepare import prepare_quickstart


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepare") / "data" / "quickstart"
    prepare_quickstart(folder)
    return folder


def test_the_folder_holds_data_and_model(folder):
    files = {str(path) for path in contents(folder)}
    assert {"train.jsonl", "heldout.jsonl", "model/config.json", "model/model.safetensors"} <= files
    assert {"model/tokenizer.json", "model/tokenizer_config.json", "model/generation_config.json"} <= files


def test_what_is_constant_costs_two_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)["prompt"]
        pieces = [tokenizer.decode([token]) for token in tokenizer(prompt).input_ids]
        assert "".join(pieces[1:-1]) == prompt.rpartition("User:")[2].removesuffix("\nAssistant: <think>")


def test_a_second_call_replaces_its_own_files_only(folder):
    before = contents(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "train.jsonl").write_text("damaged")
    prepare_quickstart(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        prepare_quickstart(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
