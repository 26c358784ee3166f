"""JSON over HTTP with a server that may be slow, busy or not up yet: time-outs, retries, and a way to stop at once."""

import http.client
import json
import logging
import random
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sft_lightning.errors import UserError

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

# A server that is up takes a connection at once, however long it then thinks.
CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
_TEMPORARY_STATUS = {408, 425, 429}
_MOST_MESSAGE_CHARACTERS = 300


class TemporaryError(Exception):
    """Something that may be gone when the server is asked again.

    Args:
        problem: What is wrong, in a few words.
        pause_seconds: How long the server wants to be left alone.
    """

    def __init__(self, problem: str, pause_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.pause_seconds = pause_seconds


class ServerClient:
    """Asks one server. Many threads may ask at once, each over a connection of its own.

    Redirects are not followed and proxies not used: the key goes to the host of ``base_url`` only.

    Args:
        base_url: What stands in front of every path: ``http://127.0.0.1:8000/v1``.
        api_key: Sent as a bearer token; None sends none.
        num_retries: How often a request is sent again after a temporary fault, with pauses that double.
        timeout_seconds: How long to wait for an answer to begin or to go on.

    Raises:
        UserError: If ``base_url`` is no address of a server.
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
        # The program's own random state is not ours to move.
        self._jitter = random.Random()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._open_connections: set[http.client.HTTPConnection] = set()
        self._told: set[str] = set()

    def ask(self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], Answer]) -> Answer:
        """Returns what ``read`` makes of the server's JSON.

        Args:
            path: Behind ``base_url``: ``/completions``.
            body: Posted as JSON; None gets the path without one.
            read: Takes what the JSON holds. A ``TemporaryError`` that it raises is a reason to ask again.

        Raises:
            UserError: If the server refuses, or the last retry failed too.
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
                    self._tell(problem)
                    self._stopped.wait(self._pause_seconds(num_failed, error.pause_seconds))
        if self._stopped.is_set():
            raise CancelledError
        tries = f"{self._num_retries + 1} times" if self._num_retries else "once"
        raise UserError(
            f"{self._url}{path}: {problem} (asked {tries}); is a server up there? "
            "'vllm serve MODEL --port 8000' starts one at http://127.0.0.1:8000/v1"
        )

    def stop(self) -> None:
        """Ends every request: those on their way, whose connections are cut, and those to come."""
        self._stopped.set()
        with self._lock:
            for connection in self._open_connections:
                try:
                    connection.sock.shutdown(socket.SHUT_RDWR)
                except (OSError, AttributeError):  # it has just ended by itself
                    continue

    def _exchange(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Sends one request and returns what the JSON of its answer holds."""
        payload = None if body is None else json.dumps(body).encode()
        wait_seconds = min(CONNECT_SECONDS, self._timeout_seconds)
        connection = self._connection_class(self._host, self._port, timeout=wait_seconds)
        try:
            connection.connect()
            wait_seconds = self._timeout_seconds
            connection.sock.settimeout(wait_seconds)
            with self._lock:
                if self._stopped.is_set():
                    raise CancelledError
                self._open_connections.add(connection)
            connection.request("GET" if body is None else "POST", self._path + path, payload, self._headers)
            response = connection.getresponse()
            content = response.read()
        except TimeoutError:
            raise TemporaryError(f"no answer within {wait_seconds:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise TemporaryError(_one_line(reason)) from None
        finally:
            with self._lock:
                self._open_connections.discard(connection)
            connection.close()
        self._check_status(path, response, content)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise TemporaryError(f"no JSON but {_one_line(content)!r}") from None

    def _check_status(self, path: str, response: http.client.HTTPResponse, content: bytes) -> None:
        if response.status in _TEMPORARY_STATUS or response.status >= 500:
            problem = f"HTTP {response.status}: {_message(content)}"
            raise TemporaryError(problem, _asked_pause_seconds(response.getheader("Retry-After")))
        if not 200 <= response.status < 300:
            hint = "; base_url mostly ends in /v1" if response.status == 404 else ""
            raise UserError(f"{self._url}{path}: HTTP {response.status}: {_message(content)}{hint}")

    def _pause_seconds(self, num_failed: int, asked_seconds: float) -> float:
        """Returns how long to wait. No two threads wait equally long, or all of them would be back at once."""
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2**num_failed)
        return min(asked_seconds, self._timeout_seconds) + longest * self._jitter.uniform(0.5, 1.0)

    def _tell(self, problem: str) -> None:
        """Logs what is wrong, once and not for every one of many requests."""
        with self._lock:
            if problem in self._told:
                return
            self._told.add(problem)
        logger.warning("%s: %s; asking again", self._url, problem)


def _asked_pause_seconds(retry_after: str | None) -> float:
    """Returns what a Retry-After header asks for: seconds or a date, 0 where it is neither."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without a time zone
        return 0.0


def _message(content: bytes) -> str:
    """Returns what an error of a server says, wherever in it vLLM, SGLang, FastAPI and others put that."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return _one_line(content)
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return _one_line(found if isinstance(found, str) else json.dumps(found))


def _one_line(text: str | bytes) -> str:
    """Returns the beginning of a text that a server chose, fit for a terminal."""
    if isinstance(text, bytes):
        text = text[: 4 * _MOST_MESSAGE_CHARACTERS].decode("utf-8", errors="replace")
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= _MOST_MESSAGE_CHARACTERS else line[:_MOST_MESSAGE_CHARACTERS] + "..."
