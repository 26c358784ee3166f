import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sft_lightning.data.tokenization import load_tokenizer
from sft_lightning.errors import UserError
from sft_lightning.generation import server_client
from sft_lightning.generation.base import Generation
from sft_lightning.generation.openai_server import OpenAIServerGenerator
from sft_lightning.generation.transformers_generator import TransformersGenerator


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(server_client, "FIRST_PAUSE_SECONDS", 0.01)


def generator_of(server, **settings):
    return OpenAIServerGenerator(server.url, **{"model": "tiny", "max_new_tokens": 40, **settings})


def generate(generator, prompts, **options):
    return generator.generate(None, None, prompts, **options)


def completion(text, finish_reason="stop", num_tokens=3, **choice):
    choice = {"index": 0, "text": text, "finish_reason": finish_reason, **choice}
    return {"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": num_tokens}}


def is_probe(body):
    return body is not None and body["max_tokens"] == 4


class Served:
    """A model that answers each prompt with a written text and EOS, a letter a token, as servers of four kinds do."""

    def __init__(self, texts, kind):
        self.texts, self.kind = texts, kind

    def __call__(self, path, body):
        assert path == "/completions"
        text = self.texts[body["prompt"]]
        finish_reason, num_tokens, stop = "stop", len(text) + 1, None
        ends = [(text.index(stop) + len(stop), stop) for stop in body.get("stop", []) if stop in text]
        if ends and self.kind != "ignores stop":
            num_tokens, stop = min(ends)
        if num_tokens > body["max_tokens"]:
            finish_reason, num_tokens, stop = "length", body["max_tokens"], None
        text = text[:num_tokens]
        names = {"vLLM": {"stop_reason": stop}, "SGLang": {"matched_stop": stop or 7}}
        if stop and self.kind != "transformers":
            text = text.removesuffix(stop)
        return 200, {}, completion(text, finish_reason, num_tokens, **names.get(self.kind, {}))


KINDS = ["vLLM", "SGLang", "transformers", "ignores stop", "OpenAI"]
# prompt -> full text of the model, answer in it, tokens of the answer, reason of its end
ENDINGS = {
    "stop": ("4 </answer> and so on", "4 </answer>", 11, "stop_string"),
    "eos": ("I do not know", "I do not know", 14, "eos"),
    "length": ("!" * 50, "!" * 40, 40, "length"),
    "other": ("a\u00e9<end></answer>", "a\u00e9<end>", 7, "stop_string"),
    "nothing": ("", "", 1, "eos"),
    "late": ("!" * 34 + "</answer>", "!" * 34 + "</answ", 40, "length"),
    "last": ("!" * 31 + "</answer>", "!" * 31 + "</answer>", 40, "stop_string"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_end_equally_on_every_kind_of_server(server, kind):
    server.answer = Served({prompt: row[0] for prompt, row in ENDINGS.items()}, kind)
    found = generate(generator_of(server, stop_strings=["</answer>", "<end>"]), list(ENDINGS))
    assert [(g.text, g.stop_reason) for g in found] == [(row[1], row[3]) for row in ENDINGS.values()]
    if kind in ("vLLM", "SGLang", "transformers"):  # the others continue after the stop string
        assert [g.num_tokens for g in found] == [row[2] for row in ENDINGS.values()]
    sent = [body.get("stop") for _, _, body, _ in server.requests if not is_probe(body)]
    assert sent == [None if kind == "OpenAI" else ["</answer>", "<end>"]] * len(ENDINGS)


def test_stop_strings_are_not_sent_if_no_probe_has_text(server):
    server.answer = Served({"nothing": "", "half a letter": "\ufffd?"}, "vLLM")
    generate(generator_of(server), ["nothing", "half a letter"])
    assert [body.get("stop") for _, _, body, _ in server.requests] == [None] * 4  # two of them probes


def test_without_stop_strings_nothing_is_probed(server):
    server.answer = Served({"stop": "4 </answer>."}, "vLLM")
    assert generate(generator_of(server, stop_strings=()), ["stop"]) == [Generation("4 </answer>.", 13, "eos")]
    assert len(server.requests) == 1


def test_a_stop_string_of_the_server_ends_like_eos(server):
    server.answer = lambda path, body: (200, {}, completion("hi", stop_reason=(body.get("stop") or ["<|im_end|>"])[0]))
    generation = OpenAIServerGenerator(server.url, "tiny", stop_strings=()).generate(None, None, ["x"])
    assert generation == [Generation("hi", 3, "eos")]


def test_request_holds_the_settings(server):
    server.answer = Served({"Why?": "4</answer>"}, "vLLM")
    settings = {"temperature": 0.7, "top_p": 0.9, "seed": 7, "extra_fields": {"top_k": -1}}
    generate(generator_of(server, **settings), ["Why?"], numbers=[3])
    path, _, body, _ = server.requests[-1]
    assert path == "/completions"
    assert body == {
        "model": "tiny",
        "prompt": "Why?",
        "max_tokens": 40,
        "temperature": 0.7,
        "top_p": 0.9,
        "stop": ["</answer>"],
        "seed": 0x9CA29A28 >> 1,  # the first four bytes of `printf '7,3' | sha256sum`
        "top_k": -1,
    }


def test_greedy_has_no_temperature_and_no_seed(server):
    server.answer = Served({"Why?": "4</answer>"}, "vLLM")
    generate(generator_of(server, greedy=True, temperature=0.7, top_p=0.9), ["Why?"])
    body = server.requests[-1][2]
    assert (body["temperature"], body["top_p"], "seed" in body) == (0.0, 1.0, False)


def test_seed_follows_from_seed_and_number_alone(server):
    server.answer = lambda path, body: (200, {}, completion(f"{body['prompt']} {body.get('seed')}"))
    plain = {"stop_strings": ()}
    first = generate(generator_of(server, **plain), ["a", "b", "c"])
    shuffled = generate(generator_of(server, num_concurrent=1, **plain), ["c", "a"], numbers=[2, 0])
    assert [shuffled[1], shuffled[0]] == [first[0], first[2]]
    seeds = [int(generation.text.split()[1]) for generation in first]
    assert seeds[0] == 0x73348214 >> 1
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert generate(generator_of(server, seed=1, **plain), ["a"]) != first[:1]


def test_order_of_the_answers_is_that_of_the_prompts(server):
    def answer(path, body):
        time.sleep(random.Random(body["prompt"]).random() / 20)
        return 200, {}, completion(f"answer to {body['prompt']}")

    server.answer = answer
    prompts = [f"{index}" for index in range(60)]
    found = generate(generator_of(server, num_concurrent=12, stop_strings=()), prompts)
    assert [generation.text for generation in found] == [f"answer to {prompt}" for prompt in prompts]
    arrived = [body["prompt"] for _, _, body, _ in server.requests]
    assert sorted(arrived, key=int) == prompts


def test_requests_in_flight_are_limited(server):
    lock, counts = threading.Lock(), []
    now = 0

    def answer(path, body):
        nonlocal now
        with lock:
            now += 1
            counts.append(now)
        time.sleep(0.1)
        with lock:
            now -= 1
        return 200, {}, completion("x")

    server.answer = answer
    generate(generator_of(server, num_concurrent=5, stop_strings=()), ["p"] * 23)
    assert len(counts) == 23
    assert max(counts) == 5


def test_progress_is_logged(server, caplog):
    caplog.set_level("INFO", "sft_lightning.generation.openai_server")
    server.answer = lambda path, body: (200, {}, completion("x"))
    generate(generator_of(server, num_concurrent=2, stop_strings=()), ["p"] * 5)
    assert [record.message for record in caplog.records] == [
        "generated 2 of 5 answers",
        "generated 4 of 5 answers",
        "generated 5 of 5 answers",
    ]


def test_no_prompts_need_no_server():
    assert generate(OpenAIServerGenerator("http://127.0.0.1:9/v1"), []) == []


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({}, "no completion: KeyError 'choices'"),
        ([], "no completion: TypeError"),
        ({"choices": []}, "no completion: IndexError"),
        ({"choices": ["x"], "usage": {}}, "no completion: TypeError"),
        ({**completion("x"), "usage": None}, "no completion: TypeError"),
        ({**completion("x"), "usage": {}}, "no completion: KeyError 'completion_tokens'"),
        (completion("x", num_tokens=True), "no completion: usage.completion_tokens is not a count"),
        (completion("x", num_tokens=-1), "no completion: usage.completion_tokens is not a count"),
        (completion("x", num_tokens=10**400), "no completion: usage.completion_tokens is not a count"),
        (completion("x", num_tokens=None), "no completion: usage.completion_tokens is not a count"),
        (completion(None), "no completion: its text is NoneType"),
        (completion("x", finish_reason=None), "no completion: its finish_reason is 'None'"),
        (completion("x", finish_reason="abort"), "no completion: its finish_reason is 'abort'"),
        (completion("x", finish_reason=["stop"]), "no completion: its finish_reason is"),
    ],
)
def test_a_malformed_answer_is_requested_again_then_reported(server, broken, problem):
    answers = iter([broken, completion("fine"), broken, broken])
    server.answer = lambda path, body: (200, {}, next(answers))
    generator = generator_of(server, stop_strings=(), num_retries=1)
    assert generate(generator, ["x"]) == [Generation("fine", 3, "eos")]
    with pytest.raises(UserError) as caught:
        generate(generator, ["x"])
    assert f"prompt 0: {server.url}/completions: {problem}" in str(caught.value)


def test_half_a_surrogate_pair_becomes_a_replacement_character(server):
    content = json.dumps(completion("a? b?")).replace("a?", "a\\ud83d").replace("b?", "\\ud83d\\ude00")
    server.answer = lambda path, body: (200, {}, content.encode())
    assert generate(generator_of(server, stop_strings=()), ["x"])[0].text == "a\ufffd \U0001f600"


def test_refused_prompt_is_named_and_ends_everything(server):
    def answer(path, body):
        if body["prompt"] == "7":
            return 400, {}, {"error": {"message": "longer than 512 tokens"}}
        time.sleep(0.02)
        return 200, {}, completion("x")

    server.answer = answer
    with pytest.raises(UserError, match=r"^prompt 7: http.*/completions: HTTP 400: longer than 512 tokens$"):
        generate(generator_of(server, stop_strings=(), num_concurrent=2), [f"{index}" for index in range(200)])
    assert len(server.requests) < 100
    assert no_thread_is_left()


def no_thread_is_left():
    return not any(thread.name.startswith("server-request") for thread in threading.enumerate())


@pytest.mark.usefixtures("interrupts")
def test_interrupt_ends_at_once_and_cuts_the_requests(server, caplog):
    server.answer = lambda path, body: (server.closing.wait(60), (200, {}, completion("x")))[1]
    started = []

    def interrupt():
        while len(server.requests) < 8:
            time.sleep(0.01)
        started.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        generate(generator_of(server, stop_strings=(), num_concurrent=8), ["p"] * 100)
    assert time.monotonic() - started[0] < 3
    assert len(server.requests) == 8
    assert no_thread_is_left()
    assert not caplog.records  # an answer that we cut is not a fault of the server


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        ([], r"lists 0 models \(none\); choose one with model"),
        ([{"id": "a"}, {"id": "b"}], r"lists 2 models \(a, b\); choose one with model"),
        ([{"name": "a"}], "^model is not given, and http.*/models: no list of models: KeyError 'id'"),
        (None, "/models: no list of models: TypeError"),
    ],
)
def test_which_model_must_be_clear(server, models, problem):
    server.answer = lambda path, body: (200, {}, {"object": "list", "data": models})
    with pytest.raises(UserError, match=problem):
        generate(generator_of(server, model=None, num_retries=0), ["x"])


def test_the_only_model_is_taken(server):
    def answer(path, body):
        return 200, {}, {"data": [{"id": "checkpoints/final"}]} if path == "/models" else completion(body["model"])

    server.answer = answer
    assert generate(generator_of(server, model=None, stop_strings=()), ["x"])[0].text == "checkpoints/final"


def test_the_key_comes_from_the_environment_only(server, monkeypatch):
    monkeypatch.setenv("TEST_SERVER_KEY", " s3cret\n")
    server.answer = lambda path, body: (200, {}, completion("x"))
    generator = generator_of(server, stop_strings=(), api_key_variable="TEST_SERVER_KEY")
    generate(generator, ["x"])
    assert server.requests[-1][1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(vars(generator))


@pytest.mark.parametrize(
    ("key", "problem"), [(None, "is not set"), ("", "is not set"), ("a\nb", "characters"), ("\u00e9", "characters")]
)
def test_a_missing_or_broken_key_fails_before_requests(monkeypatch, key, problem):
    monkeypatch.delenv("TEST_SERVER_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("TEST_SERVER_KEY", key)
    with pytest.raises(UserError, match=f"api_key_variable: .*TEST_SERVER_KEY.*{problem}"):
        OpenAIServerGenerator("http://127.0.0.1:9/v1", api_key_variable="TEST_SERVER_KEY")


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0},
        {"num_concurrent": 0},
        {"num_retries": -1},
        {"timeout_seconds": 0.0},
        {"timeout_seconds": float("inf")},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"stop_strings": "</answer>"},
        {"stop_strings": ("a", "")},
        {"extra_fields": {"stop": "x"}},
        {"extra_fields": {"top_k": 1, "n": 2}},
        {"base_url": "localhost:8000"},
    ],
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        OpenAIServerGenerator(**{"base_url": "http://127.0.0.1:9/v1", **setting})


QUESTIONS = [f"User: What is {a}+{b}? Assistant: <think>" for a, b in ((2, 2), (7, 8), (1, 9), (5, 0), (3, 6), (4, 4))]
SAMPLING = {"generation_config": json.dumps({"do_sample": True, "top_k": 0})}


@pytest.fixture(scope="module")
def served_folder(tmp_path_factory, tokenizer):
    """A small random model with varied greedy answers; the third question's ends with EOS after nine tokens."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("served-model")
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokens = torch.tensor([load_tokenizer(str(folder))(QUESTIONS[2])["input_ids"]])
    ninth = int(model.generate(tokens, max_new_tokens=9, do_sample=False)[0, -1])
    with torch.no_grad():  # swaps EOS and that token
        model.lm_head.weight[[0, ninth]] = model.lm_head.weight[[ninth, 0]]
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def transformers_serve(served_folder, tmp_path_factory):
    """The address of a real `transformers serve` that holds the folder's model."""
    missing = [name for name in ("fastapi", "uvicorn", "openai", "pydantic") if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", served_folder]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(log.parent), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        wait_until_healthy(process, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_healthy(process, port, log):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"the server did not come up:\n{log.read_text()}")


def test_transformers_serve_answers_as_the_model_does_here(transformers_serve, served_folder):
    tokenizer = load_tokenizer(served_folder)
    model = AutoModelForCausalLM.from_pretrained(served_folder, dtype=torch.float32)
    settings = {"greedy": True, "max_new_tokens": 24}
    # Stop strings that begin or end inside of a token as it happens, and leave the third answer its EOS.
    texts = [g.text for g in TransformersGenerator(stop_strings=(), **settings).generate(model, tokenizer, QUESTIONS)]
    pairs = [re.findall("(?=([!-~]{2}))", text) for text in texts]
    stops = [next(pair for pair in pairs[index][1:] if pair not in texts[2]) for index in (0, 1)]
    here = TransformersGenerator(stop_strings=stops, **settings).generate(model, tokenizer, QUESTIONS)
    there = OpenAIServerGenerator(transformers_serve, served_folder, stop_strings=stops, **settings)
    assert there.generate(None, None, QUESTIONS) == here
    assert {generation.stop_reason for generation in here} == {"stop_string", "eos", "length"}


def test_transformers_serve_samples_by_seed(transformers_serve, served_folder):
    def sample(seed):
        # One request at a time: this server has one random state for all of them.
        settings = {"max_new_tokens": 12, "num_concurrent": 1, "extra_fields": SAMPLING, "seed": seed}
        return OpenAIServerGenerator(transformers_serve, served_folder, **settings).generate(None, None, QUESTIONS[:3])

    assert sample(1) == sample(1) != sample(2)


def test_transformers_serve_explains_refusals(transformers_serve, served_folder):
    with pytest.raises(UserError, match=r"/completions: HTTP 422: Unexpected fields in the request: \{'top_k'\}$"):
        OpenAIServerGenerator(transformers_serve, served_folder, extra_fields={"top_k": 5}).generate(None, None, ["x"])
    with pytest.raises(UserError, match=r"HTTP 400: Server is pinned to .*; requested 'other'"):
        OpenAIServerGenerator(transformers_serve, "other").generate(None, None, ["x"])
