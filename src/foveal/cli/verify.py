"""`foveal verify`: judges a kernel in a confined process."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal.cli._arguments import option, positive, seconds, usable_device
from foveal.cli._progress import Progress
from foveal.cli._text import field, table

if TYPE_CHECKING:
    from foveal.search.verify.judge import Verdict


def add_parser(subparsers: Any) -> None:
    """Adds `verify` to the command line."""
    parser = subparsers.add_parser(
        "verify",
        help="judge a kernel: correct, honest, how fast",
        description="Judges a candidate against the reference of its task: compiles it, compares it with "
        "float64 at every shape, style of input and edge value, its gradients too, runs it again, on memory "
        "full of NaN, and times it on a clock that it cannot reach. It runs in a process without network, "
        "files of yours, or a way to start others; nothing of it runs in this one.",
        epilog="FILE defines reference and SHAPES, and candidate; or Model, get_inputs and ModelNew. Where "
        "it defines the candidate only, --task names the file with the rest. Instead of FILE a change of the "
        "shipped tile sizes may be named, such as 'sm_90/backward_kv/64/half/causal=128x64 warps 4 stages "
        "2': the kernel is compiled for that class of devices, and results with these sizes are compared "
        "with float64 on problems of that pattern (without one, of all). Exit status: 0 the candidate "
        "passes; 1 it does not; 2 bad usage, or a task that a do-nothing kernel would pass.",
    )
    parser.add_argument(
        "file", metavar="FILE", help="a Python file with the candidate, or a change of tile sizes"
    )
    parser.add_argument("--task", metavar="FILE", help="the file with the reference")
    parser.add_argument("--entry", metavar="NAME", help="candidate (default) or ModelNew")
    parser.add_argument(
        "--set",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for a constant that the task sets at its top level",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--seed", type=int, help="repeat the random inputs of a run")
    parser.add_argument(
        "--patience", type=seconds, default=20.0, metavar="S", help="seconds for one answer"
    )
    parser.add_argument("--no-timing", action="store_true", help="leave the timing out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    usable_device(args.device)
    if "=" in args.file and not Path(args.file).exists():
        return _change(args)
    from foveal._errors import TaskError
    from foveal.search.isolate.process import Nursery
    from foveal.search.task import read_candidate, read_task
    from foveal.search.verify.judge import STAGES, Judge
    from foveal.search.verify.race import Rounds

    with Progress("verify") as progress, Nursery() as nursery:
        progress("reading the task", 0.0)
        task = read_task(args.task or args.file, nursery, dict(args.set), args.device, args.threads)
        program = read_candidate(task, args.file, args.entry) if args.task else task.start
        if program is None:
            raise TaskError(
                f"{args.file}: it defines no candidate and no ModelNew; name its --task"
            )
        with Judge(task, nursery, args.seed, args.patience) as judge:
            tried = judge.admit()
            verdict = judge.verify(
                program,
                None if args.no_timing else Rounds(),
                lambda stage: progress(stage, STAGES.index(stage) / len(STAGES)),
            )
            if verdict.ok:
                confirmed = judge.confirm(program)
                if not confirmed.ok:
                    verdict = dataclasses.replace(
                        verdict, findings=verdict.findings + confirmed.findings[-1:]
                    )
    if args.json:
        print(json.dumps(_report(verdict, tried), indent=2))
    else:
        _print(task.name, verdict, len(tried))
    return 0 if verdict.ok else 1


def _change(args: argparse.Namespace) -> int:
    """Verifies a change of the tables of tile sizes."""
    import torch

    from foveal.search.verify.sizes import check_change, check_compiled
    from foveal.tuning import tile
    from foveal.tuning.proposal import Change
    from foveal.tuning.tables import FLOAT32

    change = Change.parse(args.file)
    dtype = torch.float32 if change.kind == FLOAT32 else torch.bfloat16
    kept = tile.shipped(change.stage, change.architecture, change.size, dtype, change.pattern)
    with Progress("verify") as progress:
        progress(f"compiling for {change.architecture}", 0.0)
        found = [check_compiled(change)]
        if not found[0].wrong:
            found += check_change(change, args.device, progress)
    ok = all(not each.wrong for each in found)
    if args.json:
        report = {
            "ok": ok,
            "change": str(change),
            "shipped": str(kept),
            "findings": [dataclasses.asdict(each) for each in found],
        }
        print(json.dumps(report, indent=2))
        return 0 if ok else 1
    rows = [
        (each.pattern, "FAILED" if each.wrong else "passed", f"{each.seconds:.1f} s", each.problem)
        for each in found
    ]
    print(table(("what", "", "took", "problem"), rows))
    print()
    print(field("change", str(change)))
    print(field("shipped", str(kept)))
    where = "Triton's interpreter" if args.device == "cpu" else f"{args.device}, compiled"
    print(field("ran in", f"{where}: output, lse and gradients beside float64"))
    for each in found:
        if each.wrong:
            print(f"{each.problem}: {each.wrong}", file=sys.stderr)
    return 0 if ok else 1


def _print(name: str, verdict: Verdict, tried: int) -> None:
    from foveal.bench.measure import summarise
    from foveal.search.verify.judge import ratios

    rows = [
        (each.stage, "passed" if each.ok else "FAILED", f"{each.seconds:.2f} s", each.reason)
        for each in verdict.findings
    ]
    print(table(("stage", "", "took", "what was found"), rows))
    print()
    print(field("task", f"{name}: {tried} do-nothing results were tried on it and all fail"))
    print(field("confined", ", ".join(verdict.layers) or "nothing was started"))
    for case, samples in verdict.samples.items():
        found = summarise(ratios(samples))
        print(
            field(
                "speed",
                f"{case}: {found.median:.2f} times the reference "
                f"({found.low:.2f} to {found.high:.2f}, {found.count} rounds)",
            )
        )
    if not verdict.ok:
        print(f"rejected at stage {verdict.stage}: {verdict.reason}", file=sys.stderr)


def _report(verdict: Verdict, tried: list[str]) -> dict[str, Any]:
    return {
        "ok": verdict.ok,
        "stage": verdict.stage,
        "reason": verdict.reason,
        "findings": [dataclasses.asdict(each) for each in verdict.findings],
        "samples": dict(verdict.samples),
        "facts": dict(verdict.facts),
        "layers": list(verdict.layers),
        "do_nothing": tried,
    }
