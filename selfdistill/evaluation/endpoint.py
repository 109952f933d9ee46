"""Client of an OpenAI-compatible chat endpoint. Requests go to that address and nowhere else."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener, getproxies

from selfdistill.data import Message, join_surrogates
from selfdistill.errors import RERUN, UserError, one_line, shortened

KEYS = ("SELFDISTILL_JUDGE_KEY", "OPENAI_API_KEY")
"""Environment variables of the API key. The first is sent to any address in the settings, the second to OpenAI only."""
THOUGHTS = ("reasoning_content", "reasoning")
"""Where servers put a thought that they keep apart from the answer."""

THREADS = 8
"""Maximum requests at the same time."""
TIMEOUT_S = 60.0
WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # between attempts: a minute, the usual window of a rate limit
_HERE = ("localhost", "127.0.0.1", "::1")

Answer = TypeVar("Answer")


class Endpoint:
    """A model behind a chat endpoint.

    Args:
        url: base URL of the API, for example ``http://localhost:8000/v1``; ``/chat/completions`` is appended.
        model: the model's name at that API.
        who: its role in messages; the setting of its address is ``{who}_url``.
        note: what error messages say about cached answers.
        go_on: what error messages say about how to continue.
    """

    def __init__(self, url: str, model: str, who: str, note: str, go_on: str = RERUN) -> None:
        self.url, self.model, self.who, self.note = url.rstrip("/") + "/chat/completions", model, who, note
        self._go_on = go_on
        self._opener = _opener(url)

    def ask(self, messages: list[Message], stop: threading.Event, *, max_tokens: int, temperature: float = 0) -> str:
        """Return the model's answer to a conversation.

        Retries for about a minute if the endpoint is overloaded (429, 5xx, timeout).

        Args:
            messages: chat messages.
            stop: ends retries; set when another request has failed permanently.
            max_tokens: maximum length of the answer.
            temperature: sampling temperature; 0: greedy.

        Raises:
            UserError: the endpoint is unreachable, refuses, stays overloaded, or returns no chat completion; or the API
                key is invalid, or would be sent over http to another machine.
        """
        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        key = _api_key(self.url, self.who)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        for wait in (*WAITS_S, None):
            request = Request(self.url, json.dumps(body).encode(), headers)
            try:
                with self._opener.open(request, timeout=TIMEOUT_S) as response:
                    answer = response.read()
                break
            except (OSError, HTTPException) as error:  # an HTTPError is an OSError
                problem = _problem(error, key)
                if not _passes(error) or wait is None or stop.wait(wait):
                    raise UserError(f"{self.who} {self.url}: {problem}; {self.note}; {self._go_on}") from None
        try:
            message = json.loads(answer)["choices"][0]["message"]
            content = message["content"]
        except (ValueError, LookupError, TypeError):
            message = content = None
        if content is None and message and any(message.get(name) for name in THOUGHTS):
            raise UserError(
                f"{self.who} {self.url}: {self.model!r} thought for {max_tokens} tokens and gave no answer; use a "
                "model that answers directly, or switch its thinking off at the server"
            )
        if not isinstance(content, str):
            raise UserError(
                f"{self.who} {self.url}: found {shown(_hidden(answer.decode(errors='replace'), key))}, expected a chat "
                f"completion; check {self.who}_url"
            )
        return join_surrogates(content)


def ask_all(
    ask: Callable[[str], Answer], keys: Sequence[str], stop: threading.Event
) -> Generator[tuple[str, Answer], None, None]:
    """Yield each key with ``ask(key)`` as the answers arrive. If one raises, or on Ctrl-C, none is waited for.

    Threads of a ``ThreadPoolExecutor`` would be waited for when the process ends, too; these are daemons.

    Args:
        ask: called in up to :data:`THREADS` threads.
        keys: what to ask for.
        stop: set at the end and at an error, so that calls left behind do not retry.
    """
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    arrived: queue.SimpleQueue[tuple[str, Future[Answer]]] = queue.SimpleQueue()
    for key in keys:
        waiting.put(key)

    def work() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                key, answer = waiting.get_nowait(), Future[Answer]()
                try:
                    answer.set_result(ask(key))
                except BaseException as error:
                    answer.set_exception(error)
                arrived.put((key, answer))
                if answer.exception():
                    stop.set()

    try:
        for _ in range(min(THREADS, len(keys))):
            threading.Thread(target=work, name="requests", daemon=True).start()
        for _ in keys:
            key, answer = arrived.get()
            yield key, answer.result()
    finally:
        stop.set()


class _NoRedirect(HTTPRedirectHandler):
    """Treats a redirect as an error: key and data are meant only for the address that the user gave."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _opener(url: str) -> OpenerDirector:
    """Opens requests to an address, without the environment's proxy where it could read them: https is a tunnel."""
    address = urlsplit(url)
    tunnel = address.scheme == "https" and address.hostname not in _HERE
    return build_opener(_NoRedirect, ProxyHandler(getproxies() if tunnel else {}))


def _api_key(url: str, who: str) -> str | None:
    address = urlsplit(url)
    secret = address.scheme == "https" or address.hostname in _HERE
    for name in KEYS if address.hostname == "api.openai.com" else KEYS[:1]:
        if key := os.environ.get(name, "").strip():
            if not secret:
                raise UserError(f"{who} {url}: {name} is not sent over http, where others can read it; use https")
            if not (key.isascii() and key.isprintable()):
                raise UserError(f"environment variable {name}: contains invalid characters for a key; set it again")
            return key
    return None


def _passes(error: Exception) -> bool:
    """Whether a retry may succeed."""
    if isinstance(error, HTTPError):
        return error.code == 429 or error.code >= 500
    cause = error.reason if isinstance(error, URLError) else error
    return isinstance(cause, TimeoutError | ConnectionResetError | BrokenPipeError | HTTPException)


def _problem(error: Exception, key: str | None) -> str:
    if isinstance(error, HTTPError):
        if 300 <= error.code < 400:
            where = shown(error.headers.get("Location", ""))
            return (
                f"status {error.code}, a redirect to {where}, which is not followed; give that address if you trust it"
            )
        try:
            said = error.read(1000).decode(errors="replace")
        except (OSError, HTTPException):
            said = ""
        return f"status {error.code}, {shown(_hidden(said, key))}"
    cause = error.reason if isinstance(error, URLError) else error
    return one_line(cause) if isinstance(cause, Exception) else str(cause)


def _hidden(text: str, key: str | None) -> str:
    return text.replace(key, "***") if key else text


def shown(text: str) -> str:
    return repr(shortened(" ".join(text.split()), 120))
