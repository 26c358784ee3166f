"""What the parts of a GPU session share: results on disk after every measurement, sizes, rows and the model."""

import argparse
import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rows import (
    Job,
    gsm8k_rows,
    model_config,
    synthetic_rows,
    token_lengths,
    train_tokenizer,
    with_responses,
    write_rows,
)
from transformers import PreTrainedModel

from sft_lightning.models.loading import load_model
from sft_lightning.models.precision import Precision

ROWS_PER_STEP = 32
NUM_STEPS_OF_ROWS = 6


class Session:
    """One part of the session, in a separate process.

    Attributes:
        tiny: Runs on a CPU with small sizes, whose numbers mean nothing.
        device: ``cuda``, or ``cpu`` if tiny.
        work: Folder that the parts of one session share.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.tiny: bool = args.tiny
        self.device = "cpu" if args.tiny else "cuda"
        self.work: Path = args.work
        self._data: Path = args.data
        self._path = args.work / f"{args.part}.json"
        self._deadline = time.monotonic() + args.seconds
        self._results: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        """Writes a result to disk at once: a part that is stopped keeps what it has found."""
        self._results[name] = value
        print(name, value, flush=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._results, indent=1, default=str), encoding="utf-8")
        temporary.replace(self._path)

    def measure(self, name: str, function: Callable[[], Any], *, needs_seconds: float = 5.0) -> None:
        """Puts what ``function`` returns, or why there is no result; a failure does not end the part."""
        if not self.tiny and self._deadline - time.monotonic() < needs_seconds:
            self.put(name, "skipped: no time left")
            return
        try:
            self.put(name, function())
        except Exception as error:
            traceback.print_exc()
            self.put(name, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        finally:
            gc.collect()
            torch.cuda.empty_cache()

    def size(self, number: int) -> int:
        """Returns a number of rows, a quarter of it in a tiny session."""
        return max(1, number // 4) if self.tiny else number

    def wait(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def job(self, *, num_steps: int = 3) -> Job:
        """Returns the training run of a competitor. Tokenizer, rows and config are written once for all parts."""
        folder = self.work / "model"
        if not (folder / "config.json").is_file():
            self._write_inputs(folder)
        return Job(
            folder=folder,
            rows_path=self.work / "rows.jsonl",
            device=self.device,
            dtype="float32",
            rows_per_step=self.size(ROWS_PER_STEP),
            num_steps=num_steps,
            num_warmup_steps=1,
            mixed=True,
        )

    def rows_text(self) -> str:
        return (self.work / "rows.txt").read_text(encoding="utf-8")

    def model(self) -> PreTrainedModel:
        """Returns Qwen2.5-1.5B's shape with random float32 weights, loaded as the command line loads a model."""
        folder = self.job().folder
        precision = Precision.named("32-true" if self.tiny else "bf16-mixed")
        torch.manual_seed(0)
        with torch.device(self.device):
            return load_model(str(folder), init="random", device_type=self.device, precision=precision)

    def _write_inputs(self, folder: Path) -> None:
        source, origin = (synthetic_rows(200), "made-up rows") if self.tiny else gsm8k_rows(self._data, 4000)
        tokenizer = train_tokenizer(source[:3000], 600 if self.tiny else 6016)
        rows = with_responses(source, NUM_STEPS_OF_ROWS * self.size(ROWS_PER_STEP), 1)
        write_rows(self.work / "rows.jsonl", rows)
        (self.work / "rows.txt").write_text(f"{origin}: {token_lengths(rows, tokenizer)}", encoding="utf-8")
        tokenizer.save_pretrained(folder)
        # The config comes last: its presence says that everything is there.
        model_config("tiny" if self.tiny else "qwen2.5-1.5b", tokenizer, "float32").save_pretrained(folder)


def add_options(parser: argparse.ArgumentParser) -> None:
    repository = Path(__file__).resolve().parents[2]
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-session")), help="where results go")
    parser.add_argument(
        "--data", type=Path, default=repository, help="folder with GSM8K's train.jsonl, if there is one"
    )
    parser.add_argument("--tiny", action="store_true", help="on a CPU, with small sizes: numbers mean nothing")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
