"""A language model as an operator, against a local server that answers from a script."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from foveal.errors import FovealError
from foveal.search.archive import Archive, Evaluation
from foveal.search.candidate import Candidate, Proposal
from foveal.search.endpoint import REPLAY, Allowance, Endpoint, EndpointError, Transcript
from foveal.search.operators.base import View
from foveal.search.operators.language import LanguageModel, Manner, ReplyError, program_in
from foveal.search.strategies import RECIPES, Means, strategy
from foveal.search.task import Case, Input, Task, source_program

PROGRAM = "import torch\n\ndef candidate(x):\n    return torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)\n"
FASTER = "```python\nimport torch\n\ndef candidate(x):\n    return torch.softmax(x, -1)\n```"


STALL = "stall"


class Script(ThreadingHTTPServer):
    """Answers with its replies in order: a text, a number for an HTTP status, or STALL until it ends."""

    def __init__(self, replies: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies = replies
        self.ended = threading.Event()
        self.requests: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Script

    def do_POST(self) -> None:
        size = int(self.headers["Content-Length"])
        self.server.requests.append(json.loads(self.rfile.read(size)))
        reply = self.server.replies.pop(0) if self.server.replies else 500
        if reply == STALL:
            self.server.ended.wait(60.0)
            reply = "late"
        if isinstance(reply, int):
            self.send_response(reply)
            self.end_headers()
            return
        body = {
            "choices": [{"message": {"content": reply}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20},
        }
        content = json.dumps(body).encode() if reply != "garbage" else b"<html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None: ...


@contextlib.contextmanager
def served(*replies: Any) -> Iterator[Script]:
    server = Script(list(replies))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def task() -> Task:
    case = Case("4x8", (Input("x", (4, 8), "float32"),))
    return Task(
        "softmax",
        source_program(PROGRAM, "candidate"),
        (case,),
        source_program(PROGRAM, "candidate"),
    )


@pytest.fixture
def view(tmp_path: Path) -> Iterator[View]:
    """A search whose start was judged."""
    with Archive(tmp_path / "search.db") as archive:
        start = archive.add(Proposal(Candidate({}), "start"))
        assert start is not None
        archive.take()
        facts = {"operators": 4.0, "bytes": 900.0, "compulsory": 200.0}
        evaluation = Evaluation(True, "timing", "", 0.8, 1.0, facts, (1, 1, 0, 0))
        archive.record(start, evaluation, place=(1, 1, 0, 0), accepted=(None, 0.0))
        yield View(task(), archive)


def propose(view: View, endpoint: Endpoint, manner: Manner = Manner()) -> Proposal | None:
    return LanguageModel(endpoint, manner).propose(view, random.Random(0))


def test_a_reply_becomes_a_candidate_and_its_cost_is_kept(view: View) -> None:
    with served(FASTER) as server:
        allowance = Allowance(prices=(1.0, 10.0))
        endpoint = Endpoint(server.url, "small", allowance, log=view.archive.log_call)
        proposal = propose(view, endpoint)
    assert proposal is not None
    assert "torch.softmax" in str(proposal.candidate.text)
    (call,) = view.archive.calls()
    assert (call["tokens_in"], call["tokens_out"]) == (100, 20)
    assert call["cost"] == pytest.approx((100 + 200) / 1e6)
    (message,) = [m["content"] for m in server.requests[0]["messages"] if m["role"] == "user"]
    assert "speed-up over the reference 0.8" in message
    assert PROGRAM in message


def test_edits_replace_exactly_one_place() -> None:
    edit = "<<<<<<< SEARCH\ntorch.exp(x) /\n=======\nx.exp() /\n>>>>>>> REPLACE"
    assert "x.exp() / torch.exp(x)" in program_in(edit, PROGRAM)
    with pytest.raises(ReplyError, match="exactly one place"):
        program_in(edit.replace("torch.exp(x) /", "torch.exp(x)"), PROGRAM)
    with pytest.raises(ReplyError, match="no block of code"):
        program_in("I cannot do that.", PROGRAM)


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "no code here",
        "garbage",
        "```python\ndef candidate(:\n```",
        400,
        f"```python\n{'#' * 70_000}\n```",
    ],
)
def test_replies_without_a_program_are_noted_and_nothing_else_happens(
    view: View, reply: Any
) -> None:
    with served(reply) as server:
        endpoint = Endpoint(server.url, "small", Allowance(seconds=0.3))
        assert propose(view, endpoint) is None
    (event,) = view.archive.events()
    assert event["kind"] == "language model"


def test_a_stalled_endpoint_costs_no_more_than_its_deadline() -> None:
    with served(STALL) as server:
        endpoint = Endpoint(server.url, "small", Allowance(seconds=0.4))
        start = time.monotonic()
        with pytest.raises(EndpointError):
            endpoint.ask([{"role": "user", "content": "hello"}])
        assert time.monotonic() - start < 20.0  # it would wait for a minute


def test_a_busy_endpoint_is_asked_again() -> None:
    with served(503, "hello") as server:
        reply = Endpoint(server.url, "small").ask([{"role": "user", "content": "hello"}])
        assert reply.text == "hello"
        assert len(server.requests) == 2


def test_allowances_end_the_calls() -> None:
    with served("a", "b") as server:
        endpoint = Endpoint(server.url, "small", Allowance(calls=1))
        endpoint.ask([{"role": "user", "content": "1"}])
        with pytest.raises(EndpointError, match="allowance of 1 calls"):
            endpoint.ask([{"role": "user", "content": "2"}])


def test_a_transcript_replays_without_an_endpoint(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    path = tmp_path / "calls.jsonl"
    with served("first") as server:
        Endpoint(server.url, "small", transcript=Transcript(path)).ask(messages)
    written = path.read_bytes()
    silent = Endpoint("http://127.0.0.1:9/v1", "small", transcript=Transcript(path, REPLAY))
    assert silent.ask(messages).text == "first"
    assert path.read_bytes() == written
    with pytest.raises(EndpointError, match="no reply"):
        silent.ask([{"role": "user", "content": "something else"}])


def test_the_key_is_sent_and_never_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-of-the-user")
    path = tmp_path / "calls.jsonl"
    with served("hello") as server:
        Endpoint(server.url, "small", transcript=Transcript(path)).ask(
            [{"role": "user", "content": "x"}]
        )
    assert "secret-of-the-user" not in path.read_text()
    assert "secret-of-the-user" not in json.dumps(server.requests)


def test_a_judge_names_the_plan_that_the_coder_carries_out(view: View) -> None:
    plan = '{"bottleneck": "memory", "method": "fuse", "plan": "use one softmax"}'
    with served(plan, FASTER) as server:
        proposal = propose(view, Endpoint(server.url, "small"), Manner(judged=True))
    assert proposal is not None
    assert "use one softmax" in proposal.note
    assert (
        "Plan to carry out: memory; fuse; use one softmax"
        in server.requests[1]["messages"][1]["content"]
    )


def test_a_prompt_evolves_from_one_that_was_used(view: View) -> None:
    from foveal.search.operators.language import REGIONS, new_prompt

    used = {**new_prompt(REGIONS, None), "uses": 10, "mean": 0.1}
    view.archive.keep_prompt(used)
    edit = "<<<<<<< SEARCH\nMake one change at a time\n=======\nMake two changes\n>>>>>>> REPLACE"
    with served(edit, FASTER) as server:
        propose(view, Endpoint(server.url, "small"), Manner(evolving=True))
    prompts = view.archive.prompts()
    assert len(prompts) == 2
    assert prompts[1]["regions"]["philosophy"].startswith("Make two changes")
    assert prompts[1]["parent"] == used["id"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_strategy_is_built_or_says_what_it_needs(recipe: Any) -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "none")
    assert strategy(recipe.name, Means(endpoint, "true")).operators
    if recipe.needs:
        with pytest.raises(FovealError, match="it needs"):
            strategy(recipe.name)
