"""Kill a run with SIGKILL and resume it, many times: `python tests/soak.py [FORKED] [WHOLE] [SHARDED]`.

FORKED children (260) are forked from this process, which has only done the imports, and call the function behind
`sft-lightning fit`; WHOLE runs (30) are separate processes, and SHARDED ones (10) two processes under FSDP2. Half of
each are killed while a checkpoint is being written, and count only if they left an unfinished folder, which proves it.
The others die at any moment after the start of the process. After each kill the newest good checkpoint must be at least
as far as before, and the targets of `last` and `best` must be whole. A run that reaches its end is compared with one
that was never interrupted, in weights, optimizer state, metrics, answers and training rows, and the next run begins.

The runs take turns: a plain one; one that goes back to an earlier checkpoint after some kills; one that overwrites
another run, which must still be there until the new one has a checkpoint; one that early stopping ends; and one with
an exponential moving average of its weights.

The last line is JSON, with the counts. Exit code 1 if anything was lost.
"""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pyarrow.parquet as pq
import torch
import transformers.models.qwen2.modeling_qwen2  # noqa: F401

import sft_lightning.cli.lightning_cli  # noqa: F401
from sft_lightning.checkpointing import folder as folders
from sft_lightning.checkpointing.run_folder import open_run_folder
from sft_lightning.cli.main import main as sft_lightning_main
from sft_lightning.errors import UserError
from sft_lightning.system.lock import unlock_folders

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
# 36 steps of two micro-batches, 18 checkpoints of which three and the best stay, and 7 evaluations.
OPTIONS = {
    "data.max_train_examples": 96,
    "data.batch_size": 4,
    "trainer.accumulate_grad_batches": 2,
    "trainer.max_epochs": 3,
    "trainer.log_every_n_steps": 1,
    "model.warmup_steps": 5,
    "checkpoint.every_n_train_steps": 2,
    "checkpoint.keep_last": 3,
    "validate_every_n_steps": 6,
    "evaluation.num_examples": 6,
    "evaluation.generator.init_args.max_new_tokens": 12,
}


STOPS_EARLY = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "min_delta": 10, "patience": 2}}
AVERAGES = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.9}}
FSDP2 = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "branches": {},
    "overwrites": {},
    "stops early": {"trainer.callbacks": json.dumps([STOPS_EARLY])},
    "averages": {"trainer.callbacks": json.dumps([AVERAGES])},
    "sharded": {"trainer.strategy": json.dumps(FSDP2), "trainer.devices": 2, "data.batch_size": 2},
}


class Run:
    """The run that is killed: where it is, and how to start it once more.

    Args:
        work: The folder for all runs, with the data.
        name: Of this run.
        kind: One of ``KINDS``.
    """

    def __init__(self, work: Path, name: str, kind: str) -> None:
        self.folder = work / name
        self.log = work / f"{name}.log"
        self.kind = kind
        self.start = "auto"
        data = work / "data"
        paths = {"data.train_path": data / "train.jsonl", "data.val_path": data / "heldout.jsonl"}
        where = {"model.model_path": data / "model", "output_dir": self.folder}
        options = {**OPTIONS, **KINDS[kind], **paths, **where}
        self.options = ["fit", "--config", str(CONFIG), *[f"--{name}={value}" for name, value in options.items()]]
        if kind == "overwrites":
            shutil.copytree(work / "old", self.folder, symlinks=True)

    @property
    def arguments(self) -> list[str]:
        """The command of its next start."""
        replaces = self.kind == "overwrites" and not self.newest() and (self.folder / "checkpoint-1").is_dir()
        return [*self.options, "--overwrite"] if replaces else [*self.options, "--ckpt_path", self.start]

    def choose_start(self) -> int:
        """Decides where its next start resumes from. Returns that step."""
        self.start = "auto"
        earlier = [path for path in folders.branch(self.folder) if self.kind == "branches" and random.random() < 0.3]
        if earlier:
            chosen = random.choice(earlier)
            self.start = str(chosen)
            return int(chosen.name.removeprefix("checkpoint-"))
        return self.newest()

    def fork(self) -> int:
        """Starts it in a child of this process."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = sft_lightning_main(self.arguments)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def spawn(self) -> int:
        """Starts it in a separate process."""
        with self.log.open("a") as output:
            program = [sys.executable, "-m", "sft_lightning", *self.arguments]
            return subprocess.Popen(program, stdout=output, stderr=output).pid

    def unfinished(self) -> set[str]:
        """Returns the names of folders that are being written, or were when their process died."""
        found = {path.name for path in self.folder.glob(".checkpoint-*.tmp-*")}
        return found | {path.name for path in self.folder.glob(".final.tmp-*")}

    def newest(self) -> int:
        """Returns the step of the checkpoint that it would resume from, 0 if it has none of its own."""
        found = folders.find(self.folder, "auto") if self.folder.is_dir() else None
        step = int(found.name.removeprefix("checkpoint-")) if found else 0
        return step if step > 1 else 0  # the run that another one overwrites has checkpoint-1 only


@dataclass
class Counts:
    """What became of the tries."""

    tries: int = 0
    killed_while_writing: int = 0
    survivors: int = 0
    losses: list[str] = field(default_factory=list)


def kill(run: Run, process: int, *, while_writing: bool, longest: float, write_seconds: float) -> bool:
    """Kills a process when its moment has come. Returns False if it came to its end before."""
    deadline = time.monotonic() + random.uniform(0, longest)
    left = random.randint(1, 8)  # how many writes to let pass, and die in the last of them
    seen: set[str] = run.unfinished()
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        if while_writing:
            new = run.unfinished() - seen
            seen |= new
            left -= len(new)
            if new and left <= 0:
                time.sleep(random.uniform(0, write_seconds))
                break
        elif time.monotonic() > deadline:
            break
        time.sleep(0.0003 if while_writing else 0.002)
    else:
        return False
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return os.WIFSIGNALED(status)


def outcome(run: Path) -> dict[str, Any]:
    """Returns all that a run leaves, but for how long it took."""
    state = torch.load(folders.find(run, "last") / "trainer_state.ckpt", weights_only=True)
    with (run / "metrics.csv").open() as file:
        timed = ("per_second", "utilization", "memory")
        metrics = [
            {name: value for name, value in row.items() if not any(word in name for word in timed)}
            for row in csv.DictReader(file)
        ]
    rows = [row for path in run.glob("row_losses/*/*.parquet") for row in pq.read_table(path).to_pylist()]
    return {
        "weights": (run / "final" / "model.safetensors").read_bytes(),
        "best weights": (run / "best" / "model.safetensors").read_bytes(),
        "checkpoints": sorted(path.name for path in run.glob("checkpoint-*")),
        "optimizer state": [
            (name, key, value.tolist() if isinstance(value, torch.Tensor) else value)
            for name, values in state["optimizer_states"][0]["state"].items()
            for key, value in values.items()
        ],
        "metrics": metrics,
        "answers": {path.parent.name: path.read_bytes() for path in run.glob("evaluation/*/predictions.jsonl")},
        "training rows": sorted(((row["epoch"], row["source"]), row["nll_sum"]) for row in rows),
    }


def differences(run: Path, reference: dict[str, Any]) -> list[str]:
    """Returns the differences of a finished run from an uninterrupted one."""
    found = outcome(run)
    return [
        f"{run.name}: {name} differ: {first_difference(found[name], reference[name])}"
        for name in reference
        if found[name] != reference[name]
    ]


def first_difference(ours: Any, theirs: Any) -> str:
    """Returns the first place at which two sequences or mappings differ, in short."""
    if isinstance(ours, dict):
        ours, theirs = sorted(ours.items()), sorted(theirs.items())
    pairs = zip(ours, theirs, strict=False)
    found = next((f"{number}: {a} and {b}" for number, (a, b) in enumerate(pairs) if a != b), "lengths")
    return f"{found:.1500}"


def check(run: Run, before: int) -> list[str]:
    """Returns the faults of the checkpoints after a kill."""
    try:
        open_run_folder(run.folder)  # as the next start does, which undoes half an overwrite
        unlock_folders()
        now = run.newest()
        if run.kind == "overwrites" and now == 0:
            kept = next(folder for folder in (run.folder / ".replaced-run", run.folder) if folder.is_dir())
            for name in ("checkpoint-1", "final"):
                folders.verify(kept / name)
        for word in ("last", "best"):
            if (run.folder / word).is_symlink():
                folders.verify(folders.find(run.folder, word))
    except UserError as error:
        return [f"{run.folder.name}: {error}"]
    return [f"{run.folder.name}: was at step {before}, is at {now}"] if now < before else []


def reap(run: Run, process: int) -> list[str]:
    """Waits for the end of a process that is not killed. Returns its faults."""
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    return [f"{run.folder.name}: exit code {code}\n{run.log.read_text()[-3000:]}"] if code else []


@dataclass
class Reference:
    """An uninterrupted run of a kind: how long it took, in seconds, and all that it left."""

    seconds: float
    outcome: dict[str, Any]


def tries(work: Path, way: str, kinds: list[str], number: int, counts: Counts) -> None:
    """Kills processes that start in a way, ``fork`` or ``spawn``, half of them while they write."""
    references = {kind: refer(work, way, kind) for kind in kinds}
    runs = writes = tried = before = 0
    run = Run(work, f"{way}-0", kinds[0])
    while tried < number:
        while_writing = writes <= tried - writes
        process = getattr(run, way)()
        if kill(run, process, while_writing=while_writing, longest=references[run.kind].seconds, write_seconds=0.015):
            tried += 1
            writes += bool(run.unfinished())
            counts.losses += check(run, before)
            before = run.choose_start()
            print(f"\r{way}: {tried} of {number} killed, {writes} while writing", end="", flush=True)
            continue
        counts.losses += [] if (run.folder / "final").is_dir() else [f"{run.folder.name}: ended early"]
        finish(run, way, references[run.kind], counts)
        runs, before = runs + 1, 0
        run = Run(work, f"{way}-{runs}", kinds[runs % len(kinds)])
    finish(run, way, references[run.kind], counts)
    print()
    counts.tries += tried
    counts.killed_while_writing += writes


def refer(work: Path, way: str, kind: str) -> Reference:
    """Runs a run of a kind without an interruption."""
    whole = Run(work, "whole", kind)
    started = time.monotonic()
    assert not (failed := reap(whole, getattr(whole, way)())), failed
    reference = Reference(time.monotonic() - started, outcome(whole.folder))
    print(f"uninterrupted, {kind}, by {way}: {reference.seconds:.1f} s")
    shutil.rmtree(whole.folder)
    return reference


def finish(run: Run, way: str, reference: Reference, counts: Counts) -> None:
    """Has a run come to its end, and compares."""
    found = reap(run, getattr(run, way)()) or differences(run.folder, reference.outcome)
    counts.losses += [f"{run.kind}: {each}" for each in found]
    counts.survivors += not found
    shutil.rmtree(run.folder)


def soak(work: Path, num_forked: int, num_whole: int, num_sharded: int) -> Counts:
    """Runs all of it in a folder that is empty."""
    os.environ["SFT_CACHE_DIR"] = str(work / "cache")
    prepare = [sys.executable, "-m", "sft_lightning", "prepare", "quickstart", "--output", str(work / "data")]
    subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
    old = Run(work, "old", "plain")
    old.options += ["--trainer.max_steps=1", "--checkpoint.every_n_train_steps=1"]
    assert not (failed := reap(old, old.spawn())), failed
    counts = Counts()
    kinds = [kind for kind in KINDS if kind != "sharded"]
    for way, chosen, number in (
        ("fork", kinds, num_forked),
        ("spawn", kinds, num_whole),
        ("spawn", ["sharded"], num_sharded),
    ):
        if number:
            tries(work, way, chosen, number, counts)
    return counts


def main() -> int:
    numbers = [int(argument) for argument in (sys.argv[1:] + ["260", "30", "10"][len(sys.argv) - 1 :])]
    seed = int(os.environ.get("SFT_SOAK_SEED", time.time_ns() % 10**6))
    random.seed(seed)
    print(f"seed {seed}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        counts = soak(Path(work), *numbers)
    print(*counts.losses, sep="\n")
    print(
        f"{counts.tries} tries, {counts.killed_while_writing} of them while a checkpoint was written; "
        f"{counts.survivors} runs came to their end, equal to one without interruptions; "
        f"{len(counts.losses)} losses; {(time.monotonic() - started) / 60:.1f} minutes"
    )
    print(json.dumps({**vars(counts), "losses": len(counts.losses)}))
    return bool(counts.losses)


if __name__ == "__main__":
    sys.exit(main())
