"""Run one measurement of preparation.py in a separate process and print the result as a line of JSON.

python benchmarks/preparation_measurements.py NAME --rows N --trl_rows N --folder FOLDER
"""

import argparse
import functools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]
MAX_LENGTH = 2048
TEXTS_AT_ONCE = 2048


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=sorted(MEASUREMENTS))
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--trl_rows", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    report_and_leave(MEASUREMENTS[args.name](args))


def report_and_leave(found: dict[str, float]) -> None:
    """Ends the process at once, since the measurement does not include cleanup."""
    print(json.dumps(found), flush=True)
    os._exit(0)


def measure_bare(args: argparse.Namespace) -> dict[str, float]:
    from sft_lightning.data.tokenization import load_tokenizer

    tokenizer = load_tokenizer(str(args.folder / "model"))
    with rows_path(args).open(encoding="utf-8") as file:
        rows = map(json.loads, file)
        texts = [text for row in rows for text in (row["prompt"], row["response"])]
    started = time.perf_counter()
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        tokenizer(texts[first : first + TEXTS_AT_ONCE], verbose=False)
    return speed_of(args.rows, time.perf_counter() - started)


def measure_ours(args: argparse.Namespace) -> dict[str, float]:
    from sft_lightning.data.settings import DataSettings
    from sft_lightning.data.token_store import load_or_build_tokens
    from sft_lightning.data.tokenization import load_tokenizer

    shutil.rmtree(args.folder / "cache", ignore_errors=True)
    tokenizer = load_tokenizer(str(args.folder / "model"))
    settings = DataSettings(rows_path(args), max_length=MAX_LENGTH, cache_dir=args.folder / "cache")
    started = time.perf_counter()
    store = load_or_build_tokens(settings, tokenizer)
    seconds = time.perf_counter() - started
    assert len(store) == args.rows
    return speed_of(args.rows, seconds)


def measure_trl(args: argparse.Namespace, num_processes: int | None = None) -> dict[str, float]:
    import datasets
    from trl import SFTConfig, SFTTrainer

    from sft_lightning.data.tokenization import load_tokenizer

    tokenizer = load_tokenizer(str(args.folder / "model"))
    with tempfile.TemporaryDirectory() as cache:
        config = SFTConfig(
            cache, max_length=MAX_LENGTH, dataset_num_proc=num_processes, use_cpu=True, bf16=False, report_to=[]
        )
        # All that the method reads of a trainer: to make one would load a model.
        trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
        started = time.perf_counter()
        path = str(args.folder / f"trl-{args.trl_rows}.jsonl")
        rows = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
        rows = rows.rename_column("response", "completion")
        prepared = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, config, False, None, "train")
        seconds = time.perf_counter() - started
        assert len(prepared) == args.trl_rows
        assert {"input_ids", "labels"} <= set(prepared.column_names)
    return speed_of(args.trl_rows, seconds)


def measure_cached(args: argparse.Namespace) -> dict[str, float]:
    import lightning.pytorch as pl

    # transformers imports what it exports when it is asked for it.
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: F401

    from sft_lightning import SFTDataModule, SFTModule

    found: dict[str, float] = {"resident_after_imports_mb": memory("VmRSS")}

    class FirstBatch(pl.Callback):
        def on_train_batch_start(self, *hook_arguments: object) -> None:
            found.update(seconds=time.perf_counter() - started, resident_mb=memory("VmRSS"), peak_mb=memory("VmHWM"))
            report_and_leave(found)

    started = time.perf_counter()
    model = str(args.folder / "model")
    data = SFTDataModule(
        str(rows_path(args)), tokenizer_path=model, max_length=MAX_LENGTH, cache_dir=str(args.folder / "cache")
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=8,
        callbacks=[FirstBatch()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(SFTModule(model), data)
    raise AssertionError("no batch came")


def measure_imports(args: argparse.Namespace) -> dict[str, float]:
    import lightning  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    return {"cpu_seconds": time.process_time()}


def measure_fit(args: argparse.Namespace) -> dict[str, float]:
    import lightning.pytorch as pl

    from sft_lightning.cli.main import main as sft_lightning

    class FirstStep(pl.Callback):
        def on_train_batch_end(self, *hook_arguments: object) -> None:
            report_and_leave({"cpu_seconds": time.process_time()})

    fit = pl.Trainer.fit

    @functools.wraps(fit)  # the command line reads its options off the signature
    def fit_one_step(trainer: pl.Trainer, *arguments: object, **options: object) -> None:
        trainer.callbacks.insert(0, FirstStep())
        fit(trainer, *arguments, **options)

    pl.Trainer.fit = fit_one_step
    folder = args.folder / "quickstart"
    options = {
        "config": ROOT / "configs" / "quickstart.yaml",
        "data.train_path": folder / "train.jsonl",
        "data.val_path": folder / "heldout.jsonl",
        "data.cache_dir": args.folder / "cache",
        "model.model_path": folder / "model",
        "evaluation.num_examples": 0,
        "output_dir": args.folder / "run",
    }
    code = sft_lightning(["fit", "--overwrite", *(f"--{name}={value}" for name, value in options.items())])
    raise AssertionError(f"fit ended before a step, with code {code}")


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "bare": measure_bare,
    "ours": measure_ours,
    "trl": measure_trl,
    "trl_2_processes": lambda args: measure_trl(args, 2),
    "cached": measure_cached,
    "imports": measure_imports,
    "fit": measure_fit,
}


def speed_of(num_rows: int, seconds: float) -> dict[str, float]:
    speed = num_rows / seconds
    return {"rows": num_rows, "seconds": seconds, "rows_per_second": speed, "peak_mb": memory("VmHWM")}


def memory(name: str) -> float:
    """Returns VmRSS or VmHWM of this process in megabytes; ru_maxrss would begin with the parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{name}:")) * 1024 / 1e6


def rows_path(args: argparse.Namespace) -> Path:
    return args.folder / f"rows-{args.rows}.jsonl"


if __name__ == "__main__":
    main()
