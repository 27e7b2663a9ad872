"""`foveal doctor`: this machine, the versions, what is missing, and a short self test."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from foveal.cli._text import field, fields, table

if TYPE_CHECKING:
    from foveal.patterns.base import Pattern
    from foveal.scores.base import Score

_NAME = re.compile(r"^[A-Za-z0-9._-]+")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def add_parser(subparsers: Any) -> None:
    """Adds `doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="this machine, versions, what is missing and how to get it",
        description="Device, threads, versions, optional packages with the extra that brings each, "
        "and a self test of about a second: the tiled implementation against float64.",
        epilog="Exit status: 0; 1 when the self test fails; 2 for bad usage.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    facts = machine()
    packages = optional_packages()
    peers = _peers()
    checks, seconds = _self_test()
    failed = [check for check in checks if check.failure]
    if args.json:
        report = {
            "machine": facts,
            "packages": [asdict(package) for package in packages],
            "peers": peers,
            "self_test": {"seconds": seconds, "checks": [asdict(check) for check in checks]},
        }
        print(json.dumps(report, indent=2))
        return int(bool(failed))
    print(fields(facts.items()), end="\n\n")
    if packages:
        rows = [(p.name, p.installed or "missing", ", ".join(p.extras)) for p in packages]
        print(table(("package", "version", "extra"), rows), end="\n\n")
    for sentence in _advice(packages):
        print(sentence)
    missing = [f"{name}: {reason}" for name, reason in peers.items() if reason]
    for sentence in missing:
        print(field("peer", sentence))
    print()
    for check in failed:
        print(field("FAILED", f"{check.name}: {check.failure}"))
    passed = len(checks) - len(failed)
    print(f"self test: {passed} of {len(checks)} passed in {seconds:.1f} s")
    return int(bool(failed))


def machine() -> dict[str, str]:
    """What there is to compute with, by name."""
    import torch

    import foveal

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "foveal": foveal.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton") or "none (foveal runs without it)",
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()} used by PyTorch, {cores} cores to use",
        "memory": _memory(),
        "cuda": _cuda(),
        "tuning": _tuning(),
    }


@dataclass(frozen=True)
class Package:
    """An optional package: its version here, and the extras of foveal that bring it."""

    name: str
    installed: str | None
    extras: tuple[str, ...]


def optional_packages() -> tuple[Package, ...]:
    """Every package that an extra of foveal names, as written in its own metadata.

    Empty where foveal runs from its sources without being installed.
    """
    extras: dict[str, list[str]] = {}
    try:
        requirements = importlib.metadata.requires("foveal") or ()
    except importlib.metadata.PackageNotFoundError:
        return ()
    for requirement in requirements:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name and extra and name[0] != "foveal":
            extras.setdefault(name[0], []).append(extra[1])
    return tuple(
        Package(name, _version(name), tuple(dict.fromkeys(brought)))
        for name, brought in extras.items()
    )


def _advice(packages: tuple[Package, ...]) -> list[str]:
    sizes = Counter(extra for package in packages for extra in package.extras)
    missing: dict[str, list[str]] = {}
    for package in packages:
        if package.installed is None:
            smallest = min(package.extras, key=lambda extra: sizes[extra])
            missing.setdefault(smallest, []).append(package.name)
    if not packages:
        return [
            field("missing", "foveal is not installed, it runs from its sources: pip install -e .")
        ]
    if not missing:
        return ["nothing is missing"]
    return [
        field("missing", f"{', '.join(names)}: pip install 'foveal[{extra}]'")
        for extra, names in missing.items()
    ]


def _peers() -> dict[str, str | None]:
    """Competitors of `foveal bench` by name, with the reason why one cannot run here."""
    from foveal.bench.baselines import BASELINES

    return {peer.name: peer.absent() for peer in BASELINES}


@dataclass(frozen=True)
class Check:
    """One problem of the self test, and what went wrong."""

    name: str
    failure: str | None


def _self_test() -> tuple[list[Check], float]:
    """Outputs, lse and gradients of the tiled implementation against float64."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The problems are small: more threads only wait for each other.
    start = time.perf_counter()
    try:
        checks = [_checked(*problem) for problem in _problems()]
    finally:
        torch.set_num_threads(threads)
    return checks, time.perf_counter() - start


def _problems() -> list[tuple[tuple[int, ...], Pattern, Score]]:
    import torch

    import foveal as fv

    table = torch.linspace(-1, 1, 2 * 9).view(2, 9)
    plain = fv.Softmax()
    return [
        ((96,), fv.Dense(), plain),
        ((97,), fv.Causal(), plain),
        ((113,), fv.Sliding(20, sink_tokens=3), fv.Softmax(soft_cap=5.0)),
        ((64,), fv.Strided(8) | fv.Sliding(8), plain),
        ((33,), fv.Neighborhood(5), plain + fv.RelativeBias(table)),
        ((12, 13), fv.Neighborhood((5, 4), dilation=(2, 1)), plain),
        ((4, 6, 8), fv.Neighborhood(3, causal=(True, False, False)), plain),
    ]


def _checked(grid: tuple[int, ...], pattern: Pattern, score: Score) -> Check:
    import torch

    from foveal.testing import Sizes, check_attend, qkv

    q, k, v = qkv(Sizes(grid, q_heads=2, head_dim=16), torch.Generator().manual_seed(0))
    failure = None
    try:
        check_attend(q, k, v, pattern, score, implementation="cpu")
    except (AssertionError, RuntimeError) as error:
        failure = str(error)
    shape = "x".join(str(length) for length in grid)
    return Check(f"{pattern.key} on {shape}", failure)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.partition(":")[2] for line in file if line.startswith("model name"))
            return next(names, platform.machine()).strip()
    except OSError:
        return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def _cuda() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "none: this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "none: PyTorch finds no device that it can use"
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
    return (
        f"{torch.cuda.device_count()} x {properties.name}, sm_{properties.major}{properties.minor}, "
        f"{properties.total_memory / 2**30:.0f} GiB, {runtime}, cuDNN {torch.backends.cudnn.version()}"
    )


def _tuning() -> str:
    """Tile sizes measured on this device, and where they are kept."""
    import torch

    from foveal.tuning import tile

    if not torch.cuda.is_available() or _version("triton") is None:
        return "none: tile sizes are measured for CUDA devices only"
    store = tile.store(torch.device("cuda", torch.cuda.current_device()))
    results = store.read()
    chosen = sum(found.config is not None for found in results.values())
    if not results:
        return f"shipped tile sizes; `foveal tune` measures others and keeps them in {store.path}"
    return f"{chosen} of {len(results)} measured kernels have their tile sizes in {store.path}"
