"""Test that data, models and checkpoints never run code, and that commands reach no other machine."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from sft_lightning.cli.main import main

CONFIGS = Path(__file__).parents[1] / "configs"


class MakesAFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def marker(tmp_path):
    """What a payload would make."""
    return tmp_path / "executed"


@pytest.fixture
def options(model_folder, train_file, tmp_path, monkeypatch):
    """A small config without its command, into tmp_path/run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {
        "output_dir": str(tmp_path / "run"),
        "data": {"train_path": train_file, "batch_size": 4, "max_length": 512},
        "model": {"model_path": model_folder},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "accumulate_grad_batches": 1},
        "checkpoint": {"every_n_train_steps": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["--config", str(path)]


@pytest.fixture
def own_model(model_folder, tmp_path):
    """A copy of the tiny model that may be spoilt."""
    return Path(shutil.copytree(model_folder, tmp_path / "own-model"))


def error_of(capsys, args):
    """Returns the one line that a command ends with."""
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("sft-lightning: error: ")
    assert "Traceback" not in error
    return error.splitlines()[-1]


# YAML


def yaml_payloads(marker):
    return [
        f"!!python/object/apply:os.mkdir ['{marker}']",
        f"!!python/object/apply:os.mkdir\nargs: ['{marker}']",
        f"!!python/object/new:os.mkdir ['{marker}']",
        f"!!python/object/apply:subprocess.check_call [['mkdir', '{marker}']]",
        "!!python/name:os.mkdir",
        f"!!python/object/apply:builtins.eval [\"__import__('os').mkdir('{marker}')\"]",
        "!!python/module:antigravity",
    ]


@pytest.mark.parametrize(
    ("command", "number"), [*(("fit", number) for number in range(7)), ("check", 0), ("selftest", 0), ("validate", 0)]
)
def test_tags_of_yaml_make_no_objects(options, marker, tmp_path, capsys, note_fault, command, number):
    path = tmp_path / "tagged.yaml"
    path.write_text("model:\n  learning_rate: " + yaml_payloads(marker)[number].replace("\n", "\n    "))
    error_of(capsys, [command, *options, "--config", str(path)])
    assert not marker.exists()
    note_fault(
        "YAML that would construct objects",
        provoked="tags such as !!python/object/apply in a config of fit, check, selftest and validate; also in options "
        "and in environment variables",
        outcome="refused in one line (exit 2); nothing is constructed",
        tries=10,
    )


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("name", ["SFT_FIT__MODEL__LEARNING_RATE", "SFT_FIT__TRAINER__CALLBACKS", "SFT_FIT__CONFIG"])
def test_tags_in_environment_variables_and_options_make_no_objects(options, marker, monkeypatch, capsys, name, number):
    payload = yaml_payloads(marker)[number]
    key = name.removeprefix("SFT_FIT__").lower().replace("__", ".")
    error_of(capsys, ["fit", *options, f"--{key}", payload])
    monkeypatch.setenv(name, payload)
    error_of(capsys, ["fit", *options])
    assert not marker.exists()


def test_the_payloads_work_without_protection(marker):
    for payload in yaml_payloads(marker)[:4]:
        yaml.unsafe_load(payload)
        assert marker.is_dir()
        marker.rmdir()


# Models and checkpoints


@pytest.fixture
def checkpoint(options, tmp_path):
    assert main(["fit", *options]) == 0
    return tmp_path / "run" / "checkpoint-1"


def test_a_checkpoint_with_code_in_its_pickle_is_not_loaded(options, checkpoint, marker, capsys, note_fault):
    torch.save({"global_step": 1, "callbacks": MakesAFolder(marker)}, checkpoint / "trainer_state.ckpt")
    content = (checkpoint / "trainer_state.ckpt").read_bytes()
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["trainer_state.ckpt"] = {"size": len(content), "sha256": sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    for elsewhere in ([], ["--output_dir", str(checkpoint.parents[1] / "elsewhere")]):
        error = error_of(capsys, ["fit", *options, "--ckpt_path", str(checkpoint), *elsewhere])
        assert "trainer_state.ckpt holds something else than tensors and plain values" in error
    assert main(["report", str(checkpoint.parent)]) == 0
    assert not marker.exists()
    note_fault(
        "checkpoint that holds code",
        provoked="a pickle that runs a command as trainer_state.ckpt, its size and digest in the manifest",
        outcome="refused in one line (exit 2); it is not run",
    )


def test_weights_in_a_pickle_with_code_are_not_loaded(
    options, own_model, val_file, tmp_path, marker, capsys, note_fault
):
    (own_model / "model.safetensors").unlink()
    torch.save({"model.norm.weight": MakesAFolder(marker)}, own_model / "pytorch_model.bin")
    error = error_of(capsys, ["fit", *options, "--model.model_path", str(own_model)])
    assert f"model.model_path '{own_model}' cannot be loaded: its weights are a pickle file that is damaged or" in error
    arguments = ["--model", str(own_model), "--data", val_file, "--output", str(tmp_path / "answers")]
    error_of(capsys, ["evaluate", *arguments])
    error_of(capsys, ["validate", *options, "--data.val_path", val_file, "--ckpt_path", str(own_model)])
    assert not marker.exists()
    torch.load(own_model / "pytorch_model.bin", weights_only=False)
    assert marker.is_dir()
    note_fault(
        "model whose weights hold code",
        provoked="a pickle that runs a command as pytorch_model.bin, for fit, validate and evaluate",
        outcome="refused in one line (exit 2); it is not run",
        tries=3,
    )


def put_code_into(folder, marker):
    """Adds a Python file, and names it wherever transformers looks for code of a model's own."""
    code = f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
    code += "from transformers import Qwen2Config, Qwen2ForCausalLM, PreTrainedTokenizerFast\n"
    code += "class C(Qwen2Config): pass\nclass M(Qwen2ForCausalLM): pass\nclass T(PreTrainedTokenizerFast): pass\n"
    (folder / "own.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    jinja = "{{ cycler.__init__.__globals__.os.makedirs('" + str(marker) + "') }}"
    (folder / "chat_template.jinja").write_text(jinja)
    auto_map = {
        "config.json": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["own.T", "own.T"]},
        "generation_config.json": {"AutoGenerationConfig": "own.C"},
    }
    for name, entries in auto_map.items():
        values = json.loads((folder / name).read_text()) | {"auto_map": entries}
        (folder / name).write_text(json.dumps(values))


def test_code_beside_a_model_is_not_run(
    options, own_model, val_file, tmp_path, marker, capsys, monkeypatch, note_fault
):
    monkeypatch.setattr("builtins.input", lambda *arguments: "y")  # to a question whether the code may run
    put_code_into(own_model, marker)
    small = ["--model.model_path", str(own_model)]
    assert main(["check", *options, *small]) in (0, 1)
    assert main(["fit", *options, *small]) == 0
    arguments = ["--model", str(own_model), "--data", val_file, "--output", str(tmp_path / "answers")]
    assert main(["evaluate", *arguments, "--num_examples", "2", "--max_new_tokens", "2"]) == 0
    written = [json.loads(path.read_text()) for path in (tmp_path / "run" / "final").glob("*config.json")]
    assert not marker.exists()
    assert len(written) == 3
    capsys.readouterr()

    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"model_type": "own", "architectures": ["M"]}))
    for command in (["fit", "--overwrite"], ["check"], ["selftest"]):
        assert "has no usable config" in error_of(capsys, [*command, *options, *small])
    error_of(capsys, ["evaluate", *arguments])
    assert not marker.exists()
    note_fault(
        "model folder that brings code",
        provoked="auto_map in config.json, tokenizer_config.json and generation_config.json, custom_generate, a chat "
        "template that makes a folder; also with a model type that only that code knows, and a user who answers yes to "
        "every question",
        outcome="nobody is asked, the code is not run; a model that needs it is refused in one line (exit 2)",
        tries=7,
    )


KERNELS = ["_attn_implementation", "attn_implementation", "_attn_implementation_internal", "_experts_implementation"]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_a_config_names_is_not_fetched(options, own_model, monkeypatch, name):
    """transformers takes ``owner/repository`` for code on the hub, which it would fetch and run."""

    def fetch(name, *arguments, **options):
        raise AssertionError(f"fetched {name}")

    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", fetch)
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetch)
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {name: "kernels-community/attend"}))
    for init in ("pretrained", "random"):
        changed = ["--model.model_path", str(own_model), "--model.init", init, "--overwrite"]
        assert main(["fit", *options, *changed]) == 0
    assert main(["check", *options, *changed]) in (0, 1)


def test_a_cache_holds_no_pickle(options, tmp_path, monkeypatch, marker):
    """A token cache of somebody else's holds numbers: arrays are mapped, not unpickled."""
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["check", *options]) == 0
    for path in (tmp_path / "cache").glob("*/*"):
        path.write_bytes(pickle.dumps(MakesAFolder(marker)))
    assert main(["fit", *options]) == 0
    assert not marker.exists()


# The report

HOSTILE = "<script>document.title='owned'</script><!--<img src=x onerror=alert(1)>\"'>&lt;</textarea></style>]]>{{7*7}}"


class Tags(HTMLParser):
    """The tags of a page with their attributes, and the contents of scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.inside = set(), set(), [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


def report_of(tmp_path, name, text, model_folder):
    """Trains and evaluates on rows, a model folder and a config that hold a text; returns the run's page."""
    place = tmp_path / name
    place.mkdir()
    model = shutil.copytree(model_folder, place / f"model {text.replace('/', '|')}")
    rows = [{"prompt": f"{text} {row}?", "response": f" {text} </think> <answer> {row} </answer>"} for row in range(12)]
    rows = [row | {"ground_truth": text} for row in rows]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        *("--data.train_path", str(place / "rows.jsonl"), "--data.val_path", str(place / "rows.jsonl")),
        *("--data.columns", json.dumps({"prompt": "prompt", "extra": text}), "--model.model_path", str(model)),
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "3", "--trainer.accumulate_grad_batches", "1"),
        *("--evaluation.generator", "TransformersGenerator", "--evaluation.generator.max_new_tokens", "4"),
        *("--output_dir", str(place / "run")),
    ]
    assert main(["fit", *options]) == 0
    assert main(["report", str(place / "run")]) == 0
    return (place / "run" / "report" / "index.html").read_text(encoding="utf-8")


def test_a_real_report_escapes_data_and_configs(tmp_path, model_folder, note_fault):
    plain = report_of(tmp_path, "plain", "What", model_folder)
    hostile = report_of(tmp_path, "hostile", HOSTILE, model_folder)
    expected, found = Tags(plain), Tags(hostile)
    assert (found.tags, found.attributes, len(found.scripts)) == (
        expected.tags,
        expected.attributes,
        len(expected.scripts),
    )
    assert HOSTILE not in hostile
    assert "<img" not in hostile
    samples = next(script for script in found.scripts if "onerror" in script)
    assert "<" not in samples  # neither a closing tag nor a comment can begin in it
    assert HOSTILE in json.dumps(json.loads(samples), ensure_ascii=False).replace('\\"', '"')
    note_fault(
        "markup and scripts in data, in a model's name or in a config",
        provoked="prompts, responses, ground truths, a model folder and a config value with closing tags of scripts, "
        "comments and handlers of events, in a run with answers and its report",
        outcome="shown as text; the page has no other tags or attributes than usual",
    )


# The network

NO_NETWORK = """
import os, socket

def _is_far(address):
    host = address[0] if isinstance(address, tuple) else ""
    return bool(host) and not (host.startswith("127.") or host in ("::1", "localhost"))

def _guard(function, place):
    def guarded(*arguments, **options):
        address = arguments[place] if place < len(arguments) else options.get("address")
        if _is_far(address if isinstance(address, tuple) else (address,)):
            with open(os.environ["ATTEMPTS"], "a") as file:
                file.write(repr(address) + "\\n")
            raise OSError("no network in this test")
        return function(*arguments, **options)
    return guarded

class GuardedSocket(socket.socket):
    connect = _guard(socket.socket.connect, 1)
    connect_ex = _guard(socket.socket.connect_ex, 1)
    sendto = _guard(lambda self, *arguments: socket.socket.sendto(self, *arguments), 99)

socket.socket = GuardedSocket
socket.getaddrinfo = _guard(socket.getaddrinfo, 0)
socket.gethostbyname = _guard(socket.gethostbyname, 0)
"""


@pytest.fixture
def guarded(tmp_path):
    """Runs the command line in a process whose sockets reach this machine only; reports attempts to reach another."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    attempts = tmp_path / "attempts"
    attempts.touch()

    def run(*args, program=("-m", "sft_lightning"), **environment):
        path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
        home = {"HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": path, "ATTEMPTS": str(attempts)}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        result = subprocess.run(
            [sys.executable, *program, *args],
            cwd=tmp_path,
            env={**kept, **home, **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return result, attempts.read_text().splitlines()

    return run


JOB = [
    "prepare quickstart --output data/quickstart",
    "check --config {configs}/quickstart.yaml",
    "fit --config {configs}/quickstart.yaml --trainer.max_steps 3 --checkpoint.every_n_train_steps 2 "
    "--evaluation.num_examples 8 --data.max_train_examples 96",
    "evaluate --model checkpoints/quickstart/final --data data/quickstart/heldout.jsonl --output evaluation "
    "--num_examples 8 --max_new_tokens 4 --greedy",
    "report checkpoints/quickstart",
]


@pytest.mark.slow
@pytest.mark.parametrize("offline", ["", "1"])
def test_a_whole_job_reaches_no_other_machine(guarded, note_fault, offline):
    environment = {"HF_HUB_OFFLINE": offline} if offline else {}
    for command in JOB:
        result, attempts = guarded(*command.format(configs=CONFIGS).split(), **environment)
        assert result.returncode == 0, (command, result.stderr[-2000:])
        assert attempts == [], command
    note_fault(
        "no network",
        provoked="prepare, check, fit, evaluate and report in processes whose sockets fail, with HF_HUB_OFFLINE=1 and "
        "without it",
        outcome="all succeed; none tries to reach another machine",
        tries=2,
    )


@pytest.mark.slow
def test_the_guard_detects_connections(guarded):
    for code in (
        "import urllib.request; urllib.request.urlopen('http://example.invalid')",
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)",
        "from huggingface_hub import model_info; model_info('someone/nothing')",
    ):
        result, attempts = guarded(code, program=("-c",))
        assert result.returncode == 1
        assert len(attempts) > 0


@pytest.mark.slow
def test_a_hub_name_without_the_hub_is_one_line(guarded, train_file, note_fault):
    for args, environment in (
        (["fit", "--data.train_path", train_file, "--model.model_path", "someone/nothing"], {"HF_HUB_OFFLINE": "1"}),
        (["evaluate", "--model", "someone/nothing", "--data", train_file, "--output", "e"], {"HF_HUB_OFFLINE": "1"}),
        (["check", "--data.train_path", train_file, "--model.model_path", "someone/nothing"], {}),
    ):
        result, _ = guarded(*args, **environment)
        lines = [line for line in result.stderr.splitlines() if "error:" in line]
        assert result.returncode == 2
        assert len(lines) == 1
        assert lines[0].startswith("sft-lightning: error: ")
        assert "someone/nothing" in lines[0]
        assert "Traceback" not in result.stderr
    note_fault(
        "hub name without a network or under HF_HUB_OFFLINE",
        provoked="model.model_path and --model someone/nothing",
        outcome="one line that names it (exit 2)",
        tries=3,
    )
