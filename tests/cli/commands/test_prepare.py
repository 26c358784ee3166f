"""sft-lightning prepare, as typed."""

import json

from sft_lightning.cli.main import main


def test_prepare_gsm8k_writes_prompt_response_and_ground_truth(tmp_path):
    source = tmp_path / "raw.jsonl"
    row = {"question": "Ann has {2} cups and buys 3. How many?", "answer": "2+3 = <<2+3=5>>5\n#### 1,005"}
    source.write_text(json.dumps(row) + "\n")
    assert main(["prepare", "gsm8k", "--input", str(source), "--output", str(tmp_path / "out" / "sft.jsonl")]) == 0
    (written,) = (json.loads(line) for line in (tmp_path / "out" / "sft.jsonl").read_text().splitlines())
    assert written["prompt"].endswith("User: Ann has {2} cups and buys 3. How many?\nAssistant: <think>")
    assert written["response"] == " 2+3 = 5 </think> <answer> 1005 </answer>"
    assert written["ground_truth"] == "1005"


def test_prepare_gsm8k_leaves_nothing_behind_on_a_bad_row(tmp_path, capsys):
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
