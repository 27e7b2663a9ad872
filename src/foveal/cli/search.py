"""`foveal search`: makes a computation faster, and believes no candidate."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal.cli._arguments import option, positive, seconds, usable_device
from foveal.cli._progress import Progress
from foveal.cli._text import field, table

if TYPE_CHECKING:
    from foveal.search.archive import Archive
    from foveal.search.controller import Search, State
    from foveal.search.prior import Known
    from foveal.search.task import Task


def add_parser(subparsers: Any) -> None:
    """Adds `search` to the command line."""
    parser = subparsers.add_parser(
        "search",
        help="make a PyTorch function or one of the library's templates faster",
        description="Proposes candidates, judges each in a confined process as `foveal verify` does, times "
        "the good ones against the best in turns, and keeps the archive of all in one file. It may be killed "
        "at any moment: the same command goes on where it stopped.",
        epilog="TASK is a Python file (see `foveal verify --help`) or a template: "
        "`foveal search --list` prints those, and the strategies. Ctrl-C ends after what is in flight, twice "
        "at once. Exit status: 0; 2 for bad usage, a task that a do-nothing kernel would pass, or a "
        "start that fails.",
    )
    parser.add_argument("task", nargs="?", metavar="TASK", help="a Python file, or a template")
    parser.add_argument("--list", action="store_true", help="print templates and strategies")
    parser.add_argument(
        "--budget",
        type=seconds,
        default=300.0,
        metavar="T",
        help="such as 90s, 20m, 1h (default: 5m)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="candidates judged at once (default: 1)"
    )
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="judge on workers of a Ray cluster; `local` starts one on this machine (extra cluster)",
    )
    parser.add_argument("--strategy", default="full", metavar="NAME", help="(default: full)")
    parser.add_argument("--seed", type=int, default=0, help="of the random streams (default: 0)")
    parser.add_argument("--archive", metavar="FILE", help="where everything is kept")
    parser.add_argument("--report", metavar="FILE", help="write the report here (an HTML file)")
    parser.add_argument("--export", metavar="FILE", help="write all steps here, as JSON lines")
    parser.add_argument("--champion", metavar="FILE", help="write the best program here")
    parser.add_argument("--status", action="store_true", help="only say what the archive holds")
    parser.add_argument(
        "--set",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a constant that the task sets at its top level",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--compile-for",
        action="append",
        default=[],
        metavar="ARCH",
        help="every candidate of a Triton template must compile for this class of devices too: sm_80, "
        "sm_86, sm_90, sm_100 or gfx942; on the CPU nothing is timed then",
    )
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU (default: 1)")
    parser.add_argument(
        "--patience", type=seconds, default=20.0, metavar="S", help="seconds for one answer"
    )
    parser.add_argument("--model-url", metavar="URL", help="an OpenAI-compatible endpoint")
    parser.add_argument("--model", default="default", metavar="NAME", help="the model to ask for")
    parser.add_argument("--calls", type=positive, default=200, help="calls of the model at most")
    parser.add_argument(
        "--transcript", metavar="FILE", help="keep replies here, and answer from it"
    )
    parser.add_argument("--external", metavar="COMMAND", help="a command that edits program.py")
    parser.add_argument(
        "--known",
        metavar="FILE",
        action="append",
        default=[],
        help="the archive of a search of another kernel with the same parameters: begin where it was fast",
    )
    parser.add_argument(
        "--lessons", metavar="FILE", help="begin with what helped in other searches"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from foveal._errors import TaskError
    from foveal.search.archive import Archive
    from foveal.search.isolate.process import Nursery

    if args.list:
        print(_listing())
        return 0
    if args.task is None:
        raise TaskError("TASK: got none; a Python file, or a template of `foveal search --list`")
    if args.workers < 1:
        raise TaskError(f"workers: got {args.workers}; at least 1 is needed")
    usable_device(args.device)
    with Nursery() as nursery:
        task = _task(args, nursery)
        path = Path(args.archive) if args.archive else _default_archive(task)
        if args.status:
            with Archive(path, readonly=True) as archive:
                _finish(args, archive, task)
            return 0
        with Archive(path) as archive:
            exhausted = _search(args, nursery, task, archive)
            _finish(args, archive, task)
            if exhausted and not args.json:
                print(_exhausted(args, task))
    return 0


def _task(args: argparse.Namespace, nursery: Any) -> Task:
    from foveal._errors import TaskError
    from foveal.search.library import TEMPLATES, template_task
    from foveal.search.task import read_task

    if args.task in TEMPLATES:
        return template_task(args.task, args.device, args.threads, tuple(args.compile_for))
    if not Path(args.task).exists():
        raise TaskError(
            f"TASK: got {args.task!r}, which is neither a file nor a template: {', '.join(TEMPLATES)}"
        )
    if args.compile_for:
        raise TaskError("compile-for: only templates are compiled for devices that are not here")
    return read_task(args.task, nursery, dict(args.set), args.device, args.threads)


def _search(args: argparse.Namespace, nursery: Any, task: Task, archive: Archive) -> bool:
    """Searches; whether it ended because no operator had another idea."""
    from foveal.bench.record import environment
    from foveal.search import knowledge
    from foveal.search.controller import Search
    from foveal.search.endpoint import Allowance, Endpoint, Transcript
    from foveal.search.evaluator import Evaluator, JudgedEvaluator
    from foveal.search.strategies import Means, strategy
    from foveal.search.verify.judge import Judge

    endpoint = None
    if args.model_url:
        transcript = Transcript(args.transcript) if args.transcript else None
        allowance = Allowance(calls=args.calls)
        endpoint = Endpoint(args.model_url, args.model, allowance, transcript, archive.log_call)
    chosen = strategy(args.strategy, Means(endpoint, args.external))
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress("search"))
        progress("asking whether the task can tell a kernel from nothing", 0.0)
        judge = stack.enter_context(Judge(task, nursery, seconds=args.patience))
        judge.admit()
        evaluators: list[Evaluator] = [JudgedEvaluator(task, judge)]
        lost: list[str] = []
        if args.cluster:
            from foveal.search.cluster import workers

            progress("starting workers", 0.0)
            together = workers(
                task, args.workers, args.cluster, patience=args.patience, note=lost.append
            )
            evaluators = list(stack.enter_context(together))
            stack.callback(_note_all, archive, lost)
        else:
            exclusive = evaluators[0].exclusive  # type: ignore[attr-defined]
            for _ in range(args.workers - 1):
                other = stack.enter_context(Judge(task, nursery, seconds=args.patience))
                evaluators.append(JudgedEvaluator(task, other, exclusive=exclusive))
        known = _known(args, task)
        search = Search(task, archive, evaluators, chosen, args.seed, known=known)
        facts = environment(usable_device(args.device))
        archive.keep("environment", {k: v for k, v in facts.items() if k != "ceilings"})
        if args.lessons and not archive.lessons():
            knowledge.read(archive, args.lessons, task.device)
        start = time.monotonic()
        doing = ""

        def show(state: State) -> None:
            nonlocal doing
            doing = (
                f"{state.speedup:.2f}x, {state.accepted} of {state.judged} accepted: {state.doing}"
            )
            step()

        def step(text: str = "") -> None:
            share = (time.monotonic() - start) / args.budget
            last = "; the budget is spent, this is the last" if share > 1 else ""
            progress(f"{doing}{text and ', '}{text}{last}", min(share, 1.0))

        for each in evaluators:
            if isinstance(each, JudgedEvaluator):
                each.watch = step
        with _interruptible(search):
            search.run(args.budget, show)
        return search.exhausted


def _exhausted(args: argparse.Namespace, task: Task) -> str:
    """Why a search ended before its time."""
    own = "all its parameters were tried" if task.space.params else "it has no parameters (SPACE)"
    if args.strategy in ("full", "autokernel"):
        own += ", and no rewrite of the library applies to its text"
    return (
        f"ended before its time, for no operator had another idea: {own}. A language model (--model-url) or "
        f"a command (--external) may go on."
    )


def _known(args: argparse.Namespace, task: Task) -> list[Known]:
    """What was found on kindred kernels: in archives that are named, and with the template on a GPU."""
    from foveal.search.library import TEMPLATES
    from foveal.search.prior import of_archive

    found = [of_archive(path, task.space) for path in args.known]
    if args.task in TEMPLATES and task.device != "cpu":
        found += TEMPLATES[args.task].known()
    return found


def _note_all(archive: Archive, lost: list[str]) -> None:
    """Workers that were lost, for the report."""
    for text in lost:
        archive.note("cluster", text)


@contextlib.contextmanager
def _interruptible(search: Search) -> Iterator[None]:
    """The first Ctrl-C ends the search after what is in flight, the second one at once."""

    def ask(number: int, frame: object) -> None:
        search.stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nending after what is in flight; Ctrl-C once more ends at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _finish(args: argparse.Namespace, archive: Archive, task: Task) -> None:
    from foveal.bench.record import command_line
    from foveal.search import export, report

    if args.report:
        report.write(archive, task, args.report, command_line())
    if args.export:
        export.write_steps(archive, task, args.export)
    if args.champion:
        Path(args.champion).write_text(export.champion_text(archive, task), encoding="utf-8")
    if args.json:
        print(json.dumps(_facts(archive, task), indent=2))
        return
    rows = [
        (
            a["candidate"][:6],
            f"{a['speedup']:.3f}",
            f"{a['gain']:.1%}",
            _what(archive, a["candidate"]),
        )
        for a in archive.accepted()
    ]
    print(table(("accepted", "times the reference", "gain", "what it is"), rows))
    print()
    if len(rows) < 2:
        lost = [c["reason"] for c in archive.challenges() if c["kind"] != "elite"]
        last = f"; the last comparison: {lost[-1]}" if lost else ""
        print(f"nothing was faster than the start{last}\n")
    for name, value in _facts(archive, task)["counts"].items():
        print(field(name, str(value), 12))
    print(field("archive", str(archive.path), 12))


def _what(archive: Archive, candidate: str) -> str:
    entry = archive.entry(candidate)
    params = ", ".join(f"{name} {value}" for name, value in entry.candidate.params.items())
    return "; ".join(part for part in (entry.operator, entry.note, params) if part)


def _facts(archive: Archive, task: Task) -> dict[str, Any]:
    entries = archive.entries(evaluated=True)
    return {
        "task": task.name,
        "archive": str(archive.path),
        "counts": {
            "judged": len(entries),
            "passed": sum(bool(e.evaluation and e.evaluation.ok) for e in entries),
            "niches": len(archive.elites()),
            "seconds": round(archive.spent, 1),
            "calls": len(archive.calls()),
        },
        "accepted": [
            {
                "candidate": a["candidate"],
                "gain": a["gain"],
                "speedup": a["speedup"],
                "params": dict(archive.entry(a["candidate"]).candidate.params),
                "operator": archive.entry(a["candidate"]).operator,
            }
            for a in archive.accepted()
        ],
    }


def _listing() -> str:
    from foveal.search.library import TEMPLATES
    from foveal.search.strategies import RECIPES

    templates = table(
        ("template", "what it is"), [(name, t.summary) for name, t in TEMPLATES.items()]
    )
    recipes = table(
        ("strategy", "needs", "what it does"),
        [(r.name, r.needs, f"{r.summary}{f' ({r.paper})' if r.paper else ''}") for r in RECIPES],
    )
    return f"{templates}\n\n{recipes}"


def _default_archive(task: Task) -> Path:
    from foveal.tuning.store import folder

    name = re.sub(r"[^A-Za-z0-9]+", "-", task.name).strip("-")
    return folder() / "search" / f"{name}-{task.key}.db"
