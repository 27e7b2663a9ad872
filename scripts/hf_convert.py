"""Other attention in a real model: losses of held-out text and the curves of `fv.hf.convert`.

python scripts/hf_convert.py --kind gated_swa,kda --out conversions.jsonl --report conversions.html
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from foveal import hf
from foveal.bench.record import command_line, environment
from foveal.eval import report
from foveal.eval.run import Lines
from foveal.eval.subject import Subject, load

KINDS = ("gated_swa", "mla", "kda", "lightning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--kind", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--layers", default="full", help='"full", "all", or numbers such as 5,11')
    parser.add_argument("--window", type=int, default=128, help="of gated_swa")
    parser.add_argument("--rows", type=int, default=9, help="rows of text, one held out")
    parser.add_argument("--length", type=int, default=384, help="tokens per row")
    parser.add_argument("--batch", type=int, default=2, help="rows per step of a layer")
    parser.add_argument("--layer-steps", type=int, default=160)
    parser.add_argument("--logit-steps", type=int, default=16)
    parser.add_argument("--layer-rate", type=float, default=1e-3)
    parser.add_argument("--logit-rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default="conversions.jsonl", help="kinds it has are not run again")
    parser.add_argument("--report", metavar="FILE", help="also write a page of HTML")
    args = parser.parse_args()
    lines, done = Lines(args.out), Lines(args.out).read(args.model)
    kinds = args.kind.split(",")
    missing = [kind for kind in kinds if _key(kind, args) not in done]
    if missing:
        subject = load(args.model, None, args.device, torch.float32)
        facts = environment(torch.device(args.device))
        facts = {name: value for name, value in facts.items() if name != "ceilings"}
    for kind in missing:
        line = _converted(subject, kind, args) | {"environment": facts}
        lines.append(line)
        done[line["key"]] = line
        said = {name: round(line["values"][name], 4) for name in report.STAGES}
        print(kind, said, f"{line['seconds']:.0f} s", flush=True)
    if args.report:
        found = [done[_key(kind, args)] for kind in kinds]
        shown = [(name, str(value)) for name, value in found[0]["environment"].items()]
        report.build(found, [("command", found[0]["command"]), *shown]).write(args.report)


def _key(kind: str, args: argparse.Namespace) -> str:
    names = (
        "layers",
        "window",
        "rows",
        "length",
        "batch",
        "layer_steps",
        "logit_steps",
        "layer_rate",
        "logit_rate",
    )
    return f"conversion|{kind}|" + "|".join(str(getattr(args, name)) for name in (*names, "seed"))


def _converted(subject: Subject, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """One conversion as a line; the model is as before behind."""
    # Rows from all over the text; the last, which is held out, from its end.
    room = len(subject.text) - args.length
    starts = [room * row // (args.rows - 1) for row in range(args.rows)]
    first = torch.tensor(subject.first, dtype=torch.int64)
    rows = [torch.cat([first, subject.text[at : at + args.length - len(first)]]) for at in starts]
    layers = args.layers if args.layers in ("full", "all") else _numbers(args.layers)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    done = hf.convert(
        subject.model,
        kind,
        data=torch.stack(rows).to(subject.device),
        layers=layers,
        schedule=hf.Schedule(
            layer_steps=args.layer_steps,
            logit_steps=args.logit_steps,
            rows=args.batch,
            layer_rate=args.layer_rate,
            logit_rate=args.logit_rate,
        ),
        **({"window": args.window} if kind == "gated_swa" else {}),
        progress=lambda text, share: print(f"{kind}: {text}, {share:.0%}", file=sys.stderr),
    )
    hf.restore(subject.model)
    return {
        "key": _key(kind, args),
        "subject": args.model,
        "task": "conversion",
        "variant": kind,
        "length": args.length,
        "rows": args.rows - 1,
        "status": "measured",
        "seconds": time.perf_counter() - start,
        "command": command_line(),
        "values": json.loads(json.dumps(done.as_dict(), default=str)),
    }


def _numbers(text: str) -> list[int]:
    return [int(piece) for piece in text.split(",")]


if __name__ == "__main__":
    main()
