"""`foveal tune`: measures tile sizes on this device and keeps the best."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from foveal.cli._arguments import seconds, usable_device
from foveal.cli._progress import Progress
from foveal.cli._text import field, table

if TYPE_CHECKING:
    import torch

    from foveal.tuning.search import Outcome

_INTERRUPTED = 130


def add_parser(subparsers: Any) -> None:
    """Adds `tune` to the command line."""
    parser = subparsers.add_parser(
        "tune",
        help="measure tile sizes on this device and keep the best",
        description="Times the portable GPU kernels with other tile sizes than the shipped ones, checks "
        "each against float64, and keeps what is faster for later calls on this kind of device. Never "
        "needed: calls do not tune.",
        epilog="Results are stored after every measurement in $FOVEAL_CACHE_DIR/tuning, else "
        "$XDG_CACHE_HOME/foveal/tuning, else ~/.cache/foveal/tuning, one file per device; a search that "
        "was cut short goes on where it stopped. Delete the file to return to the shipped sizes. "
        "Exit status: 0; 2 for bad usage; 130 when interrupted.",
    )
    parser.add_argument("--device", default="cuda", help="such as cuda:1 (default: cuda)")
    parser.add_argument(
        "--budget",
        type=seconds,
        default=300.0,
        metavar="T",
        help="such as 90s, 5m, 1h (default: 5m)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    from foveal.bench.device_timer import DeviceTimer
    from foveal.tuning import tile
    from foveal.tuning.search import refine

    device = _device(args.device)
    store = tile.store(device)
    timer = DeviceTimer(device)
    try:
        with Progress("tune") as progress:
            outcomes = refine(store, tile.architecture(device), timer, args.budget, progress)
    except KeyboardInterrupt:
        print(
            f"interrupted; what was measured is in {store.path}, and the next run goes on behind it",
            file=sys.stderr,
        )
        return _INTERRUPTED
    tile.forget_tuned()
    if args.json:
        print(json.dumps(_report(str(store.path), store.device, outcomes), indent=2))
        return 0
    print(_text(outcomes))
    print(field("stored in", str(store.path)))
    if any(outcome.chosen is None for outcome in outcomes):
        print(field("left", "some kernels are not finished; another run goes on with them"))
    return 0


def _device(name: str) -> torch.device:
    import torch

    from foveal._errors import DeviceError

    device = usable_device(name)
    if device.type != "cuda":
        raise DeviceError("device", repr(name), "a CUDA device is needed: nothing else is tuned")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _text(outcomes: list[Outcome]) -> str:
    rows = []
    for outcome in outcomes:
        timed = outcome.seconds < float("inf")
        gain = f"{outcome.shipped_seconds / outcome.seconds:.2f}x" if timed else "none runs"
        chosen = str(outcome.chosen or f"{outcome.tried} of {outcome.candidates} tried")
        milliseconds = f"{outcome.seconds * 1e3:.3f}"
        rows.append((outcome.kernel, str(outcome.shipped), chosen, milliseconds, gain))
    return table(("kernel", "shipped", "chosen", "ms", "gain"), rows)


def _report(path: str, device: str, outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "device": device,
        "path": path,
        "kernels": [
            {
                "kernel": outcome.kernel,
                "shipped": str(outcome.shipped),
                "chosen": None if outcome.chosen is None else str(outcome.chosen),
                "milliseconds": _milliseconds(outcome.seconds),
                "shipped_milliseconds": _milliseconds(outcome.shipped_seconds),
                "tried": outcome.tried,
                "candidates": outcome.candidates,
            }
            for outcome in outcomes
        ],
    }


def _milliseconds(seconds: float) -> float | None:
    return seconds * 1e3 if seconds < float("inf") else None
