"""Candidates written by a language model, with measured feedback and prompts that evolve.

No conversation is kept: every call gets the latest program and the latest facts only.  The reply is one
block of Python, or edits between <<<<<<< SEARCH, ======= and >>>>>>> REPLACE.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveal.search.archive import Entry
from foveal.search.candidate import Candidate, Proposal
from foveal.search.endpoint import Endpoint, EndpointError
from foveal.search.knowledge import state_of
from foveal.search.operators.base import View, drift, faster_first
from foveal.search.verify import static

REGIONS: Mapping[str, str] = {
    "philosophy": "Make one change at a time and say in one sentence why it should be faster.",
    "strategies": "Fuse what reads the same memory; keep what is reused in registers or caches; "
    "avoid copies.",
    "pitfalls": "Results are compared with float64: do not lower precision, skip work, cache results, or "
    "change inputs. New inputs come with every call.",
    "analysis": "Compare bytes moved with compulsory bytes first, then the number of operators.",
}
"""Parts of a prompt that evolve."""

_BLOCK = re.compile(r"```(?:python)?\n(.*?)```", re.DOTALL)
_EDIT = re.compile(r"<{7} SEARCH\n(.*?)\n?={7}\n(.*?)\n?>{7} REPLACE", re.DOTALL)
_EVOLVE_EVERY = 10
_USES_TO_EVOLVE = 5
_HINTS = (
    ("less memory traffic", "more memory traffic"),
    ("fewer operators", "more, smaller operators"),
    ("less work in products", "more work in products"),
    ("smaller intermediates", "larger intermediates"),
)


@dataclass(frozen=True)
class Manner:
    """How a model is asked.

    judged: a call before the edit names one bottleneck, one method and one plan; lessons, inspirations: how
    many go into a prompt; evolving: whether prompts are rewritten by the model itself.
    """

    judged: bool = False
    lessons: int = 3
    inspirations: int = 2
    evolving: bool = False


class LanguageModel:
    """A model as an operator; `failures` counts replies that were no program, by reason."""

    name = "language model"

    def __init__(self, endpoint: Endpoint, manner: Manner = Manner()) -> None:
        self.endpoint, self.manner = endpoint, manner
        self.failures: dict[str, int] = {}

    def propose(self, view: View, source: random.Random) -> Proposal | None:
        if view.task.beginning["kind"] == "template":
            return None
        parent = view.parent(source)
        if parent is None:
            return None
        prompt = self._prompt(view, source)
        text = parent.candidate.text or str(view.task.beginning["text"])
        try:
            card = task_card(view, parent, text, self.manner)
            plan = self._plan(card, prompt) if self.manner.judged else ""
            reply = self.endpoint.ask(_messages(prompt["regions"], card, plan), prompt["id"])
            edited = program_in(reply.text, text)
            static.check({**view.task.beginning, "text": edited})
        except (EndpointError, ReplyError, static.StaticError) as error:
            reason = str(error)
            self.failures[reason] = self.failures.get(reason, 0) + 1
            view.archive.note("language model", reason)
            return None
        candidate = Candidate(parent.candidate.params, edited)
        if not view.new(candidate):
            return None
        note = f"prompt {prompt['id']}" + (f"; {plan}" if plan else "")
        return Proposal(candidate, self.name, (parent.id,), note)

    def _plan(self, card: str, prompt: Mapping[str, Any]) -> str:
        """One bottleneck, one method, one plan, as the model sees them."""
        ask = 'Answer with JSON only: {"bottleneck": ..., "method": ..., "plan": ...}, one of each.'
        reply = self.endpoint.ask(
            [{"role": "system", "content": ask}, {"role": "user", "content": card}], prompt["id"]
        )
        found = re.search(r"\{.*\}", reply.text, re.DOTALL)
        try:
            parts = json.loads(found[0]) if found else {}
            return "; ".join(str(parts[key]) for key in ("bottleneck", "method", "plan"))
        except (ValueError, KeyError, TypeError):
            raise ReplyError("the judge's answer is not the JSON that was asked for") from None

    def _prompt(self, view: View, source: random.Random) -> dict[str, Any]:
        """The prompt to use: the one of which most gain can be relied on, or a new one."""
        known = view.archive.prompts()
        if not known:
            first = new_prompt(REGIONS, None)
            view.archive.keep_prompt(first)
            return first
        uses = sum(p["uses"] for p in known)
        if self.manner.evolving and uses and uses % _EVOLVE_EVERY == 0:
            tried = [p for p in known if p["uses"] >= _USES_TO_EVOLVE]
            if tried and len(known) <= uses // _EVOLVE_EVERY:
                evolved = self._evolved(max(tried, key=lower_bound))
                if evolved is not None:
                    view.archive.keep_prompt(evolved)
                    known.append(evolved)
        chosen = max(known, key=lower_bound) if source.random() < 0.7 else source.choice(known)
        chosen = {**chosen, "uses": chosen["uses"] + 1}
        view.archive.keep_prompt(chosen)
        return chosen

    def _evolved(self, prompt: Mapping[str, Any]) -> dict[str, Any] | None:
        ask = (
            "Improve this guidance for writing fast kernels. Answer with one edit: <<<<<<< SEARCH, the words "
            "to replace, =======, the new words, >>>>>>> REPLACE."
        )
        whole = json.dumps(prompt["regions"], indent=1)
        try:
            reply = self.endpoint.ask(
                [{"role": "system", "content": ask}, {"role": "user", "content": whole}],
                prompt["id"],
            )
            regions = json.loads(program_in(reply.text, whole))
        except (EndpointError, ReplyError, ValueError):
            return None
        if set(regions) != set(REGIONS) or not all(isinstance(r, str) for r in regions.values()):
            return None
        return new_prompt(regions, prompt["id"])


class ReplyError(Exception):
    """A reply that holds no program: the sentence."""


def program_in(reply: str, before: str) -> str:
    """The program of a reply: edits of the one before, or a block of Python.  Raises ReplyError."""
    edits = _EDIT.findall(reply)
    if edits:
        for old, new in edits:
            if before.count(old) != 1:
                raise ReplyError("an edit does not fit exactly one place of the program")
            before = before.replace(old, new)
        return before
    blocks = _BLOCK.findall(reply)
    if not blocks:
        raise ReplyError("the reply has no block of code and no edit")
    return str(max(blocks, key=len))


def task_card(view: View, parent: Entry, text: str, manner: Manner) -> str:
    """What a model is told: the task, the program, what was measured, what helped before."""
    task, archive = view.task, view.archive
    begun = task.beginning
    lines = [f"Task: {task.name}. Keep the name {begun['entry']} and its parameters."]
    for case in task.cases:
        if case.role != "hidden":
            inputs = ", ".join(f"{i.name} {list(i.shape)} {i.dtype}" for i in case.inputs)
            lines.append(f"Case: {inputs}")
    lines += ["Reference:", "```python", str(task.reference["text"]), "```"]
    lines += ["Program to make faster:", "```python", text, "```"]
    lines += digest(parent)
    cell = parent.evaluation.cell if parent.evaluation else None
    others = [e for e in faster_first(list(archive.elites().values())) if e.id != parent.id]
    for other in others[: manner.inspirations]:
        if other.candidate.text is not None:
            lines += ["Another way that passed:", "```python", other.candidate.text, "```"]
    for lesson in archive.lessons(state_of(parent))[: manner.lessons]:
        lines.append(
            f"Earlier: {lesson.action} gained {math.expm1(lesson.mean):+.1%} ({lesson.n} times)"
        )
    if cell is not None:
        pull = drift(archive, cell, time.time())
        strongest = max(range(4), key=lambda axis: abs(pull[axis]))
        if abs(pull[strongest]) >= 0.2:
            lines.append(f"Hint: {_HINTS[strongest][pull[strongest] > 0]}")
    failed = [
        e for e in view.judged if e.evaluation and not e.evaluation.ok and parent.id in e.parents
    ]
    if failed and failed[-1].evaluation is not None:
        last = failed[-1].evaluation
        lines.append(f"The last edit was rejected at stage {last.stage}: {last.reason}")
    return "\n".join(lines)


def digest(entry: Entry) -> list[str]:
    """At most twelve measured facts."""
    if entry.evaluation is None:
        return []
    facts = [f"{name} {value:.4g}" for name, value in sorted(entry.evaluation.facts.items())]
    if entry.evaluation.speedup is not None:
        facts.insert(0, f"speed-up over the reference {entry.evaluation.speedup:.3f}")
    return ["Measured: " + "; ".join(facts[:12])]


def new_prompt(regions: Mapping[str, str], parent: str | None) -> dict[str, Any]:
    """A prompt that was not used yet."""
    identity = hashlib.sha256(json.dumps(dict(regions), sort_keys=True).encode()).hexdigest()[:8]
    return {
        "id": identity,
        "parent": parent,
        "regions": dict(regions),
        "uses": 0,
        "mean": 0.0,
        "m2": 0.0,
    }


def lower_bound(prompt: Mapping[str, Any]) -> float:
    """Mean gain less one standard error: the best of few uses is luck."""
    uses = max(prompt["uses"], 1)
    return float(prompt["mean"] - math.sqrt(prompt["m2"] / uses + 1e-4) / math.sqrt(uses))


def _messages(regions: Mapping[str, str], card: str, plan: str) -> list[dict[str, str]]:
    system = "You write fast, exact kernels.\n" + "\n".join(
        f"{name}: {text}" for name, text in regions.items()
    )
    user = card + (f"\nPlan to carry out: {plan}" if plan else "")
    user += "\nAnswer with the whole program in one block of Python, or with SEARCH/REPLACE edits."
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
