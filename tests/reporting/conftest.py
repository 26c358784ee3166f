"""Define a headless browser and run folders to report on."""

import base64
import csv
import json
import os
import shutil
import subprocess
import time

import pytest

from sft_lightning.checkpointing import folder as checkpoint_folder
from sft_lightning.evaluation.result import EvaluationResult
from sft_lightning.evaluation.statistics import wilson_interval


class Browser:
    """One page of a headless Chromium, driven over the two pipes of its debugging protocol.

    Attributes:
        requests: Addresses that the page asked for since it was opened.
        complaints: Errors, warnings and exceptions of its console, violations of its content security policy too.
    """

    def __init__(self, program, profile):
        commands, self._to_browser = os.pipe()
        self._from_browser, replies = os.pipe()
        # The protocol's own numbers are 3 and 4.
        shell = f"exec {program} --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars "
        shell += f"--remote-debugging-pipe --user-data-dir={profile} about:blank 3<&{commands} 4>&{replies}"
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", shell], pass_fds=(commands, replies), **quiet)
        os.close(commands)
        os.close(replies)
        self._number, self._session, self._unread = 0, None, b""
        self.requests, self.complaints = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        while (reply := self._next_message()).get("id") != self._number:
            self._note(reply)
        assert "error" not in reply, (method, reply["error"])
        return reply["result"]

    def _next_message(self):
        while b"\0" not in self._unread:
            chunk = os.read(self._from_browser, 1 << 20)
            assert chunk, "the browser is gone"
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        details = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(details["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(details["exceptionDetails"])
            case "Runtime.consoleAPICalled":
                self.complaints.append([argument.get("value") for argument in details["args"]])
            case "Log.entryAdded":
                self.complaints.append(details["entry"]["text"])

    def open(self, path, width=1400, dark=False):
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url="about:blank")
        self.requests, self.complaints = [], []
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, condition, seconds=20):
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"!!({condition})"):
            assert time.monotonic() < deadline, f"still not: {condition}"
            time.sleep(0.05)

    def click(self, selector):
        """Clicks into the middle of an element with the mouse."""
        place = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key):
        code = {"Tab": 9, "Enter": 13, "ArrowDown": 40}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, path):
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")["data"]
        path.write_bytes(base64.b64decode(image))

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._to_browser)
        os.close(self._from_browser)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    program = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium in PATH: pages are not looked at")
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def make_sample(index, right, *, sample=0, response=None, truth="7", **fields):
    answer = "7" if right else "8"
    row = {
        "index": index,
        "sample": sample,
        "prompt": f"Question {index}? Assistant: <think>",
        "response": f" so </think> <answer> {answer} </answer>" if response is None else response,
        "ground_truth": truth,
        "format_correct": True,
        "strict_format_correct": True,
        "answer_correct": right,
        "answer": answer,
        "failure": None if right else "wrong",
        "timed_out": False,
        "stop_reason": "stop_string",
        "num_tokens": 10 + index % 5,
        "mean_entropy": 0.5,
    }
    return {**row, **fields}


@pytest.fixture(scope="session")
def samples_of():
    """Makes samples of ``num_prompts`` prompts, the first ``num_right`` of them right; keywords override fields."""

    def make(num_prompts, num_right, **fields):
        return [make_sample(index, index < num_right, **fields) for index in range(num_prompts)]

    return make


@pytest.fixture(scope="session")
def write_run():
    """Writes a run folder as ``fit`` does: step -> samples, and the lines of metrics.csv."""

    def write(folder, evaluations, metrics=(), config="seed_everything: 42\nmodel: {model_path: tiny}\n"):
        folder.mkdir(parents=True, exist_ok=True)
        if config is not None:
            (folder / "config.yaml").write_text(config)
        if metrics:
            (folder / "metrics.csv").write_text("\n".join(metrics) + "\n")
        for step, samples in evaluations.items():
            EvaluationResult(samples, step).write(folder / "evaluation" / f"step-{step}")
        return folder

    return write


def sample(index, answer_correct, prompt="2+2?"):
    return {
        "index": index,
        "sample": 0,
        "prompt": f"{index}: {prompt}",
        "ground_truth": "4",
        "format_correct": True,
        "answer_correct": answer_correct,
    }


def add_evaluation(run, step, answers, *, num_format_correct=None, prompt="2+2?"):
    """Writes an evaluation with an outcome for each prompt."""
    folder = run / "evaluation" / f"step-{step}"
    folder.mkdir(parents=True)
    num_format_correct = len(answers) if num_format_correct is None else num_format_correct
    counts = {"format_accuracy": num_format_correct, "answer_accuracy": sum(answers)}
    metrics = {
        "num_examples": len(answers),
        **{name: count / len(answers) for name, count in counts.items()},
        "intervals": {name: wilson_interval(count, len(answers)) for name, count in counts.items()},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = [json.dumps(sample(index, bool(right), prompt)) + "\n" for index, right in enumerate(answers)]
    (folder / "predictions.jsonl").write_text("".join(lines))


def finish(run, num_steps, val_losses=()):
    """Writes the final model's folder, and metrics.csv with a validation loss at each of these steps."""
    checkpoint_folder.publish(run / "final", lambda folder: None, {"step": num_steps})
    with (run / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", "val/loss"])
        writer.writeheader()
        for step, loss in val_losses:
            writer.writerow({"step": step, "val/loss": loss})
            writer.writerow({"step": step + 1, "train/loss": 9.0})


@pytest.fixture
def sweep(tmp_path):
    """10 prompts: 0 right before training, 4 after 100 examples (3 after the first step), all after 400."""
    small, large = tmp_path / "size-100", tmp_path / "size-full"
    add_evaluation(small, 0, [0] * 10, num_format_correct=2)
    add_evaluation(small, 1, [1] * 3 + [0] * 7)
    add_evaluation(small, 12, [1] * 4 + [0] * 6, num_format_correct=8)
    finish(small, 12, [(1, 3.5), (12, 2.25)])
    add_evaluation(large, 0, [0] * 10, num_format_correct=2)
    add_evaluation(large, 50, [1] * 10)
    finish(large, 50)
    return tmp_path
