"""What the timed suites call on a GPU, with their real shapes, for a process with an absent one."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveal as fv

ROOT = Path(__file__).resolve().parents[2]
Step = tuple[str, Callable[[], object]]
BF16 = torch.bfloat16


def start() -> None:
    """In a new process, before Triton is imported."""
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"  # Triton 3.9 warns where it is not set
    torch.set_num_threads(1)


def _script(name: str) -> Any:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _both(run: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], object]:
    """Forward and backward."""
    own = [x.requires_grad_() for x in leaves]

    def call() -> object:
        o = run(*own)
        return torch.autograd.grad(o, own, torch.empty_like(o))

    return call


def _sparse(family: str) -> Iterator[Step]:
    script = _script("gpu_sparse")

    def draw(shape: Any) -> tuple[Tensor, ...]:
        heads = shape.heads, shape.kv_heads, shape.kv_heads
        return tuple(_empty(shape.batch, shape.length, h, script.HEAD_DIM) for h in heads)

    script.Shape.draw = draw
    script._graph = lambda step: step
    shapes, cases = script.FAMILIES[family]
    for shape in shapes:
        for name, call in cases(shape):
            yield f"{shape} {name}", call


def _quality() -> Iterator[Step]:
    """The patterns of every method of the sparse suite, on the heads that its times have."""
    from foveal.bench.selection.methods import METHODS, Call

    length = 16384
    for method in METHODS:
        if method.name == "pyramid_sparse":  # its sizes are those that the drawn tokens have
            continue
        rows = length if method.rows == "all" else 256
        q = _empty(1, rows, 32, 256)
        k, v = (_empty(1, length, 8, 256) for _ in range(2))
        fitted = {0: _empty(8, 256, 256, dtype=torch.float32)} if method.fit else None
        call = Call(0, q, k, method.settings[len(method.settings) // 2], {}, fitted)
        compute, choose = method.compute, method.choose
        if compute is not None:
            yield method.name, lambda call=call, v=v, f=compute: f(call, v)  # type: ignore[misc]
            continue
        for name in (None, "triton"):
            yield f"{method.name}, {name}", _chosen(choose, call, v, name)


def _chosen(choose: Any, call: Any, v: Tensor, implementation: str | None) -> Callable[[], object]:
    def run() -> object:
        return fv.attend(call.q, call.k, v, choose(call), implementation=implementation)

    return run


def _columns() -> Iterator[Step]:
    """Columns and diagonals as they are timed: heads of 128, and those of the model of the sparse suite."""
    from foveal.systems.sparse.prefill import minference

    for length, dim in ((65536, 128), (16384, 256)):
        q, k, v = (_empty(1, length, h, dim) for h in (32, 8, 8))
        yield (
            f"{length}, {dim}",
            lambda q=q, k=k, v=v: minference(  # type: ignore[misc]
                q, k, v, slash=2000, implementation="triton"
            ),
        )


def _estimates() -> Iterator[Step]:
    """Estimates of few bits as they are timed."""
    from foveal.engines.tile.low_bit import largest_estimates

    for length, dim in ((65536, 128), (16384, 256)):
        q, k = (_empty(1, length, h, dim) for h in (32, 8))
        level = _empty(1, length, 32, dtype=torch.float32)
        yield (
            f"{length}, {dim}",
            lambda q=q, k=k, level=level: largest_estimates(q, k, level, 4, 128, 64, 32),  # type: ignore[misc]
        )


def _tiles() -> Iterator[Step]:
    """Lists of blocks per token for groups of 16 heads, in sizes that no suite has."""
    from foveal.engines.tile.listed_tokens import attend_gated, attend_lists, takes_gates
    from foveal.engines.tile.token_lists import TokenLists, block_spans

    sizes = ((128, 128, 64, 16, BF16), (64, 64, 64, 32, torch.float16), (128, 64, 128, 9, BF16))
    for dim, value_dim, block, slots, dtype in sizes:
        shapes = (
            (2, 555, 32, dim),
            (2, 555, 2, dim),
            (2, 555, 2, value_dim),
            (2, 555, 32, value_dim),
        )
        q, k, v, far = (_empty(*shape, dtype=dtype) for shape in shapes)
        indices = _empty(2, 2, 555, slots, dtype=torch.int32)
        spans = block_spans(555, block, torch.device("cuda"))
        lists = TokenLists(indices, *spans, block, True, 0, (1, 2))
        call = (q, k, v, lists, 0.1)
        yield f"{dim}, {value_dim}, {block}", lambda call=call: attend_lists(*call)  # type: ignore[misc]
        if takes_gates(q, k, v, lists):
            gates = _empty(2, 555, 32, 3, dtype=dtype)
            yield f"{dim}, gates", lambda call=(*call, gates, (far, far)): attend_gated(*call)  # type: ignore[misc]


def _masks(implementation: str) -> Iterator[Step]:
    from foveal.bench.masks import MASKS

    for length in (8192, 49152):
        for mask in MASKS if length == 8192 else MASKS[:1]:
            pattern = mask.pattern(length, 8)
            q, k, v = (_empty(1, length, h, 128) for h in (64, 8, 8))

            def run(q: Tensor, k: Tensor, v: Tensor, pattern: fv.Pattern = pattern) -> Tensor:
                return fv.attend(q, k, v, pattern, implementation=implementation)

            yield f"{mask.name} {length}", _both(run, q, k, v)


def _decode() -> Iterator[Step]:
    script = _script("gpu_decode")
    for name, make in script.CASES.items():
        cache = make()
        q = script.queries(len(cache.host_lengths))
        yield name, lambda q=q, cache=cache: fv.decode(q, cache, implementation="triton")  # type: ignore[misc]
    for name, build in script.checks():
        cache, q, score, pattern = build()

        def run(
            q: Any = q, cache: Any = cache, score: Any = score, pattern: Any = pattern
        ) -> object:
            return fv.decode(q, cache, score, pattern=pattern, implementation="triton")

        yield name, run


def _entmax() -> Iterator[Step]:
    script = _script("gpu_entmax")
    for case in (*script.TIMES, *script.CHECKS):
        if case.cut is not None:
            continue
        values = case.dim if case.value_dim is None else case.value_dim
        heads = (case.heads, case.dim), (case.kv_heads, case.dim), (case.kv_heads, values)
        q, k, v = (_empty(1, case.length, h, d, dtype=case.dtype) for h, d in heads)

        def run(q: Tensor, k: Tensor, v: Tensor, case: Any = case) -> Tensor:
            found: Tensor = case.attend(q, k, v, "triton")
            return found

        yield str(case), _both(run, q, k, v)


GROUPS: dict[str, Callable[[], Iterator[Step]]] = {
    "columns": _columns,
    "estimates": _estimates,
    "prefill": lambda: _sparse("prefill"),
    "native": lambda: _sparse("nsa"),
    "tiles": _tiles,
    "pages": lambda: _sparse("decode"),
    "quality": _quality,
    "masks, hopper": lambda: _masks("hopper"),
    "masks, triton": lambda: _masks("triton"),
    "decode": _decode,
    "entmax": _entmax,
}


def outcome(group: str, device: str, compiles: bool = True) -> tuple[set[str], int, list[str]]:
    """Kernels that a group launches, how many compiled ones they are, and what went wrong."""
    from tests.engines.absent import DEVICES, absent, failures

    wrong: list[str] = []
    with absent(DEVICES[device]) as found:
        for name, call in GROUPS[group]():
            before = len(found)
            try:
                call()
            except fv.errors.RefusedError:
                continue
            if len(found) == before:
                wrong.append(f"{name}: no kernel of ours")
    count, failed = failures(found if compiles else [], DEVICES[device])
    return {call.name for call in found}, count, wrong + failed
