"""Test faults of the token cache: racing or killed processes, altered files, a full disk."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time

import pytest

from sft_lightning.data.settings import DataSettings
from sft_lightning.data.token_store import load_or_build_tokens
from sft_lightning.errors import UserError

FORK = multiprocessing.get_context("fork")  # transformers is imported already


@pytest.fixture
def num_rows():
    return 200


@pytest.fixture
def data(tmp_path, num_rows):
    path = tmp_path / "data.jsonl"
    rows = [
        {"prompt": f"question {row} " * 20, "response": f" answer {row}", "weight": row / 7} for row in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def load(data, tokenizer, tmp_path):
    def read():
        return load_or_build_tokens(DataSettings(data, max_length=512, cache_dir=tmp_path / "cache"), tokenizer)

    return read


def content(store):
    rows = []
    for example in store:
        (sequence,) = example.sequences
        rows.append((sequence.tokens.tobytes(), sequence.label_spans, example.source))
    return rows


def run(function, *arguments):
    """Starts a process and returns it."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    return process


def report(load, barrier, results):
    barrier.wait(timeout=60)
    results.put(hash(tuple(content(load()))))


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [3000])
def test_processes_that_race_end_with_one_whole_store(load, tmp_path, note_fault):
    expected = hash(tuple(content(load())))  # equal in the children: they are forked
    (key,) = (tmp_path / "cache").iterdir()
    num_tries = 5
    for _ in range(num_tries):
        for name in ("tokens.bin", "rows.bin", "spans.bin", "meta.json"):
            (key / name).unlink()
        barrier, results = FORK.Barrier(2), FORK.Queue()
        processes = [run(report, load, barrier, results) for _ in range(2)]
        assert [results.get(timeout=60) for _ in processes] == [expected] * 2
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 0
        assert list((tmp_path / "cache").iterdir()) == [key]
    note_fault(
        "two runs make one token cache at a time",
        provoked="two processes begin at once, on a folder that is also damaged",
        outcome="both train on the same tokens; one store stays",
        tries=num_tries,
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [3000])
def test_a_killed_process_leaves_no_half_written_cache(load, tmp_path, note_fault):
    start = time.monotonic()
    expected = content(load())
    seconds = time.monotonic() - start
    (key,) = (tmp_path / "cache").iterdir()
    rng, killed = random.Random(0), 0
    num_tries = 10
    for _ in range(num_tries):
        (key / "meta.json").unlink()
        process = run(load)
        time.sleep(rng.uniform(0, seconds))
        killed += process.is_alive()
        process.kill()
        process.join()
        assert content(load()) == expected
        # Killed between the making of its folder and the lock in it, a process leaves an empty folder.
        left = [path for path in (tmp_path / "cache").iterdir() if path != key]
        assert [path for path in left if any(path.iterdir())] == []
    assert killed > num_tries / 2
    note_fault(
        "killed while the token cache is made",
        provoked="SIGKILL at random moments",
        outcome="the next run makes it again and removes the remains",
        tries=num_tries,
    )


def test_a_store_in_which_any_byte_changed_is_made_again(load, tmp_path, note_fault):
    expected = content(load())
    weights = load().weights.tolist()
    (key,) = (tmp_path / "cache").iterdir()
    rng = random.Random(1)
    num_tries = 40
    for number in range(num_tries):
        path = key / ("tokens.bin", "rows.bin", "spans.bin", "meta.json")[number % 4]
        altered = bytearray(path.read_bytes())
        place = rng.randrange(len(altered))
        if number % 5 == 3:
            del altered[place:]
        else:
            altered[place] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        store = load()
        assert content(store) == expected, (path, place)
        assert store.weights.tolist() == weights
    note_fault(
        "token cache altered or cut short",
        provoked="a bit of tokens.bin, rows.bin, spans.bin or meta.json flipped, or the file cut, at random places",
        outcome="made again",
        tries=num_tries,
    )


def fail_with_little_room(load, results, limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        load()
        results.put("no error")
    except UserError as error:
        results.put(str(error))


@pytest.mark.parametrize("limit", [0, 4096, 40_000])
def test_a_full_disk_leaves_no_half_written_store(load, tmp_path, note_fault, limit):
    results = FORK.Queue()
    process = run(fail_with_little_room, load, results, limit)
    said = results.get(timeout=60)
    process.join()
    assert said.startswith(f"cannot write the token cache in data.cache_dir '{tmp_path}/cache': ")
    assert "File too large" in said
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(load()) == 200
    note_fault(
        "disk full while the token cache is written",
        provoked="RLIMIT_FSIZE of 0, 4 kB and 40 kB",
        outcome="one line that names data.cache_dir, exit 2; nothing of it stays",
        tries=3,
    )


def load_as_nobody(load, results):
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    try:
        results.put(len(load()))
    except UserError as error:
        results.put(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody who may not write")
def test_a_read_only_cache_is_read_but_a_miss_fails(load, tmp_path, note_fault):
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    results = FORK.Queue()

    def said():
        process = run(load_as_nobody, load, results)
        answer = results.get(timeout=60)
        process.join()
        return answer

    assert said() == f"cannot write the token cache in data.cache_dir '{tmp_path}/cache': " + (
        f"[Errno 13] Permission denied: '{tmp_path}/cache'"
    )
    load()
    assert said() == 200
    note_fault(
        "data.cache_dir is read-only",
        provoked="the run has no right to write there",
        outcome="an existing store is used; else one line that names data.cache_dir, exit 2",
    )
