"""`foveal bench`: measure a suite or a system against its peers, or compare two runs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveal._errors import FovealError, MissingDependencyError
from foveal.cli import _arguments as arguments
from foveal.cli._progress import Progress

if TYPE_CHECKING:
    from foveal.bench.cases import Suite
    from foveal.bench.compare import Change
    from foveal.bench.record import Record
    from foveal.bench.requirements import Judgement
    from foveal.bench.run import Job

RESULTS = Path("bench-results")
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_INTERRUPTED = 130


def add_parser(subparsers: Any) -> None:
    """Adds `bench` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="measure time and memory against peers",
        description="Time and memory of a suite or a system of the catalogue, against its peers. "
        "Every competitor must first agree with the float64 reference; what does not is never timed.",
        epilog="Exit status: 0; 1 when a gate is red, a requirement is missed or --compare finds a "
        f"slowdown; 2 for bad usage. Results are kept in {RESULTS}/ and survive an interruption.",
    )
    parser.add_argument("name", nargs="?", help="a suite or a system of the catalogue")
    parser.add_argument("--suite", help="a suite: cpu, demo, masks, smoke (default), sparse")
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help="only cases with TEXT in their name; TEXT,TEXT for methods of the sparse suite",
    )
    parser.add_argument(
        "--lengths",
        type=arguments.lengths,
        metavar="A,B",
        help="tokens of the masks suite; default: 1024 to 49152 on cuda, 512 and 1024 on cpu; of "
        "the sparse suite; default: 8192 and 4096",
    )
    parser.add_argument(
        "--max-tokens",
        type=arguments.positive,
        metavar="N",
        help="leave longer cases of the masks and sparse suites out",
    )
    parser.add_argument("--model", help="that the sparse suite reads with; default: gemma3-270m")
    parser.add_argument(
        "--parts",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="texts per length of the sparse suite, the planted fact at another depth in each (1)",
    )
    parser.add_argument(
        "--selector",
        action="append",
        metavar="FILE.py:NAME",
        help="a selector of your own, measured beside the others by the sparse suite",
    )
    parser.add_argument(
        "--tasks", metavar="A,B", help="of the sparse suite: quality, agreement, speed (all)"
    )
    parser.add_argument(
        "--against", metavar="A,B", help="peers by name, or none; default: the suite's"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=_DTYPES, help="instead of the precision of the cases")
    parser.add_argument(
        "--threads",
        type=arguments.positive,
        metavar="N",
        help="CPU threads; default: PyTorch's choice",
    )
    parser.add_argument("--passes", choices=("forward", "both"), default="both")
    parser.add_argument(
        "--budget", type=arguments.seconds, metavar="S", help="seconds of timing per case"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {RESULTS}/NAME-TIME")
    parser.add_argument("--resume", action="store_true", help="continue --out, or the newest run")
    parser.add_argument("--html", type=Path, metavar="FILE", help="default: report.html in --out")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--render", type=Path, metavar="RUN", help="print and render an old run again"
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="mark what moved beyond noise"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    if args.compare:
        return _compare(args.compare[0], args.compare[1], args.json)
    if args.render and "sparse" in (args.suite, args.name):
        from foveal.bench.selection.command import render

        return render(args, _records_path(args.render))
    if args.render:
        return _render(args)
    if "sparse" in (args.suite, args.name):
        return _sparse(args)
    return _measure(args)


class _UsageError(FovealError):
    """Options that do not fit together."""


def _measure(args: argparse.Namespace) -> int:
    import torch

    from foveal.bench.record import RecordFile
    from foveal.bench.report import judge, terminal, terminal_judgements

    if args.threads:
        torch.set_num_threads(args.threads)
    suite = _suite(args)
    folder = _folder(args, suite.name)
    file = RecordFile(folder / "records.jsonl")
    job = _job(args, suite, file)
    _warn_if_busy()
    interrupted = False
    try:
        with Progress(f"bench {suite.name}") as progress:
            for records in job.run(progress):
                progress.clear()
                if not args.json:
                    print(terminal(records, _room()), end="\n\n", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    keys = {case.key(job.device, torch.get_num_threads()) for case in job.cases}
    records = [record for record in file.read() if record.key in keys]
    judgements = judge(records, suite.requirements)
    if args.json:
        print(json.dumps(_as_json(records, judgements)))
    elif judgements:
        print(terminal_judgements(judgements, _room()), end="\n\n")
    if records:
        _write_html(records, judgements, args.html or folder / "report.html", suite)
    if interrupted:
        print(
            f"interrupted; {file.path} keeps what was measured, --resume continues it",
            file=sys.stderr,
        )
        return _INTERRUPTED
    return _status(records, judgements)


def _sparse(args: argparse.Namespace) -> int:
    import torch

    from foveal.bench.selection.command import measure

    if args.threads:
        torch.set_num_threads(args.threads)
    return measure(args, _folder(args, "sparse"))


def _room() -> int:
    """Columns of the terminal; all that a table needs where there is none."""
    from foveal.bench.report import WIDE

    return shutil.get_terminal_size((WIDE, 24)).columns


def _warn_if_busy() -> None:
    from foveal.bench.record import load

    busy, cores = load(), os.cpu_count() or 1
    if busy is not None and busy > max(cores / 2, 1):
        print(
            f"the machine is busy (load {busy:g} on {cores} cores): threads that wait for each "
            "other make such timings useless",
            file=sys.stderr,
        )


def _render(args: argparse.Namespace) -> int:
    from foveal.bench.cases import CPU
    from foveal.bench.report import judge, terminal, terminal_judgements

    records = _read(args.render)
    judgements = judge(records, CPU.requirements)
    if args.json:
        print(json.dumps(_as_json(records, judgements)))
    else:
        print(terminal(records, _room()), end="\n\n")
        if judgements:
            print(terminal_judgements(judgements, _room()), end="\n\n")
    _write_html(
        records, judgements, args.html or _records_path(args.render).with_name("report.html")
    )
    return _status(records, judgements)


def _compare(old: Path, new: Path, as_json: bool) -> int:
    from foveal.bench.compare import SLOWER, compare, other_machine

    before, after = _read(old), _read(new)
    changes = compare(before, after)
    if as_json:
        print(json.dumps([change.as_dict() for change in changes]))
    else:
        print(_changes_table(changes))
    if warning := other_machine(before, after):
        print(warning, file=sys.stderr)
    return int(any(change.verdict == SLOWER for change in changes))


def _changes_table(changes: Sequence[Change]) -> str:
    from foveal.bench.report import aligned, milliseconds

    header = ("case", "competitor", "pass", "old", "new", "new/old", "p", "verdict")
    rows = [
        (
            change.case,
            change.competitor,
            change.part,
            milliseconds(change.old),
            milliseconds(change.new),
            f"{change.factor:.2f}x",
            f"{change.p_value:.1g}",
            change.verdict,
        )
        for change in changes
    ]
    return aligned([header, *rows], left=3) if rows else "the two runs have no case in common"


def _suite(args: argparse.Namespace) -> Suite:
    from foveal.bench.cases import SUITES, suite, system_suite

    name = args.suite or args.name or "smoke"
    if args.suite and args.name:
        raise _UsageError(
            f"name: got {args.name!r} and --suite {args.suite}; one of the two is needed"
        )
    from foveal.bench.masks import masks_suite

    device = arguments.usable_device(args.device)
    if name == "masks":
        return masks_suite(device, args.lengths, args.max_tokens)
    if args.lengths or args.max_tokens:
        raise _UsageError(f"--lengths and --max-tokens: got suite {name!r}; only masks has lengths")
    if args.suite or name in {each.name for each in SUITES}:
        return suite(name)
    from foveal.systems import system

    return system_suite(system(name), device)


def _job(args: argparse.Namespace, suite: Suite, file: Any) -> Job:
    import torch

    from foveal.bench.baselines import baselines
    from foveal.bench.cases import with_dtype
    from foveal.bench.record import command_line
    from foveal.bench.run import Job

    device = arguments.usable_device(args.device)
    names = suite.against
    if args.against:
        names = () if args.against == "none" else tuple(args.against.split(","))
    cases = tuple(case for case in suite.cases if (args.only or "") in case.name)
    if not cases:
        raise _UsageError(
            f"--only: got {args.only!r}; the cases are {[c.name for c in suite.cases]}"
        )
    cases = with_dtype(cases, getattr(torch, args.dtype) if args.dtype else None)
    if args.passes == "forward":
        cases = tuple(replace(case, backward=False) for case in cases)
    budget = replace(suite.budget, seconds=args.budget) if args.budget else suite.budget
    return Job(
        cases,
        baselines(names),
        device,
        file,
        budget,
        command_line(),
        implementations=suite.implementations,
    )


def _folder(args: argparse.Namespace, name: str) -> Path:
    if args.resume:
        runs = [args.out] if args.out else sorted(RESULTS.glob(f"{name}-*"))
        if not runs:
            raise _UsageError(
                f"--resume: got no run of {name} in {RESULTS}/; one is needed to continue it"
            )
        return Path(runs[-1])
    folder: Path = args.out or RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "records.jsonl").exists():
        raise _UsageError(f"--out: got {folder}, which holds a run; --resume continues it")
    return folder


def _read(path: Path) -> list[Record]:
    from foveal.bench.record import RecordFile

    records = RecordFile(_records_path(path)).read()
    if not records:
        raise _UsageError(f"{path}: got no records; a run folder or a records.jsonl is needed")
    return records


def _records_path(path: Path) -> Path:
    return path / "records.jsonl" if path.is_dir() else path


def _write_html(
    records: Sequence[Record],
    judgements: Sequence[Judgement],
    path: Path,
    suite: Suite | None = None,
) -> None:
    from foveal.bench.report import html

    title = f"foveal benchmark: {suite.name}" if suite else "foveal benchmark"
    try:
        print(f"report: {html(records, judgements, title).write(path)}", file=sys.stderr)
    except MissingDependencyError as error:
        print(f"no HTML report: {error}", file=sys.stderr)


def _as_json(records: Sequence[Record], judgements: Sequence[Judgement]) -> dict[str, Any]:
    return {
        "records": [asdict(record) for record in records],
        "requirements": [asdict(judgement) for judgement in judgements],
    }


def _status(records: Sequence[Record], judgements: Sequence[Judgement]) -> int:
    from foveal.bench.record import FAILED, WRONG
    from foveal.bench.requirements import OURS

    red = any(
        record.status == WRONG or (record.status == FAILED and record.competitor == OURS)
        for record in records
    )
    return int(red or any(judgement.met is False for judgement in judgements))
