"""TRL's SFTTrainer on the same rows, and the search for its best setting on this device.

    python benchmarks/trl_trainer.py [--dtype bfloat16] [--steps 4] [--json benchmarks/results/trl_search.json]

Every setting keeps the rows of a step. Wrapped packing is omitted, because it cuts rows in two and so trains on other
contexts; Liger's and the hub's kernels, because they need Triton and a download.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Literal

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import numpy as np
from meter import Counts, Measurement, Meter, as_json, counts_of_rows, machine, summarize
from rows import DTYPES, Job, add_row_options, prepare
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

try:
    import datasets
    from transformers import Trainer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import add_fused_lm_head

    MISSING = None
except ImportError as error:
    MISSING = f"TRL is not installed ({error}): pip install -r benchmarks/requirements.txt"
    Trainer = TrainerCallback = SFTTrainer = object

NO_CHECKPOINTING = {"gradient_checkpointing": False}
GROUPED = {**NO_CHECKPOINTING, "train_sampling_strategy": "group_by_length"}
PADDING_FREE = {**NO_CHECKPOINTING, "padding_free": True, "max_length": None}


def packed(max_length: int) -> dict[str, Any]:
    return {**NO_CHECKPOINTING, "packing": True, "max_length": max_length}


@dataclass(frozen=True, eq=False)
class Setting:
    """One way to run it.

    Attributes:
        name: In tables.
        batch_size: Rows of a micro-batch; packed rows of ``max_length`` tokens where it packs.
        options: Of SFTConfig.
        head: trl computes entropy and accuracy in each step, which no option turns off. log_probs and full_logits are
            subclasses that leave them out: its fused head without them, and transformers' own loss on all logits.
        attention: attn_implementation.
    """

    name: str
    batch_size: int
    options: dict[str, Any] = field(default_factory=dict)
    head: Literal["trl", "log_probs", "full_logits"] = "trl"
    attention: str = "sdpa"


DEFAULT = Setting("as shipped, checkpointing", 4)
WITHOUT_CHECKPOINTING = Setting("as shipped, no checkpointing", 4, NO_CHECKPOINTING)
FLASH = importlib.util.find_spec("flash_attn") is not None


def finalists(device: str) -> list[Setting]:
    """Returns the settings that came out best in the search; throughput.py takes the fastest of them for TRL's best."""
    sizes = (8, 32) if device == "cuda" else (1, 2, 4)
    settings = [
        Setting(f"grouped{name}", size, GROUPED, head=head)
        for head, name in (("trl", ""), ("full_logits", ", full logits"))
        for size in sizes
    ]
    if device == "cuda" and FLASH:
        settings += [Setting("padding-free", size, PADDING_FREE, attention="flash_attention_2") for size in sizes]
        settings += [Setting("packed to 2048", size, packed(2048), attention="flash_attention_2") for size in (1, 4)]
    return settings


def candidates(dtype: str) -> list[Setting]:
    """Returns every setting that the search tries."""
    settings = [DEFAULT, WITHOUT_CHECKPOINTING]
    settings += [Setting("grouped", size, GROUPED) for size in (1, 2, 4, 8, 16, 32)]
    settings += [Setting("rebalanced", 8, {**NO_CHECKPOINTING, "train_sampling_strategy": "batch_rebalance"})]
    settings += [Setting("padding-free", size, PADDING_FREE) for size in (2, 4, 8)]
    settings += [Setting(f"packed to {length}", 1, packed(length)) for length in (512, 1024, 2048)]
    settings += [Setting("packed to 512", 4, packed(512))]
    for head in ("log_probs", "full_logits"):
        settings += [Setting(f"grouped, {head}", size, GROUPED, head=head) for size in (1, 2, 4, 8, 16)]
        settings += [Setting(f"padding-free, {head}", size, PADDING_FREE, head=head) for size in (2, 4)]
        settings += [Setting(f"packed to {length}, {head}", 1, packed(length), head=head) for length in (512, 1024)]
    settings += [Setting("grouped, eager attention", size, GROUPED, attention="eager") for size in (4, 8)]
    settings += [Setting("packed to 1024, flex attention", 1, packed(1024), attention="flex_attention")]
    settings += [Setting("grouped, 1 loader process", 8, {**GROUPED, "dataloader_num_workers": 1})]
    if dtype == "bfloat16":
        settings += [Setting("grouped, autocast", size, {**GROUPED, "bf16": True}) for size in (4, 8)]
    return settings


class _StepClock(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._meter.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._meter.end_step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if self._meter.first_loss is None and "loss" in logs:
            self._meter.first_loss = float(logs["loss"])


class _FullLogits(SFTTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.compute_loss(self, *args, **kwargs)


class _LogProbs(SFTTrainer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        add_fused_lm_head(self.model, outputs=("log_probs",))

    def compute_loss(self, model: nn.Module, inputs: dict, *args: Any, num_items_in_batch: Any, **kwargs: Any) -> Any:
        return -model(**inputs, fused_lm_head=True).log_probs.sum() / num_items_in_batch


def run(job: Job, setting: Setting) -> Measurement:
    """Trains and returns what was measured."""
    if MISSING:
        raise RuntimeError(MISSING)
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(job.folder)
    model = AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=DTYPES[job.dtype], attn_implementation=setting.attention
    )
    meter = Meter(job.device)
    model.register_forward_pre_hook(lambda module, args, kwargs: meter.add(lambda: _counts(kwargs)), with_kwargs=True)
    kind = {"trl": SFTTrainer, "log_probs": _LogProbs, "full_logits": _FullLogits}[setting.head]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        trainer = kind(
            model=model,
            args=_config(job, setting, folder),
            train_dataset=datasets.load_dataset(
                "json", data_files=str(job.rows_path), split="train", cache_dir=folder
            ).rename_column("response", "completion"),
            processing_class=tokenizer,
            callbacks=[_StepClock(meter)],
        )
        if setting.options.get("packing"):
            trainer.args.gradient_accumulation_steps = _packs_per_step(job, len(trainer.train_dataset), setting)
        trainer.train()
    return meter.result(job.num_warmup_steps)


def _config(job: Job, setting: Setting, folder: str) -> "SFTConfig":
    options = {
        "bf16": False,
        "max_length": 4096,
        "dataloader_pin_memory": job.device == "cuda",
        **setting.options,
    }
    return SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=setting.batch_size,
        gradient_accumulation_steps=job.rows_per_step // setting.batch_size,
        max_steps=job.num_steps,
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        completion_only_loss=True,
        use_cpu=job.device == "cpu",
        logging_strategy="no",
        logging_first_step=True,  # the only one, in a step that is not timed
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def _packs_per_step(job: Job, num_packs: int, setting: Setting) -> int:
    """Returns the micro-batches that hold about a step's rows; all of them where the data set is one step's rows."""
    num_rows = len(job.rows_path.read_text(encoding="utf-8").splitlines())
    if num_rows == job.rows_per_step:
        return ceil(num_packs / setting.batch_size)
    return max(1, round(num_packs / num_rows * job.rows_per_step / setting.batch_size))


def _counts(inputs: dict[str, Tensor]) -> Counts:
    is_flat = "cu_seq_lens_q" in inputs
    lengths = inputs["cu_seq_lens_q"].diff() if is_flat else inputs["attention_mask"].sum(-1)
    # Every row goes in with its last token, which predicts nothing.
    labels = int((inputs["labels"][:, 1:] != -100).sum())
    return counts_of_rows(lengths.cpu().numpy().astype(np.int64) - 1, inputs["input_ids"].numel(), labels)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_row_options(parser)
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each setting, taken in turn")
    args = parser.parse_args()
    if MISSING:
        sys.exit(MISSING)
    steps, rounds = (1, 1) if args.dry_run else (args.steps, args.rounds)
    settings = candidates(args.dtype)[:4] if args.dry_run else candidates(args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        job, about = prepare(Path(folder), args, num_steps=steps + 1, num_warmup_steps=1)
        measured, failed = search(job, settings, rounds)
        config = AutoConfig.from_pretrained(job.folder)
    results = [
        {**asdict(setting), "first_loss": measured[setting].first_loss, **as_json(summarize(measured[setting], config))}
        for setting in measured
    ]
    results.sort(key=lambda result: -result["tokens_per_second"])
    print(about["lengths_text"])
    print("\n| setting | micro-batch | tokens/s | positions a step | loss of the first step |\n|---|---|---|---|---|")
    for result in results:
        print(
            f"| {result['name']} | {result['batch_size']} | {result['tokens_per_second']:.0f} | "
            f"{result['positions_per_step']:.0f} | {result['first_loss']:.6f} |"
        )
    for setting, reason in failed.items():
        print(f"| {setting.name} | {setting.batch_size} | does not run: {reason} | | |")
    if args.json:
        failures = [{**asdict(setting), "reason": reason} for setting, reason in failed.items()]
        content = {**about, "dtype": args.dtype, "machine": machine(job), "results": results, "failed": failures}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def search(job: Job, settings: list[Setting], rounds: int) -> tuple[dict[Setting, Measurement], dict[Setting, str]]:
    """Returns what each setting measured, and why those failed that did."""
    measured: dict[Setting, Measurement] = {}
    failed: dict[Setting, str] = {}
    for number in range(rounds):
        for setting in settings:
            if setting in failed:
                continue
            print(f"round {number + 1}: {setting.name}, {setting.batch_size}", file=sys.stderr, flush=True)
            try:
                measurement = run(job, setting)
            except Exception as error:  # a setting that this device cannot run is a result of the search
                failed[setting] = " ".join(str(error).split())[:160]
                measured.pop(setting, None)
                continue
            rate = sum(count.tokens for count in measurement.counts) / sum(measurement.seconds)
            print(f"    {rate:.0f} tokens/s, first loss {measurement.first_loss:.6f}", file=sys.stderr, flush=True)
            if setting in measured:
                measured[setting] += measurement
            else:
                measured[setting] = measurement
    return measured, failed


if __name__ == "__main__":
    main()
