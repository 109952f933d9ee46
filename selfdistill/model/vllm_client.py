"""Requests to a vLLM server. They go only to its address: redirects are not followed, and proxies are not used."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

CONNECT_S = 30.0
"""Time limit for connecting: even a busy server accepts connections at once; a wrong address may never answer."""
_SHOWN = 300
"""Maximum characters of a server's answer in messages."""
_CORRECT_URL = "start the server, or correct engine_url"
_SEE_LOG = "see the server's log, and start it again if it has ended"


class ServerProblem(Exception):
    """A server cannot be reached, refuses or is late; the message names it and quotes its answer.

    ``status`` is the answer's status, None without an answer; ``remedy`` is what to do.
    """

    def __init__(self, message: str, status: int | None = None, remedy: str = _SEE_LOG) -> None:
        super().__init__(message)
        self.status, self.remedy = status, remedy


class VllmClient:
    """The HTTP interface of one ``vllm serve``.

    Args:
        url: its address, without a path.
        timeout_s: time limit for an answer.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self._timeout_s = url, timeout_s
        address = urlsplit(url)
        self._kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
        self._host = address.netloc
        self._lock = threading.Lock()
        self._open: set[HTTPConnection] = set()
        self._hung_up = False

    def get(self, path: str, key: str) -> Any:
        """The value under a key of the JSON at a path.

        Raises:
            ServerProblem: the server does not answer, or its answer lacks the key.
        """
        return self._under(key, path, self._ask("GET", path, None, self._timeout_s))

    def post(self, path: str, body: dict[str, Any], key: str | None = None, *, waits: bool = False) -> Any:
        """Send JSON, and return the answer's value under the key, if one is given.

        Args:
            path: path of the request.
            body: JSON body of the request.
            key: key in the answer; None: ignore the answer.
            waits: wait for the answer without a time limit; :meth:`hang_up` ends the wait.

        Raises:
            ServerProblem: the server reports no success, or its answer lacks the key.
        """
        answer = self._ask("POST", path, body, None if waits else self._timeout_s)
        return None if key is None else self._under(key, path, answer)

    def hang_up(self) -> None:
        """Close all connections: pending calls raise an error, and the server drops the requests."""
        with self._lock:
            self._hung_up = True
            connections = list(self._open)
        for connection in connections:
            if connection.sock is not None:
                _shut(connection.sock)

    def _under(self, key: str, path: str, answer: str) -> Any:
        try:
            return json.loads(answer)[key]
        except (ValueError, LookupError, TypeError):
            found = f"found {_shown(answer)}, expected {key!r} of a vLLM server"
            raise ServerProblem(f"{self.url}: {_name(path)}: {found}", 200) from None

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float | None) -> str:
        within_s = min(CONNECT_S, self._timeout_s)
        connection = self._kind(self._host, timeout=within_s)
        with self._lock:
            self._open.add(connection)
        connected = False
        try:
            connection.connect()
            connected = True
            connection.sock.settimeout(timeout_s)
            if self._hung_up:
                raise ServerProblem(f"{self.url}: the request was dropped")
            content = None if body is None else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            status, text = answer.status, answer.read().decode(errors="replace")
        except TimeoutError:
            if connected:
                late = f"no answer to {_name(path)} in {self._timeout_s:g} s (engine_timeout_s)"
                raise ServerProblem(f"{self.url}: {late}") from None
            raise ServerProblem(f"{self.url}: cannot be reached in {within_s:g} s", remedy=_CORRECT_URL) from None
        except (OSError, HTTPException, UnicodeError) as error:  # the last one for a name that cannot be one
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            if connected:
                raise ServerProblem(f"{self.url}: broke off ({reason})") from None
            raise ServerProblem(f"{self.url}: cannot be reached ({reason})", remedy=_CORRECT_URL) from None
        finally:
            connection.close()
            with self._lock:
                self._open.discard(connection)
        if status != 200:
            raise ServerProblem(f"{self.url}: {_name(path)}: status {status}, {_shown(text)}", status)
        return text


def _name(path: str) -> str:
    return path.partition("?")[0]


def _shut(sock: socket.socket) -> None:
    with suppress(OSError):  # it has just been closed
        sock.shutdown(socket.SHUT_RDWR)


def _shown(text: str) -> str:
    """The server's own message on one line, shortened."""
    with suppress(ValueError, LookupError, TypeError):
        text = json.loads(text)["error"]["message"]
    text = " ".join(str(text).split())
    return repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...")
