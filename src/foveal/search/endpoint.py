"""Language models behind any endpoint that speaks the OpenAI protocol; every call is written down.

A transcript is a file of JSON lines {key, request, response, usage, seconds}, key = SHA-256 of the request as
canonical JSON.  `Transcript(path, mode)` with mode "record" adds to it, "replay" answers from it alone and
raises for what is not there, "live" keeps none.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal._errors import TaskError

LIVE, RECORD, REPLAY = "live", "record", "replay"
_LONGEST = 4 << 20
_WAITS = (0.5, 2.0, 8.0)
KEY_VARIABLE = "OPENAI_API_KEY"


class EndpointError(Exception):
    """No usable reply: the sentence.  A search goes on without it."""


@dataclass(frozen=True)
class Reply:
    """What a model answered, and what it cost."""

    text: str
    tokens_in: int
    tokens_out: int
    cost: float
    seconds: float
    key: str


@dataclass(frozen=True)
class Allowance:
    """What may be spent: calls, tokens, money (in the unit of the prices), seconds for one call with retries.

    `prices` are money per million tokens, read and written.
    """

    calls: int = 200
    tokens: int = 2_000_000
    money: float = float("inf")
    seconds: float = 120.0
    prices: tuple[float, float] = (0.0, 0.0)


class Transcript:
    """Replies on disk."""

    def __init__(self, path: str | Path, mode: str = RECORD) -> None:
        if mode not in (LIVE, RECORD, REPLAY):
            raise TaskError(
                f"transcript: got mode {mode!r}; {LIVE}, {RECORD} or {REPLAY} is needed"
            )
        self.path, self.mode = Path(path), mode
        self._known: dict[str, Mapping[str, Any]] = {}
        if mode != LIVE and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                self._known[entry["key"]] = entry

    def find(self, key: str) -> Mapping[str, Any] | None:
        return self._known.get(key)

    def add(self, entry: Mapping[str, Any]) -> None:
        if self.mode != RECORD:
            return
        self._known[entry["key"]] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")


class Endpoint:
    """A model at BASE/chat/completions.

    The key is read from OPENAI_API_KEY when a call is made and never stored.  One deadline holds for a
    call and all its retries, so that an endpoint which never answers costs no more than that.
    """

    def __init__(
        self,
        base: str,
        model: str,
        allowance: Allowance = Allowance(),
        transcript: Transcript | None = None,
        log: Callable[[Mapping[str, Any]], None] = lambda entry: None,
        temperature: float = 0.7,
    ) -> None:
        if urllib.parse.urlparse(base).scheme not in ("http", "https"):
            raise TaskError(
                f"model-url: got {base!r}; a URL such as http://127.0.0.1:8000/v1 is needed"
            )
        self.base, self.model = base.rstrip("/"), model
        self.allowance, self.transcript = allowance, transcript
        self.temperature = temperature
        self._log = log
        self.calls = self.tokens = 0
        self.money = 0.0

    def ask(self, messages: Sequence[Mapping[str, str]], prompt: str = "") -> Reply:
        """The reply to messages.

        Raises EndpointError: nothing in time, nothing usable, nothing left to spend.
        """
        request = {
            "model": self.model,
            "messages": [dict(each) for each in messages],
            "temperature": self.temperature,
        }
        key = request_key(request)
        known = self.transcript.find(key) if self.transcript is not None else None
        if known is None:
            if self.transcript is not None and self.transcript.mode == REPLAY:
                raise EndpointError(f"the transcript has no reply to request {key[:12]}")
            self._afford()
            start = time.monotonic()
            response = self._post(request, start + self.allowance.seconds)
            known = {
                "key": key,
                "request": request,
                "response": response,
                "usage": response.get("usage") or {},
                "seconds": time.monotonic() - start,
            }
            if self.transcript is not None:
                self.transcript.add(known)
        return self._reply(key, known, request, prompt)

    def _reply(
        self, key: str, known: Mapping[str, Any], request: Mapping[str, Any], prompt: str
    ) -> Reply:
        try:
            text = known["response"]["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise EndpointError("the reply has no choices[0].message.content") from None
        if not isinstance(text, str) or not text.strip():
            raise EndpointError("the reply is empty")
        usage = known.get("usage") or {}
        read = int(usage.get("prompt_tokens") or 0)
        written = int(usage.get("completion_tokens") or 0)
        cost = (read * self.allowance.prices[0] + written * self.allowance.prices[1]) / 1e6
        self.calls += 1
        self.tokens += read + written
        self.money += cost
        reply = Reply(text, read, written, cost, float(known["seconds"]), key)
        self._log(
            {
                "key": key,
                "request": json.dumps(request),
                "reply": text,
                "tokens_in": read,
                "tokens_out": written,
                "cost": cost,
                "seconds": reply.seconds,
                "prompt": prompt,
            }
        )
        return reply

    def _afford(self) -> None:
        spent = (
            (self.calls, self.allowance.calls, "calls"),
            (self.tokens, self.allowance.tokens, "tokens"),
            (self.money, self.allowance.money, "money"),
        )
        for used, most, what in spent:
            if used >= most:
                raise EndpointError(f"the allowance of {most:g} {what} is used up")

    def _post(self, request: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        secret = os.environ.get(KEY_VARIABLE)
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        reason = "no answer"
        for wait in (*_WAITS, None):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            call = urllib.request.Request(
                f"{self.base}/chat/completions", json.dumps(request).encode(), headers
            )
            try:
                with urllib.request.urlopen(call, timeout=left) as response:
                    content = _read(response, deadline)
                found = json.loads(content)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
            except (TimeoutError, OSError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                if isinstance(found, dict):
                    return found
                reason = "the reply is no JSON object"
            if wait is None or time.monotonic() + wait > deadline:
                break
            time.sleep(wait)
        raise EndpointError(f"{self.base}: {reason}")


def request_key(request: Mapping[str, Any]) -> str:
    """SHA-256 of a request as canonical JSON."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def _read(response: Any, deadline: float) -> bytes:
    """A body of at most 4 MiB, before the deadline, however slowly it drips."""
    content = b""
    while True:
        if time.monotonic() > deadline:
            raise TimeoutError("the reply took too long")
        piece = response.read1(1 << 16)
        if not piece:
            return content
        content += piece
        if len(content) > _LONGEST:
            raise ValueError(f"the reply is longer than {_LONGEST} bytes")
