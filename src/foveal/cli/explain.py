"""`foveal explain`: what a call would run, visit and cost, without computing it."""

from __future__ import annotations

import argparse
import itertools
import json
from typing import TYPE_CHECKING, Any

from foveal._errors import DeviceError, PatternError, UnknownNameError
from foveal.cli import _arguments as arguments
from foveal.cli._text import field, grid_text

if TYPE_CHECKING:
    from torch import Tensor

    from foveal.patterns.base import Pattern
    from foveal.scores.base import Score

_DTYPES = ("float64", "float32", "bfloat16", "float16")


def add_parser(subparsers: Any) -> None:
    """Adds `explain` to the command line."""
    parser = subparsers.add_parser(
        "explain",
        help="what a call would run, visit and cost",
        description="The plan of one call: which implementation runs and why the others refuse, "
        "tiles visited, FLOPs, bytes, and the time that this device needs at least. Nothing is "
        "computed and no tensor is allocated.",
        epilog="Examples: foveal explain gna --grid 96x96;  foveal explain 'Sliding(512)' --grid "
        "16384;  foveal explain 'Neighborhood(window=13, dilation=2) & Causal()' --grid 64x64",
    )
    parser.add_argument(
        "what", metavar="NAME|PATTERN", help="a system of the catalogue, or a pattern as in Python"
    )
    parser.add_argument(
        "--grid",
        type=arguments.grid,
        metavar="G",
        help="tokens per axis, such as 96x96 or 16384 (default: those of the paper, with its options)",
    )
    parser.add_argument(
        "--kv-grid", type=arguments.grid, metavar="G", help="of the keys (default: --grid)"
    )
    parser.add_argument("--batch", type=arguments.positive, default=1, help="default: 1")
    parser.add_argument("--heads", type=arguments.positive, help="query heads (default: 4)")
    parser.add_argument("--kv-heads", type=arguments.positive, help="default: as many as --heads")
    parser.add_argument("--head-dim", type=arguments.positive, help="default: 64")
    parser.add_argument("--value-dim", type=arguments.positive, help="default: --head-dim")
    parser.add_argument("--dtype", choices=_DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--score", metavar="S", help="such as 'Softmax(soft_cap=30.0)' (default: Softmax())"
    )
    parser.add_argument(
        "--documents",
        type=arguments.lengths,
        metavar="A,B",
        help="lengths of the documents packed in the sequence",
    )
    parser.add_argument("--return-lse", action="store_true", help="the call asks for lse too")
    parser.add_argument("--implementation", metavar="I", help="name it instead of asking the plan")
    add_options(parser)
    parser.add_argument(
        "--no-bound", action="store_true", help="do not measure this device for the bound"
    )
    parser.add_argument(
        "--machine",
        metavar="M",
        help="also the best tiles and the time on a device that need not be here: h100, h100-triton",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a system: the common ones by name, any by --set."""
    for name in ("window", "stride", "dilation"):
        parser.add_argument(
            f"--{name}",
            type=arguments.option_value,
            metavar="N",
            help=f"the {name} of a system, such as 7 or 7x7",
        )
    parser.add_argument(
        "--set",
        type=arguments.option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of a system; `foveal show NAME` lists them",
    )


def chosen_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_options` collected."""
    named = {name: getattr(args, name) for name in ("window", "stride", "dilation")}
    return {name: value for name, value in named.items() if value is not None} | dict(args.set)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    import foveal
    from foveal.patterns.base import Extent
    from foveal.probe.ceilings import ceilings
    from foveal.probe.tiles import advice, machine, report

    options = chosen_options(args)
    if arguments.reads_as_pattern(args.what):
        shape = _Shape(args, {})
        pattern: Pattern = arguments.pattern(args.what)
        score: Score = foveal.Softmax()
        if options:
            name, value = next(iter(options.items()))
            raise PatternError(name, value, "a pattern expression carries its own options")
    else:
        system = find(args.what)
        paper = system.reference_shapes[0]
        shape = _Shape(args, paper)
        of_paper = {} if args.grid else dict(paper.get("options", {}))
        options = of_paper | check_options(system, options)
        if system.compose is None:
            return _found(args, system, shape, options)
        pattern = system.pattern(shape.kv_grid, **options)
        score = system.score(shape.kv_grid, **options)
    if args.score:
        score = arguments.score(args.score)
    q, k, v = shape.tensors()
    explanation = foveal.explain(
        q,
        k,
        v,
        pattern,
        score,
        cu_seqlens=_offsets(args.documents),
        return_lse=args.return_lse,
        implementation=args.implementation,
        ceilings=None if args.no_bound else ceilings(args.device, q.dtype),
    )
    extent = Extent(shape.q_grid, shape.kv_grid)
    sentences = advice(pattern, extent)
    simulated: list[str] = []
    if args.machine:
        sizes = {"heads": q.shape[-2], "head_dim": q.shape[-1], "batch": q.shape[0]}
        lines = report(pattern, extent, **sizes, on=machine(args.machine)).splitlines()
        simulated = [line for line in lines if line not in sentences]
    if args.json:
        about = {"problem": shape.as_dict()} | explanation.as_dict()
        told = {"advice": list(sentences)} | ({"simulated": simulated} if simulated else {})
        print(json.dumps(about | told, indent=2))
        return 0
    print(field("problem", str(shape)))
    for line in str(explanation).splitlines():
        print(field(line[:10].rstrip(), line[11:]))
    for line in simulated:
        print(field("simulated", line))
    for sentence in sentences:
        print(field("advice", f"on GPU tiles of 128 x 128, {sentence}"))
    return 0


def _found(args: argparse.Namespace, system: Any, shape: _Shape, options: dict[str, Any]) -> int:
    """What can be told of a system that finds its pairs, if any, in its input."""
    from foveal.cli._found_pairs import explain_found
    from foveal.probe.ceilings import ceilings

    for name in ("score", "documents", "implementation", "machine", "kv_grid"):
        if getattr(args, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise PatternError(flag, getattr(args, name), f"{system.name} is told by a shape alone")
    q = shape.tensors()[0]
    measured = None if args.no_bound else ceilings(args.device, q.dtype)
    found = explain_found(system, shape, options, measured, q.element_size())
    if args.json:
        print(json.dumps({"problem": shape.as_dict()} | found.as_dict(), indent=2))
        return 0
    print(field("problem", str(shape)))
    for title, text in found.lines():
        print(field(title, text))
    return 0


def find(name: str) -> Any:
    """The system of that name; the error also lists the pattern classes."""
    from foveal.systems import systems

    entries = {entry.name: entry for entry in systems()}
    if name not in entries:
        known = (*entries, *arguments.PATTERNS)
        raise UnknownNameError("system or pattern", name, known)
    return entries[name]


def check_options(system: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, when the system knows all of them and can take their values."""
    system.check(**options)
    return options


def _offsets(documents: tuple[int, ...] | None) -> Tensor | None:
    import torch

    if documents is None:
        return None
    return torch.tensor([*itertools.accumulate(documents, initial=0)], dtype=torch.int32)


class _Shape:
    """Sizes of the call: what the user named, else those of the paper, else small ones."""

    def __init__(self, args: argparse.Namespace, paper: Any) -> None:
        self.batch: int = args.batch
        self.q_grid: tuple[int, ...] = args.grid or tuple(paper.get("grid", (4096,)))
        self.kv_grid: tuple[int, ...] = args.kv_grid or self.q_grid
        self.heads: int = args.heads or paper.get("heads", 4)
        paper_kv = None if args.heads else paper.get("kv_heads")
        self.kv_heads: int = args.kv_heads or paper_kv or self.heads
        self.head_dim: int = args.head_dim or paper.get("head_dim", 64)
        self.value_dim: int = args.value_dim or self.head_dim
        self.dtype: str = args.dtype
        self.device: str = args.device

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of these sizes that hold one element each."""
        import torch

        try:
            element = torch.zeros((), dtype=getattr(torch, self.dtype), device=self.device)
        except (RuntimeError, AssertionError):
            raise DeviceError(
                "--device", self.device, "a device that PyTorch can use here is needed"
            ) from None
        return (
            element.expand(self.batch, *self.q_grid, self.heads, self.head_dim),
            element.expand(self.batch, *self.kv_grid, self.kv_heads, self.head_dim),
            element.expand(self.batch, *self.kv_grid, self.kv_heads, self.value_dim),
        )

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        keys = "" if self.kv_grid == self.q_grid else f" on {grid_text(self.kv_grid)} keys"
        shared = "" if self.kv_heads == self.heads else f" on {self.kv_heads} key heads"
        dims = f"{self.head_dim}"
        if self.value_dim != self.head_dim:
            dims += f" (values {self.value_dim})"
        return (
            f"{grid_text(self.q_grid)} queries{keys}, batch {self.batch}, {self.heads} heads{shared} "
            f"of {dims}, {self.dtype} on {self.device}"
        )
