import contextlib
import itertools
import random
import socket
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from sft_lightning.errors import UserError
from sft_lightning.generation import server_client
from sft_lightning.generation.server_client import ServerClient, TemporaryError


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(server_client, "FIRST_PAUSE_SECONDS", 0.01)


def client_of(server, **options):
    settings = {"api_key": None, "num_retries": 3, "timeout_seconds": 20.0, **options}
    return ServerClient(server if isinstance(server, str) else server.url, **settings)


def same(data):
    return data


def in_turn(*answers):
    """Returns an ``answer`` that gives these one after the other, and the last one again and again."""
    order = itertools.chain(answers, itertools.repeat(answers[-1]))
    return lambda path, body: next(order)


OK = (200, {}, {"fine": 1})


def test_posts_json_and_gets_without_a_body(server):
    server.answer = in_turn(OK)
    assert client_of(server).ask("/completions", {"prompt": "\u00e9\u2028"}, same) == {"fine": 1}
    assert client_of(server).ask("/models", None, same) == {"fine": 1}
    assert [(path, body) for path, _, body, _ in server.requests] == [
        ("/completions", {"prompt": "\u00e9\u2028"}),
        ("/models", None),
    ]


def test_key_is_a_bearer_token_and_none_sends_none(server):
    server.answer = in_turn(OK)
    client_of(server, api_key="s3cret").ask("/models", None, same)
    client_of(server).ask("/models", None, same)
    assert [headers.get("Authorization") for _, headers, _, _ in server.requests] == ["Bearer s3cret", None]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_failing_twice_and_then_not_is_an_answer(server, status):
    server.answer = in_turn((status, {}, {"error": "busy"}), (status, {}, b""), OK)
    assert client_of(server).ask("/completions", {}, same) == {"fine": 1}
    assert len(server.requests) == 3


def test_pauses_double(server, monkeypatch):
    monkeypatch.setattr(server_client, "FIRST_PAUSE_SECONDS", 0.1)
    server.answer = in_turn((500, {}, {}), (500, {}, {}), (500, {}, {}), OK)
    client_of(server).ask("/completions", {}, same)
    times = [seconds for *_, seconds in server.requests]
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert len(pauses) == 3
    for pause, least in zip(pauses, (0.05, 0.1, 0.2), strict=True):
        assert least <= pause < 2 * least + 1.0  # a busy machine may take its time


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_waited_for(server, as_date):
    wait = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "1"
    server.answer = in_turn((429, {"Retry-After": wait}, {"error": "slow down"}), OK)
    client_of(server).ask("/completions", {}, same)
    (*_, first), (*_, second) = server.requests
    assert 0.9 < second - first < 4.0


@pytest.mark.parametrize("wait", ["soon", "-5", "", "Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2099 07:28:00"])
def test_an_invalid_retry_after_does_not_wait(server, wait):
    server.answer = in_turn((503, {"Retry-After": wait}, {}), OK)
    started = time.monotonic()
    assert client_of(server).ask("/completions", {}, same) == {"fine": 1}
    assert time.monotonic() - started < 5


def test_retry_after_is_limited_to_the_time_out(server):
    server.answer = in_turn((429, {"Retry-After": "86400"}, {}), OK)
    assert client_of(server, timeout_seconds=0.2).ask("/completions", {}, same) == {"fine": 1}


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (400, {"error": {"message": "max context length is 512", "code": 400}}, "HTTP 400: max context length is 512"),
        (401, {"error": "Unauthorized"}, "HTTP 401: Unauthorized"),
        (422, {"detail": "Unexpected fields"}, "HTTP 422: Unexpected fields"),
        (400, {"object": "error", "message": "Prompt cannot be empty"}, "HTTP 400: Prompt cannot be empty"),
        (400, {"detail": [{"loc": ["body"]}]}, 'HTTP 400: [{"loc": ["body"]}]'),
        (404, b"<h1>\x1b[31mNot\r\n found</h1>", "HTTP 404: <h1> [31mNot found</h1>; base_url usually ends in /v1"),
        (413, b"x" * 5000, "HTTP 413: " + "x" * 300 + "..."),
        (418, b"\xff", "HTTP 418: \ufffd"),
    ],
)
def test_a_refusal_shows_the_message_of_the_server(server, status, content, message):
    server.answer = in_turn((status, {}, content))
    with pytest.raises(UserError) as caught:
        client_of(server).ask("/completions", {}, same)
    assert str(caught.value) == f"{server.url}/completions: {message}"
    assert len(server.requests) == 1


def test_redirects_are_not_followed(server):
    server.answer = in_turn((307, {"Location": "/v1/elsewhere"}, b"moved"))
    with pytest.raises(UserError, match="HTTP 307: moved"):
        client_of(server, api_key="s3cret").ask("/completions", {}, same)
    assert [path for path, *_ in server.requests] == ["/completions"]


@pytest.mark.parametrize(
    "broken",
    [
        (200, {}, b"<html>"),
        (200, {}, b'{"cut": '),
        (200, {}, b"\xff\xfe\xff"),
        (200, {}, b"[" * 100_000),
        (200, {"Content-Length": "999"}, b'{"fine": 1}'),  # the connection ends too early
    ],
)
def test_broken_answer_is_asked_for_again(server, broken):
    server.answer = in_turn(broken, OK)
    assert client_of(server).ask("/completions", {}, same) == {"fine": 1}
    assert len(server.requests) == 2


def test_reader_may_want_another_answer(server):
    def read(data):
        if data != {"fine": 1}:
            raise TemporaryError("not what I want")
        return "read"

    server.answer = in_turn((200, {}, {"fine": 0}), OK)
    assert client_of(server).ask("/completions", {}, read) == "read"


def test_the_last_error_names_address_problem_and_fix(server):
    server.answer = in_turn((503, {}, {"error": "loading"}))
    with pytest.raises(UserError) as caught:
        client_of(server, num_retries=2).ask("/completions", {}, same)
    assert str(caught.value) == (
        f"{server.url}/completions: HTTP 503: loading (asked 3 times); is a server up there? "
        "'vllm serve MODEL --port 8000' starts one at http://127.0.0.1:8000/v1"
    )
    assert len(server.requests) == 3


def test_a_server_that_does_not_listen_is_reported(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"/v1/models: Connection refused \(asked once\)"):
        client_of(url, num_retries=0).ask("/models", None, same)


def test_a_server_that_comes_up_late_is_found(server, monkeypatch):
    monkeypatch.setattr(server_client, "FIRST_PAUSE_SECONDS", 0.4)
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{late.getsockname()[1]}/v1"
        threading.Timer(0.1, late.listen).start()
        answering = threading.Thread(target=answer_one, args=(late,), daemon=True)
        answering.start()
        assert client_of(url, num_retries=5).ask("/models", None, same) == {"late": 1}
        answering.join(5)


def answer_one(listener):
    while True:
        try:
            connection, _ = listener.accept()
            break
        except OSError:  # not listening yet
            time.sleep(0.01)
    with connection:
        connection.recv(65536)
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"late": 1}')


def test_time_out_is_tried_again(server):
    def answer(path, body):
        if len(server.requests) == 1:
            server.closing.wait(10)
        return OK

    server.answer = answer
    assert client_of(server, timeout_seconds=0.3).ask("/completions", {}, same) == {"fine": 1}
    assert len(server.requests) == 2


def test_a_time_out_is_reported(server):
    server.answer = lambda path, body: (server.closing.wait(10), OK)[1]
    with pytest.raises(UserError, match=r"no answer within 0.2 seconds \(asked 2 times\)"):
        client_of(server, timeout_seconds=0.2, num_retries=1).ask("/completions", {}, same)


def raw_server(send):
    """Starts a server that reads a request and calls ``send(connection)``; returns its address and its socket."""

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            send(connection)

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1", listener


def without_end(beginning, part, pause_seconds=0.0):
    def send(connection):
        connection.sendall(beginning)
        while True:
            connection.sendall(part)
            time.sleep(pause_seconds)

    return send


HEAD = b"HTTP/1.1 200 OK\r\n"
WITHOUT_END = {
    "a body in drops": without_end(HEAD + b"Content-Length: 1000000\r\n\r\n", b" ", 0.02),
    "a body in drops, of a connection that closes": without_end(HEAD + b"Connection: close\r\n\r\n", b" ", 0.02),
    "headers in drops": without_end(HEAD, b"x", 0.02),
    "continue again and again": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunks in drops": without_end(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.02),
}


@pytest.mark.parametrize("kind", WITHOUT_END)
def test_an_answer_without_end_has_a_deadline(kind, note_fault):
    url, listener = raw_server(WITHOUT_END[kind])
    started = time.monotonic()
    with listener, pytest.raises(UserError, match=r"no answer within 0\.4 seconds \(asked 2 times\)"):
        client_of(url, timeout_seconds=0.4, num_retries=1).ask("/models", None, same)
    assert 0.8 <= time.monotonic() - started < 5
    note_fault(
        "server whose answers never end",
        provoked="a byte of the body, the headers or a chunk now and then, and endless interim answers",
        outcome="an answer has timeout_seconds in all, however its parts arrive; then it is asked for again, "
        "and in the end the command ends with one line (exit 2)",
        tries=len(WITHOUT_END),
    )


TOO_LARGE = {
    "a body that never ends": without_end(HEAD + b"\r\n", b" " * 2**16),
    "an absurd Content-Length": without_end(HEAD + b"Content-Length: 99999999999999\r\n\r\n", b" " * 2**16),
    "an absurd chunk": without_end(HEAD + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n", b" " * 2**16),
    "chunks that never end": without_end(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 2**16 + b"\r\n"
    ),
    "an error that never ends": without_end(b"HTTP/1.1 400 Bad\r\n\r\n", b" " * 2**16),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
def test_the_size_of_an_answer_is_limited(kind, note_fault):
    url, listener = raw_server(TOO_LARGE[kind])
    with listener, pytest.raises(UserError, match=r"an answer of more than 16,777,216 bytes \(asked once\)"):
        client_of(url, num_retries=0).ask("/models", None, same)
    note_fault(
        "server whose answers are too large",
        provoked="bodies, chunks and error messages without an end, and absurd Content-Lengths",
        outcome="no more than 16 MiB of an answer are read; then it is asked for again, and in the end the "
        "command ends with one line (exit 2)",
        tries=len(TOO_LARGE),
    )


def test_stop_also_ends_a_connection_that_the_server_will_close():
    url, listener = raw_server(without_end(HEAD + b"Connection: close\r\n\r\n", b" ", 0.02))
    client = client_of(url)
    with listener, ThreadPoolExecutor(1) as executor:
        future = executor.submit(client.ask, "/models", None, same)
        time.sleep(0.2)
        client.stop()
        with pytest.raises(CancelledError):
            future.result(5)


def test_stop_ends_waiting_and_retrying_requests(server):
    def answer(path, body):
        if path == "/slow":
            server.closing.wait(30)
        return (503, {"Retry-After": "15"}, {})

    server.answer = answer
    client = client_of(server)
    with ThreadPoolExecutor(2) as executor:
        futures = [executor.submit(client.ask, path, {}, same) for path in ("/slow", "/busy")]
        while len(server.requests) < 2:
            time.sleep(0.01)
        time.sleep(0.1)  # the answer of /busy is on its way
        started = time.monotonic()
        client.stop()
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(5)
        assert time.monotonic() - started < 2
    with pytest.raises(CancelledError):
        client.ask("/completions", {}, same)
    assert len(server.requests) == 2


def test_one_problem_of_many_requests_is_logged_once(server, caplog):
    server.answer = in_turn((503, {}, {"error": "loading"}), (503, {}, {"error": "loading"}), OK)
    client_of(server).ask("/completions", {}, same)
    assert [record.message for record in caplog.records] == [f"{server.url}: HTTP 503: loading; asking again"]


def test_random_state_of_the_program_stays(server):
    server.answer = in_turn((503, {}, {}), OK)
    state = random.getstate()
    client_of(server).ask("/completions", {}, same)
    assert random.getstate() == state


@pytest.mark.parametrize(
    "base_url",
    ["127.0.0.1:8000", "ftp://host/v1", "http://", "http://host:port/v1", "http://h/v1?key=1", "http://h/#v1", ""],
)
def test_an_invalid_address_is_refused(base_url):
    with pytest.raises(UserError, match=r"base_url .* must be like http://127\.0\.0\.1:8000/v1"):
        client_of(base_url)


def test_key_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="api_key_variable") as caught:
        client_of("http://me:s3cret@host/v1")
    assert "s3cret" not in str(caught.value)
