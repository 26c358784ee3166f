"""Define shared fixtures: a tiny tokenizer and model, prompt/response files, and the real GSM8K."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sft_lightning import HFCheckpoint, SFTDataModule, SFTModule

CONFIGS = Path(__file__).parents[1] / "configs"
RELIABILITY = Path(__file__).parents[1] / "docs" / "reliability.md"

CORPUS = [
    "User: What is 2+2? Assistant: <think> two and two is four </think> <answer> 4 </answer>",
    "the quick brown fox jumps over the lazy dog, again and again, 0 1 2 3 4 5 6 7 8 9",
]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def note_fault(request):
    """Notes the outcome of a fault, a row of docs/reliability.md, which is written if the test passes.

    Rows are written with SFT_WRITE_DOCS=1 only; tests/test_reliability.py compares the page with the tests.
    """
    rows = []

    def note(fault: str, *, provoked: str, outcome: str, lost: str = "nothing", tries: int = 1) -> None:
        rows.append((fault, provoked, outcome, lost, str(tries), request.node.originalname))

    yield note
    failed = getattr(request.node, "failed", True)
    if rows and not failed and os.environ.get("SFT_WRITE_DOCS"):
        write_reliability_rows(rows)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.failed = not report.passed
    return report


def write_reliability_rows(rows: list[tuple[str, ...]]) -> None:
    """Puts rows into the table of docs/reliability.md, and replaces those of the same fault."""
    lines = RELIABILITY.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| fault |")) + 2
    end = next((number for number, line in enumerate(lines[start:], start) if not line.startswith("|")), len(lines))
    table = {line.split(" | ")[0].removeprefix("| "): line for line in lines[start:end]}
    table |= {row[0]: "| " + " | ".join(row) + " |" for row in rows}
    lines[start:end] = [table[name] for name in sorted(table, key=str.casefold)]
    RELIABILITY.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def _own_cache_and_one_thread(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps token caches out of the user's home, and results independent of the machine's cores."""
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "token-cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quickstart_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which ``make quickstart`` ran; slow. Tests must not write into it."""
    from sft_lightning.cli.main import main

    folder = tmp_path_factory.mktemp("quickstart-run")
    with pytest.MonkeyPatch.context() as environment:
        environment.chdir(folder)
        environment.setenv("SFT_CACHE_DIR", str(folder / "token-cache"))
        assert main(["prepare", "quickstart", "--output", "data/quickstart"]) == 0
        assert main(["fit", "--config", str(CONFIGS / "quickstart.yaml")]) == 0
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def make_model(vocabulary_size: int, dropout: float = 0.0) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=dropout,
        bos_token_id=None,
        eos_token_id=0,
    )
    return Qwen2ForCausalLM(config)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """A tiny Qwen2 with tied weights and its tokenizer, as `from_pretrained` loads them."""
    folder = tmp_path_factory.mktemp("model")
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def dropout_model_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """The same with dropout in its attention."""
    folder = tmp_path_factory.mktemp("dropout-model")
    make_model(len(tokenizer), dropout=0.2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, num_rows: int, first: int = 0) -> str:
    """Writes prompt/response rows of widely differing lengths."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(first, first + num_rows):
            words = " ".join(str(number) for number in range(row % 7 + 1))
            answer = f" {words} </think> <answer> {row} </answer>"
            record = {"prompt": f"Count to {row % 7}: " * (1 + row % 3), "response": answer, "ground_truth": str(row)}
            file.write(json.dumps(record) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """42 rows: with 8 rows a step, five full steps and a last one of two rows."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", 42)


@pytest.fixture(scope="session")
def val_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "val.jsonl", 11, first=100)


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    folder = Path(os.environ.get("SFT_GSM8K_DIR", Path(__file__).parents[2] / "shared" / "gsm8k"))
    if not (folder / "train.jsonl").is_file():
        pytest.skip(f"no GSM8K in {folder}; set SFT_GSM8K_DIR to a folder with train.jsonl and test.jsonl")
    return folder


@pytest.fixture
def command(model_folder, train_file, tmp_path, monkeypatch):
    """The options of a small run in tmp_path/run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {
        "output_dir": str(tmp_path / "run"),
        "data": {"train_path": train_file, "batch_size": 4, "max_length": 512},
        "model": {"model_path": model_folder, "learning_rate": 1e-2},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "accumulate_grad_batches": 2, "log_every_n_steps": 1},
        "checkpoint": {"every_n_train_steps": 2},
        "evaluation": {"generator": {"class_path": "TransformersGenerator", "init_args": {"max_new_tokens": 3}}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(path)]


class MetricsRecorder(Logger):
    """Keeps all logged metrics."""

    name = "recorder"
    version = ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def series(self, key: str) -> list[tuple[int | None, float]]:
        """Returns (optimizer step, value) of each time that a metric was logged."""
        return [(step, metrics[key]) for step, metrics in self.rows if key in metrics]


@pytest.fixture(scope="session")
def make_trainer(tmp_path_factory: pytest.TempPathFactory):
    """Makes a quiet Trainer on one CPU; keywords override. What it logs is in ``trainer.logger.series(key)``."""

    def make(*callbacks: Callback, **options: object) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": MetricsRecorder(),
            "default_root_dir": str(tmp_path_factory.mktemp("root")),
            "log_every_n_steps": 1,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def make_data(model_folder: str):
    """Makes a data module over files, of micro-batches of two rows; keywords override."""

    def make(train_path: str | None = None, val_path: str | None = None, **options: object) -> SFTDataModule:
        defaults = {"tokenizer_path": model_folder, "batch_size": 2, "seed": 1}
        return SFTDataModule(train_path=train_path, val_path=val_path, **{**defaults, **options})

    return make


class Recorder(Callback):
    """Keeps the loss and the gradients of each optimizer step, in the dtype they were computed in."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self._sum = 0.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        # Lightning hands out a micro-batch's loss divided by the accumulation: their sum is the step's loss.
        self._sum += float(outputs["loss"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self.losses.append(self._sum)
            self._sum = 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {name: p.grad.clone() for name, p in pl_module.model.named_parameters() if p.grad is not None}
        self.gradients.append(gradients)


@dataclass
class Run:
    trainer: Trainer
    module: SFTModule
    losses: list[float]
    gradients: list[dict[str, torch.Tensor]]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.module.model.state_dict()


@pytest.fixture
def fit(model_folder: str, train_file: str, tmp_path_factory: pytest.TempPathFactory):
    """Trains as a user's program would, and returns its results; keywords override the defaults below."""

    def run(
        output_dir: Path | None = None,
        *,
        ckpt_path: str | None = None,
        model: dict | None = None,
        data: dict | None = None,
        checkpoint: dict | None = None,
        callbacks: tuple = (),
        **trainer: object,
    ) -> Run:
        seed_everything(7, verbose=False)
        paths = {"train_path": train_file, "tokenizer_path": model_folder}
        datamodule = SFTDataModule(**{**paths, "batch_size": 4, "max_length": 512, **(data or {})})
        module = SFTModule(**{"model_path": model_folder, "learning_rate": 1e-2, **(model or {})})
        recorder = Recorder()
        saving = [] if output_dir is None else [HFCheckpoint(str(output_dir), **(checkpoint or {}))]
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        quiet["default_root_dir"] = str(tmp_path_factory.mktemp("root"))
        options = {**quiet, "max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, **trainer}
        options["enable_checkpointing"] = bool(saving) or any(isinstance(c, ModelCheckpoint) for c in callbacks)
        runner = Trainer(callbacks=[recorder, *callbacks, *saving], **options)
        runner.fit(module, datamodule, ckpt_path=ckpt_path)
        return Run(runner, module, recorder.losses, recorder.gradients)

    return run


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt, even if the tests run in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class FakeServer(ThreadingHTTPServer):
    """Answers every request with what ``answer(path, body)`` returns: status, headers and JSON or bytes.

    Attributes:
        requests: (path, headers, body, seconds) of each request, in the order of their arrival.
        closing: Set in the end, for an answer that waits.
        url: Prefix of every path.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FakeServerHandler)
        self.requests = []
        self.closing = threading.Event()
        self.answer = lambda path, body: (404, {}, {})
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that has gone away


class FakeServerHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self._answer(None)

    def do_POST(self):
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _answer(self, body):
        path = self.path.removeprefix("/v1")
        self.server.requests.append((path, dict(self.headers), body, time.monotonic()))
        status, headers, content = self.server.answer(path, body)
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield fake
    fake.closing.set()
    fake.shutdown()
    thread.join()
    fake.server_close()
