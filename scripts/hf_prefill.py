"""Time to the first token of a model with its own attention and with `fv.hf.use(model, "dense")`.

python scripts/hf_prefill.py --model gemma3-270m --length 2048,8192 --threads 2 --out prefill.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

from foveal import hf
from foveal.bench.record import command_line, environment
from foveal.eval.subject import Subject, load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--length", default="2048", help="tokens, such as 2048,8192")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="append one JSON line per length")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subject = load(args.model, None, "cpu", torch.float32)
    facts = environment(torch.device("cpu"))
    _read(subject, 64)
    for length in map(int, args.length.split(",")):
        own, theirs = _read(subject, length)
        with hf.using(subject.model):
            ours, found = _read(subject, length)
        line = {
            "command": command_line(),
            "model": args.model,
            "length": length,
            "own": own,
            "foveal": ours,
            "speedup": own["seconds"] / ours["seconds"],
            "largest_difference": float((found - theirs).abs().max()),
            "same_next_token": bool(found.argmax() == theirs.argmax()),
            "environment": facts,
        }
        print({name: value for name, value in line.items() if name != "environment"}, flush=True)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _read(subject: Subject, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Seconds by the wall clock and of all processors, and the logits of the next token."""
    tokens = subject.ids(subject.text[:length])
    wall, busy = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        logits = subject.model(tokens, logits_to_keep=1, use_cache=True).logits[0, -1]
    seconds = {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - busy,
    }
    return seconds, logits.float()


if __name__ == "__main__":
    main()
