"""`foveal eval`: what a system or a cache policy does to a real model."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from foveal.cli._arguments import pattern, reads_as_pattern, usable_device
from foveal.cli._progress import Progress
from foveal.cli._text import field, table

_INTERRUPTED = 130
_TASKS = ("loss", "needle", "recall", "speed")


def add_parser(subparsers: Any) -> None:
    """Adds `eval` to the command line."""
    parser = subparsers.add_parser(
        "eval",
        help="what a system or a cache policy does to a real model",
        description="Runs a language model with exact attention and with each VARIANT: the loss of long "
        "documents and the distance from exact attention, facts found again, time and cache bytes.",
        epilog="A VARIANT is a cache policy (snapkv), a cache with its old keys on the host "
        "(louis_kv:pages=8,page=32), a system that chooses pairs (gna:window=129), or a pattern "
        "('Sliding(511, sink_tokens=4)'). A name that is both a cache and a system means the cache; "
        "attention=retrieval_attention is the system. Weights of nosa are a function of keys and layer, "
        "nosa:weights=FILE.py:NAME, by default equal. Results are appended to the file of --out; the same "
        "command goes on behind them. Exit status: 0; 2 for bad usage; 130 when interrupted.",
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="what to put into the model")
    parser.add_argument(
        "--model",
        default="gemma3-270m",
        help="gemma3-270m (default, a package), random (tiny), or what transformers loads",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="what it reads (default: Python's documentation)"
    )
    parser.add_argument(
        "--budget",
        type=budgets,
        default=[0.5, 0.25, 0.125],
        metavar="B,B",
        help="of policies: tokens per key head, or shares of the prompt (default: 0.5,0.25,0.125)",
    )
    parser.add_argument(
        "--length", type=counts, default=[2048], metavar="L,L", help="tokens (default: 2048)"
    )
    parser.add_argument(
        "--task", type=tasks, default=list(_TASKS), metavar="T,T", help=f"of {', '.join(_TASKS)}"
    )
    parser.add_argument("--parts", type=int, default=1, help="pieces of the text (default: 1)")
    parser.add_argument(
        "--new-tokens", type=several, default=32, help="written where time is taken (default: 32)"
    )
    parser.add_argument("--device", default="cpu", help="such as cuda (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--out", default="eval.jsonl", help="results (default: eval.jsonl)")
    parser.add_argument("--report", metavar="FILE", help="also write a page of HTML")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def budgets(text: str) -> list[int | float]:
    """`1024,0.25`: tokens or shares."""
    found: list[int | float] = []
    for piece in text.split(","):
        try:
            value: int | float = float(piece) if "." in piece else int(piece)
        except ValueError:
            value = 0
        if value <= 0 or (isinstance(value, float) and value > 1):
            raise argparse.ArgumentTypeError(
                f"got {piece!r}; tokens (1024) or shares of the prompt (0.25) are needed"
            )
        found.append(value)
    return found


def counts(text: str) -> list[int]:
    """`2048,8192`: lengths of at least 128 tokens."""
    pieces = text.split(",")
    if not all(piece.isdecimal() and int(piece) >= 128 for piece in pieces):
        raise argparse.ArgumentTypeError(f"got {text!r}; lengths of at least 128 tokens are needed")
    return [int(piece) for piece in pieces]


def several(text: str) -> int:
    """A number of at least 2."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"got {text!r}; a number of at least 2 is needed")
    return int(text)


def tasks(text: str) -> list[str]:
    """`loss,speed`"""
    pieces = text.split(",")
    if unknown := [piece for piece in pieces if piece not in _TASKS]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]!r}; of {', '.join(_TASKS)}")
    return pieces


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    import torch

    from foveal.bench.record import command_line, environment
    from foveal.eval import report
    from foveal.eval.run import Lines, Plan
    from foveal.eval.run import run as measure
    from foveal.eval.subject import load
    from foveal.eval.tasks import Bench
    from foveal.eval.variants import reads_as_name, variants

    device = usable_device(args.device)
    expressions = [text for text in args.variants if not reads_as_name(text)]
    patterns = {text: pattern(text) for text in expressions if reads_as_pattern(text)}
    chosen = variants(args.variants, args.budget, patterns)
    plan = Plan(chosen, args.task, args.length, parts=args.parts)
    text = None
    if args.text is not None:
        with open(args.text, encoding="utf-8") as file:
            text = file.read()
    with Progress("eval") as progress:
        progress(f"loading {args.model}", 0.0)
        subject = load(args.model, text, args.device, getattr(torch, args.dtype))
        facts = environment(device)
        facts = {name: value for name, value in facts.items() if name != "ceilings"}
        try:
            bench = Bench(subject, new_tokens=args.new_tokens)
            found = measure(bench, plan, Lines(args.out), facts, progress)
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on behind {args.out}", file=sys.stderr)
            return _INTERRUPTED
    if args.report:
        shown = [(name, str(value)) for name, value in facts.items()]
        path = report.build(found, [("command", command_line()), *shown]).write(args.report)
        print(field("report", str(path)), file=sys.stderr)
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0


def _text(found: list[dict[str, Any]]) -> str:
    from foveal.eval import report

    rows = []
    for line in found:
        budget = "" if line["budget"] is None else f"{line['budget']:g}"
        depth = "" if line["depth"] is None else f"{line['depth']:g}"
        values = ", ".join(f"{name} {value:.4g}" for name, value in line["values"].items())
        name = report.named(line["variant"], line["options"])
        front = (line["task"], str(line["length"]), name, budget, depth)
        rows.append((*front, values or line["reason"]))
    return table(("task", "tokens", "variant", "budget", "depth", "values"), rows)
