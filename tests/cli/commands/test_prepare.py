"""Test the command sft-lightning prepare."""

import json
import multiprocessing
import random
import shutil
import time

import pytest
from transformers import AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from sft_lightning.cli.commands.prepare import prepare_quickstart
from sft_lightning.cli.main import main
from sft_lightning.data.formats.r1_zero import R1Zero
from sft_lightning.errors import UserError


def test_prepare_gsm8k_writes_prompt_response_and_ground_truth(tmp_path):
    source = tmp_path / "raw.jsonl"
    row = {"question": "Ann has {2} cups and buys 3. How many?", "answer": "2+3 = <<2+3=5>>5\n#### 1,005"}
    source.write_text(json.dumps(row) + "\n")
    assert main(["prepare", "gsm8k", "--input", str(source), "--output", str(tmp_path / "out" / "sft.jsonl")]) == 0
    (written,) = (json.loads(line) for line in (tmp_path / "out" / "sft.jsonl").read_text().splitlines())
    assert written["prompt"].endswith("User: Ann has {2} cups and buys 3. How many?\nAssistant: <think>")
    assert written["response"] == " 2+3 = 5 </think> <answer> 1005 </answer>"
    assert written["ground_truth"] == "1005"


def test_prepare_gsm8k_writes_nothing_on_a_bad_row(tmp_path, capsys):
    source = tmp_path / "raw.jsonl"
    source.write_text('{"question": "a", "answer": "no mark"}\n')
    assert main(["prepare", "gsm8k", "--input", str(source), "--output", str(tmp_path / "sft.jsonl")]) == 2
    assert f"{source}:1" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["raw.jsonl"]


def test_prepare_the_whole_of_gsm8k(gsm8k, tmp_path, capsys):
    output = tmp_path / "sft.jsonl"
    assert main(["prepare", "gsm8k", "--input", str(gsm8k / "train.jsonl"), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"wrote 7473 rows to {output}\n"
    assert output.read_text().count("\n") == 7473


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


def test_the_fixed_text_of_a_prompt_is_two_tokens(folder):
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


def test_a_file_at_the_output_path_is_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="file"):
        prepare_quickstart(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


# Interruptions


def make_older(folder, output):
    """Writes files of the same names, which a call replaces, and one of the user's; returns all contents."""
    shutil.copytree(folder, output)
    for file in output.rglob("*.*"):
        file.write_bytes(b"old")
    (output / "model" / "notes.txt").write_text("mine")
    return contents(output)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "num_calls", "written"),
    [
        (R1Zero, "render", 100, set()),
        (R1Zero, "render", 6500, {"train.jsonl"}),
        (Qwen2ForCausalLM, "save_pretrained", 1, {"train.jsonl", "heldout.jsonl"}),
        (Qwen2Tokenizer, "save_pretrained", 1, {"train.jsonl", "heldout.jsonl"}),
    ],
)
def test_an_interrupted_prepare_leaves_whole_files(
    folder, tmp_path, monkeypatch, note_fault, owner, name, num_calls, written, again
):
    output = tmp_path / "quickstart"
    before = make_older(folder, output) if again else {}
    call, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(name)
        if len(calls) == num_calls:
            raise KeyboardInterrupt
        return call(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)
    assert main(["prepare", "quickstart", "--output", str(output)]) == 130
    expected = {path: content for path, content in contents(folder).items() if str(path) in written}
    assert contents(output) == {**before, **expected}
    note_fault(
        "prepare interrupted",
        provoked="Ctrl-C while rows, the model or its tokenizer are written, into a new folder and into one that "
        "is there; a slow test kills it at random",
        outcome="each file, and a new model folder, is there as a whole or not at all",
        tries=8,
    )


FORK = multiprocessing.get_context("fork")  # transformers is imported already


def started(output):
    process = FORK.Process(target=prepare_quickstart, args=(output,))
    process.start()
    return process


@pytest.mark.slow
def test_a_killed_prepare_leaves_whole_files(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    begun = time.monotonic()
    started(tmp_path / "whole").join()
    seconds = time.monotonic() - begun
    moments = random.Random(0)
    for attempt in range(12):
        output = tmp_path / f"output-{attempt % 3}"  # a second attempt meets what the first one left
        process = started(output)
        time.sleep(moments.uniform(0, seconds))
        process.kill()
        process.join()
        found = {path: content for path, content in contents(output).items() if ".tmp-" not in str(path)}
        assert found.items() <= contents(folder).items()
        assert not (output / "model").exists() or len(found) >= len(contents(folder / "model"))
    prepare_quickstart(output)
    assert not list(output.glob(".model.tmp-*"))


@pytest.mark.slow
def test_prepares_at_once_end_with_one_whole_result(folder, tmp_path, monkeypatch, note_fault):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    processes = [started(tmp_path / "output") for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "output") == contents(folder)
    note_fault(
        "two of prepare at once",
        provoked="three processes write the quickstart into one new folder",
        outcome="all succeed; the files are those of one",
    )
