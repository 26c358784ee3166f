"""Grading processes: the ones that a test starts, and none left behind. A server whose answers a test decides."""

import json
import os
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sft_lightning.evaluation import grading_pool


@pytest.fixture(scope="module", autouse=True)
def _no_worker_survives():
    yield
    grading_pool.close_idle_workers()


@pytest.fixture
def started(monkeypatch):
    """The grading processes that a test starts. In the end none is alive, and none a zombie."""
    grading_pool.close_idle_workers()
    processes = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    yield processes
    grading_pool.close_idle_workers()
    for process in processes:
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)


class FakeServer(ThreadingHTTPServer):
    """Answers every request with what ``answer(path, body)`` returns: status, headers and JSON or bytes.

    Attributes:
        requests: (path, headers, body, seconds) of each request, in the order of their arrival.
        closing: Set in the end, for an answer that waits.
        url: What stands in front of every path.
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
