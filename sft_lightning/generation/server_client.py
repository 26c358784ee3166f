"""Exchange JSON over HTTP with a server that may be slow, busy or hostile: limits of time and size, retries, stop."""

import http.client
import json
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sft_lightning.errors import UserError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# A running server accepts a connection at once, even if its answer takes long.
CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0
# A completion of 100,000 tokens has about 1 MB, also with each character escaped.
MAX_ANSWER_BYTES = 16 * 2**20
_TEMPORARY_STATUS = {408, 425, 429}
_MAX_MESSAGE_CHARACTERS = 300


class TemporaryError(Exception):
    """A fault that may be gone at the next request.

    Args:
        problem: A few words about the fault.
        pause_seconds: The pause that the server asks for.
    """

    def __init__(self, problem: str, pause_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.pause_seconds = pause_seconds


class ServerClient:
    """Sends requests to one server. Many threads may use it at once, each with its own connection.

    It ignores redirects and proxies: the key is sent to the host of ``base_url`` only.

    Args:
        base_url: Prefix of every path: ``http://127.0.0.1:8000/v1``.
        api_key: Sent as a bearer token; None sends none.
        num_retries: How often a request is sent again after a temporary fault, with pauses that double.
        timeout_seconds: How long to wait for a whole answer, however its parts arrive.

    Raises:
        UserError: If ``base_url`` is not the address of a server.
    """

    def __init__(self, base_url: str, api_key: str | None, num_retries: int, timeout_seconds: float) -> None:
        self._url = base_url.rstrip("/")
        parts = urlsplit(self._url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.fragment:
            raise UserError(f"base_url {base_url!r} must be like http://127.0.0.1:8000/v1")
        if parts.username is not None:
            raise UserError("base_url must not hold a user name or a key; name a variable with api_key_variable")
        secure = parts.scheme == "https"
        self._connection_class = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, port, parts.path
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._num_retries = num_retries
        self._timeout_seconds = timeout_seconds
        # So that the random state of the program does not change.
        self._jitter = random.Random()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._open_sockets: set[socket.socket] = set()
        self._warned: set[str] = set()

    def ask(self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], Answer]) -> Answer:
        """Returns the result of ``read`` for the JSON that the server answers.

        Args:
            path: Appended to ``base_url``: ``/completions``.
            body: Sent as JSON by POST; None sends a GET request.
            read: Converts the parsed JSON. If it raises ``TemporaryError``, the request is sent again.

        Raises:
            UserError: If the server refuses, or the last retry fails.
            CancelledError: If ``stop`` was called.
        """
        for num_failed in range(self._num_retries + 1):
            if self._stopped.is_set():
                raise CancelledError
            try:
                return read(self._exchange(path, body))
            except TemporaryError as error:
                problem = str(error)
                if num_failed < self._num_retries and not self._stopped.is_set():
                    self._warn_once(problem)
                    self._stopped.wait(self._pause_seconds(num_failed, error.pause_seconds))
        if self._stopped.is_set():
            raise CancelledError
        tries = f"{self._num_retries + 1} times" if self._num_retries else "once"
        raise UserError(
            f"{self._url}{path}: {problem} (asked {tries}); is a server up there? "
            "'vllm serve MODEL --port 8000' starts one at http://127.0.0.1:8000/v1"
        )

    def stop(self) -> None:
        """Ends every request: connections of those in flight are closed, and later ones fail."""
        self._stopped.set()
        with self._lock:
            for opened in self._open_sockets:
                _end(opened)

    def _exchange(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Sends one request and returns the parsed JSON of its answer."""
        payload = None if body is None else json.dumps(body).encode()
        wait_seconds = min(CONNECT_SECONDS, self._timeout_seconds)
        connection = self._connection_class(self._host, self._port, timeout=wait_seconds)
        try:
            connection.connect()
            with self._answering(connection.sock):
                connection.request("GET" if body is None else "POST", self._path + path, payload, self._headers)
                response = connection.getresponse()
                content = response.read(MAX_ANSWER_BYTES + 1)
        except TimeoutError:
            raise TemporaryError(f"no connection within {wait_seconds:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise TemporaryError(_one_line(reason)) from None
        finally:
            connection.close()
        if len(content) > MAX_ANSWER_BYTES:
            raise TemporaryError(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
        if response.length:
            raise TemporaryError(f"the answer ended {response.length} bytes early")
        self._check_status(path, response, content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise TemporaryError(f"no JSON but {_one_line(content)!r}") from None

    @contextmanager
    def _answering(self, opened: socket.socket) -> Iterator[None]:
        """Ends a connection when ``stop`` is called, or the time for its answer is over; raises TemporaryError then."""
        # The time-out of a socket is that of each part of an answer, and a part may be one byte.
        opened.settimeout(self._timeout_seconds)
        timer = threading.Timer(self._timeout_seconds, _end, [opened])
        timer.daemon = True
        deadline = time.monotonic() + self._timeout_seconds
        with self._lock:
            if self._stopped.is_set():
                raise CancelledError
            self._open_sockets.add(opened)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._open_sockets.discard(opened)
            if time.monotonic() >= deadline:
                raise TemporaryError(f"no answer within {self._timeout_seconds:g} seconds") from None

    def _check_status(self, path: str, response: http.client.HTTPResponse, content: bytes) -> None:
        if response.status in _TEMPORARY_STATUS or response.status >= 500:
            problem = f"HTTP {response.status}: {_message(content)}"
            raise TemporaryError(problem, _asked_pause_seconds(response.getheader("Retry-After")))
        if not 200 <= response.status < 300:
            hint = "; base_url usually ends in /v1" if response.status == 404 else ""
            raise UserError(f"{self._url}{path}: HTTP {response.status}: {_message(content)}{hint}")

    def _pause_seconds(self, num_failed: int, asked_seconds: float) -> float:
        """Returns how long to wait, with jitter, so that the threads do not all return at once."""
        longest = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**num_failed)
        return min(asked_seconds, self._timeout_seconds) + longest * self._jitter.uniform(0.5, 1.0)

    def _warn_once(self, problem: str) -> None:
        """Logs a problem once, and not for each of many requests."""
        with self._lock:
            if problem in self._warned:
                return
            self._warned.add(problem)
        logger.warning("%s: %s; asking again", self._url, problem)


def _end(opened: socket.socket) -> None:
    with suppress(OSError):  # it has just ended
        opened.shutdown(socket.SHUT_RDWR)


def _asked_pause_seconds(retry_after: str | None) -> float:
    """Returns the pause of a Retry-After header, which holds seconds or a date; 0 if it holds neither."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # not a date, or a date without a time zone
        return 0.0


def _message(content: bytes) -> str:
    """Returns the message in an error of vLLM, SGLang, FastAPI or another server."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return _one_line(content)
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return _one_line(found if isinstance(found, str) else json.dumps(found))


def _one_line(text: str | bytes) -> str:
    """Returns the beginning of a text from a server as one printable line."""
    if isinstance(text, bytes):
        text = text[: 4 * _MAX_MESSAGE_CHARACTERS].decode("utf-8", errors="replace")
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _MAX_MESSAGE_CHARACTERS else line[:_MAX_MESSAGE_CHARACTERS] + "..."
