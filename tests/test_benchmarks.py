"""Run each benchmark's dry run, and test the counting behind its numbers."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs benchmarks/requirements.txt")


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a file of benchmarks/ as the scripts there import each other."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def dry_run(script: str, report: Path, *options: str) -> dict:
    command = [sys.executable, str(BENCHMARKS / script), "--dry_run", "--json", str(report), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|---|" in done.stdout
    return json.loads(report.read_text())


@pytest.mark.slow
def test_throughput_measures_everyone_and_all_see_the_same_loss(tmp_path):
    report = dry_run("throughput.py", tmp_path / "report.json", "--responses_per_prompt", "2")
    names = {row["name"] for row in report["results"]}
    assert {"guide's loop", "padded", "packed", "shared_prefix"} <= names
    losses = [row["first_loss"] for row in report["results"]]
    # float32 over some thousand summands in different orders.
    assert max(losses) - min(losses) <= 1e-4 * min(losses)
    positions = {row["name"]: row["positions_per_step"] for row in report["results"]}
    assert positions["shared_prefix"] < positions["packed"] < positions["padded"]
    tokens = {row["tokens_per_step"] for row in report["results"]}
    assert len(tokens) == 1


@pytest.mark.slow
@needs_trl
def test_the_search_for_trls_best_setting_runs(tmp_path):
    report = dry_run("trl_trainer.py", tmp_path / "report.json")
    assert report["failed"] == []
    assert len(report["results"]) == 4


@pytest.mark.slow
def test_scaling_measures_each_point_in_a_separate_process(tmp_path):
    report = dry_run("scaling.py", tmp_path / "report.json")
    assert [row["axis"] for row in report["results"]] == ["num_rows", "responses"]
    assert all(row["peak_resident_bytes"] > 100 * 1024**2 for row in report["results"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["attention.py", "check.py", "generation.py", "memory.py", "preparation.py", "row_losses.py"]
)
def test_the_other_benchmarks_run(tmp_path, script):
    dry_run(script, tmp_path / "report.json")


@pytest.mark.slow
def test_grading_finds_every_reference_right(tmp_path):
    report = dry_run("grading.py", tmp_path / "report.json")
    assert {name: runs[0]["right"] for name, runs in report["runs"].items()} == {"numbers": 20, "fractions": 20}


@pytest.mark.slow
def test_a_gpu_session_runs_on_a_cpu(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_session.py"),
        "--tiny",
        "--seconds",
        "1800",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["ended"] == dict.fromkeys(["tests", "kernels", "speed", "compile", "generation"], "done")
    failed = {
        (part, name): value
        for part in report["ended"]
        for name, value in report[part].items()
        if str(value).startswith(("failed", "skipped", "failure", "error"))
    }
    assert not failed
    speed = report["speed"]
    for who in ("ours, shared_prefix segments", "guide's loop", "transformers Trainer"):
        assert speed[f"{who} 4"]["ms_per_step"] > 0
    # Rows of 2 in padded batches against all 8 in one row without padding.
    assert speed["guide's loop 8"]["positions_per_step"] > speed["ours, packed segments 32"]["positions_per_step"]
    assert all(error < 1e-2 for error in list(report["kernels"]["errors of sft_flex, window None"].values())[:4])
    assert "guide's loop 16" in (tmp_path / "tables.txt").read_text()
    assert "aten::mm" in (tmp_path / "profiles.txt").read_text()


def test_flex_attention_follows_the_spans(benchmark):
    from sft_lightning.data.batch import Segment, Segments

    flex = benchmark("gpu.flex")
    # A root with two children, of which the first has a child, then a row that shares nothing.
    tree = [Segment(0, 3, -1), Segment(3, 5, 0), Segment(5, 6, 1), Segment(6, 8, 0), Segment(8, 10, -1)]
    assert flex.visible_until(Segments.from_tree(tree)).tolist() == [8, 8, 8, 6, 6, 6, 8, 8, 10, 10]


def test_the_last_two_gpu_steps_are_not_timed(benchmark):
    step_meter = benchmark("gpu.step_meter")
    meter = step_meter.StepMeter("cpu", num_steps=5, title="a run")
    counts = benchmark("meter").Counts(rows=1, tokens=7)
    meter.start()
    for _ in range(5):
        meter.add(lambda: counts)
        meter.end_step()
    measurement = meter.result(num_warmup_steps=1)
    assert len(measurement.seconds) == 2
    assert [count.tokens for count in measurement.counts] == [7, 7]


def test_a_failed_measurement_is_a_result_and_time_is_kept(benchmark, tmp_path):
    session = benchmark("gpu.session")
    args = argparse.Namespace(tiny=False, work=tmp_path, data=tmp_path, part="speed", seconds=20.0)
    part = session.Session(args)
    part.measure("one", lambda: {"ms": 1.5})
    part.measure("two", lambda: 1 / 0)
    part.measure("three", lambda: 1, needs_seconds=21)
    assert json.loads((tmp_path / "speed.json").read_text()) == {
        "one": {"ms": 1.5},
        "two": "failed: ZeroDivisionError: division by zero",
        "three": "skipped: no time left",
    }


def test_work_is_counted_from_row_lengths(benchmark):
    meter = benchmark("meter")
    counts = meter.counts_of_rows(np.array([3, 2]), positions=6, labels=4)
    # Rows of 3 and 2 tokens: 1 + 2 + 3 and 1 + 2 keys seen.
    assert counts == meter.Counts(rows=2, tokens=5, unique_tokens=5, positions=6, labels=4, attended=9)


def test_flops_are_those_of_a_model_worked_out_by_hand(benchmark):
    from transformers import Qwen2Config

    config = Qwen2Config(
        hidden_size=8,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=7,
    )
    meter = benchmark("meter")
    counts = meter.Counts(rows=1, tokens=3, unique_tokens=3, positions=4, labels=2, attended=6)
    # A layer's weights: q and o 64 each, k and v 32 each, three of 80: 432. Two layers: 864.
    # 6 * 864 * 3 + 6 * 8 * 7 * 2 + 12 * 2 layers * 8 * 6 = 15552 + 672 + 1152
    assert meter.step_flops(counts, config) == 17376


def test_attended_keys_of_a_span_tree_are_counted(benchmark):
    from sft_lightning.data.batch import Example
    from sft_lightning.data.batching.collate import collate

    trainer = benchmark("lightning_trainer")
    shared = list(range(20))
    rows = [[*shared, 30, 31, 32], [*shared, 40, 41]]
    examples = [Example.from_prompt(np.array(row, dtype=np.int32), prompt_length=20) for row in rows]
    batch = collate(examples, [1.0, 1.0], layout="shared_prefix", pad_token_id=0)
    counts = trainer._counts(batch)
    # Inputs omit each row's last token: 20 shared, then 2 and 1 unshared. Each attends to itself and what precedes it.
    seen = sum(range(1, 21)) + (21 + 22) + 21
    assert (counts.rows, counts.tokens, counts.unique_tokens, counts.labels) == (2, 43, 23, 5)
    assert counts.attended == seen


def test_responses_to_a_prompt_are_neighbors_and_differ(benchmark):
    rows = benchmark("rows")
    made = rows.with_responses(rows.synthetic_rows(50), num_prompts=3, responses=4)
    assert len(made) == 12
    for start in (0, 4, 8):
        assert len({row["prompt"] for row in made[start : start + 4]}) == 1
        assert len({row["response"] for row in made[start : start + 4]}) == 4
    assert len({row["prompt"] for row in made}) == 3


def test_the_plot_writes_tables_between_the_markers_and_draws(benchmark, tmp_path):
    plot = benchmark("plot")
    row = {"family": "guide", "batch_size": 4, "positions_per_step": 10, "flops_per_second": 1e9, "first_loss": 2.5}
    report = {
        "benchmark": "throughput",
        "model": "small",
        "parameters": 11756160,
        "dtype": "float32",
        "device": "cpu",
        "responses_per_prompt": 1,
        "rows_per_step": 32,
        "rows": "made-up rows",
        "lengths_text": "32 rows",
        "matmul_flops_per_second": 4e9,
        "machine": {
            "threads": 2,
            "cores": 2,
            "gpu": None,
            "processor": "some processor",
            "python": "3.11",
            "versions": {"torch": "2.13.0"},
        },
        "results": [
            {**row, "name": "guide's loop", "tokens_per_second": 100.0},
            {**row, "name": "shared_prefix", "family": "ours", "tokens_per_second": 250.0},
            {**row, "name": "TRL grouped", "family": "trl", "tokens_per_second": 125.0},
            {**row, "name": "TRL grouped, full logits", "family": "trl_changed", "tokens_per_second": 200.0},
        ],
    }
    (tmp_path / "one.json").write_text(json.dumps(report))
    memory = {"benchmark": "memory", "table": "| loss | memory |", "machine": report["machine"]}
    (tmp_path / "two.json").write_text(json.dumps(memory))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    plot.fill_in(readme, plot.sections(tmp_path))
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| shared_prefix | 4 | 250 | 2.50 | 2.00 | 1.25 | 10 | 1.0 | 25% | 2.500000 |" in text
    assert "| loss | memory |" in text
    assert (tmp_path / "one.png").stat().st_size > 1000
