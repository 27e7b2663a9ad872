"""Checks and times the Triton edition of the state engine on a CUDA device; one line per case.

python scripts/gpu_state.py check [--seconds 90]    against the chunk form in float64, gradients included
python scripts/gpu_state.py time                    forward, backward, first call and decode step
python scripts/gpu_state.py sweep                   forward with other settings

A case that fails is printed with its error and the run goes on.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal.engines.state.reference import scan_in
from foveal.rules.base import Recurrence, Rule
from foveal.testing.bounds import check

DEVICE = "cuda"
Inputs = dict[str, Tensor | None]


def draw(
    source: torch.Generator,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int, int],
    decay: str,
    steep: bool,
) -> Inputs:
    """q, k, v, log_decay, write_gate of sizes (B, L, H, Hv, Dk, Dv); keys of norm 1."""
    batch, length, heads, value_heads, dk, dv = sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    def gates(*shape: int) -> Tensor:
        gate = -torch.rand(shape, generator=source) * 0.1
        if steep:
            gate = torch.where(torch.rand(shape, generator=source) < 0.3, gate * 600, gate * 0)
        return gate

    shapes = {
        "none": None,
        "fixed": (value_heads,),
        "token": (batch, length, value_heads),
        "channel": (batch, length, value_heads, dk),
    }
    shape = shapes[decay]
    return {
        "q": normal(batch, length, heads, dk).to(DEVICE, dtype),
        "k": torch.nn.functional.normalize(normal(batch, length, heads, dk), dim=-1).to(
            DEVICE, dtype
        ),
        "v": normal(batch, length, value_heads, dv).to(DEVICE, dtype),
        "log_decay": None if shape is None else gates(*shape).to(DEVICE),
        "write_gate": torch.rand(batch, length, value_heads, generator=source).to(DEVICE),
    }


def results(
    inputs: Inputs, rule: Rule, initial: Tensor, dtype: torch.dtype | None, implementation: str,
    cu_seqlens: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """o, the final state and all gradients; `dtype` None leaves every tensor as it came."""
    leaves = {
        name: x.to(x.dtype if dtype is None else dtype).detach().requires_grad_()
        for name, x in (inputs | {"initial_state": initial}).items()
        if x is not None
    }
    gates = {n: x for n, x in leaves.items() if n not in "qkv"}
    call = fv.scan if implementation != "plain" else plain_scan
    o, state = call(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        rule,
        **gates,
        return_state=True,
        cu_seqlens=cu_seqlens,
        implementation=implementation,
    )
    source = torch.Generator().manual_seed(3)
    weights = [torch.randn(x.shape, generator=source).to(x) for x in (o, state)]
    gradients = torch.autograd.grad((o, state), list(leaves.values()), weights)
    found = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"o": o, "state": state} | found


def plain_scan(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, *, initial_state: Tensor,
    cu_seqlens: Tensor | None, log_decay: Tensor | None = None, write_gate: Tensor | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence with all arithmetic and the state in the dtype of q."""
    lengths = (q.shape[1],) * len(q)
    if cu_seqlens is not None:
        lengths = tuple(cu_seqlens.diff().tolist())
    flat = (None if x is None or x.dim() == 1 else x.flatten(0, 1) for x in (log_decay, write_gate))
    decay, gate = flat
    decay = log_decay if decay is None else decay
    plain = Recurrence(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), decay, gate, None,
        q.shape[-1] ** -0.5, False, lengths,
    )  # fmt: skip
    o, (state,) = scan_in(q.dtype, rule, plain, (initial_state,))
    return o.unflatten(0, q.shape[:2]), state


PACKED = (0, 1, 1, 64, 130, 321)
CASES = [
    (fv.Delta(), "channel", torch.bfloat16, (1, 321, 2, 4, 128, 128), False, PACKED),
    (fv.Delta(), "token", torch.bfloat16, (1, 321, 2, 4, 128, 128), False, PACKED),
    (fv.Additive(), "fixed", torch.bfloat16, (1, 1100, 2, 2, 128, 128), False, None),
    (fv.Additive(), "token", torch.bfloat16, (1, 1100, 2, 2, 128, 128), True, None),
    (fv.Delta(), "channel", torch.bfloat16, (2, 200, 2, 2, 128, 128), True, None),
    (fv.Delta(), "token", torch.bfloat16, (2, 200, 2, 2, 128, 128), True, None),
    (fv.Additive(), "channel", torch.bfloat16, (2, 200, 2, 2, 128, 128), True, None),
    (fv.Delta(), "channel", torch.float32, (1, 130, 1, 2, 60, 72), True, None),
    (fv.Delta(), "token", torch.float16, (1, 130, 1, 1, 64, 64), False, None),
    (fv.Additive(), "channel", torch.float32, (1, 321, 1, 2, 60, 72), True, PACKED),
    (fv.Delta(), "fixed", torch.bfloat16, (1, 130, 1, 1, 256, 40), False, None),
    (fv.Delta(), "none", torch.bfloat16, (1, 130, 1, 1, 64, 64), False, None),
]


def terms_of_decay(inputs: Inputs, exact: dict[str, Tensor]) -> Tensor:
    """The gradient of a decay sums q dq - k dk over all tokens behind it: their size without signs.

    That of a fixed decay sums those of all tokens.
    """
    terms = sum((inputs[n].double() * exact[f"d{n}"]).abs().sum() for n in "qk")
    decay = inputs["log_decay"]
    return terms * inputs["q"].shape[1] if decay is not None and decay.dim() == 1 else terms


def run_case(number: int) -> str:
    rule, decay, dtype, sizes, steep, packed = CASES[number]
    text = f"{rule.key} {decay} {str(dtype)[6:]} {sizes} {'steep ' if steep else ''}{packed or ''}"
    try:
        source = torch.Generator().manual_seed(number)
        inputs = draw(source, dtype, sizes, decay, steep)
        cu = None if packed is None else torch.tensor(packed, device=DEVICE)
        count = sizes[0] if packed is None else len(packed) - 1
        initial = torch.randn(count, sizes[3], *sizes[4:], generator=source).to(DEVICE)
        exact = results(inputs, rule, initial, torch.float64, "chunk", cu)
        plain = results(inputs, rule, initial, dtype, "plain", cu)
        got = results(inputs, rule, initial, None, "triton", cu)
        terms = {"dlog_decay": terms_of_decay(inputs, exact)}
        verdicts = [check(n, got[n], plain[n], exact[n], terms.get(n)) for n in exact]
        worst = max(v.error / max(v.allowed, 1e-30) for v in verdicts)
        bad = [str(v) for v in verdicts if not v.ok]
        return f"{'ok    ' if not bad else 'FAILED'} {worst:6.2f} {text} {'; '.join(bad)}"
    except Exception as error:
        return f"ERROR  {text} {type(error).__name__}: {str(error)[:300]}"


def checks(seconds: float) -> int:
    """Runs the cases in several processes until the time is over; the number that failed."""
    end = time.monotonic() + seconds
    failed = done = 0
    with multiprocessing.get_context("spawn").Pool(6) as pool:
        waiting = pool.imap_unordered(run_case, range(len(CASES)))
        while done < len(CASES):
            try:
                line = waiting.next(timeout=max(end - time.monotonic(), 0.01))
            except multiprocessing.TimeoutError:
                break
            done += 1
            failed += not line.startswith("ok")
            print(line, flush=True)
        pool.terminate()
    print(f"{done} of {len(CASES)} done, {failed} failed")
    return failed


def milliseconds(run: Callable[[], object], repeats: int = 12) -> float:
    """Median of a call on the device, with a cold cache."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    samples = []
    for _ in range(repeats):
        flush.zero_()
        torch.cuda._sleep(2_000_000)  # the host runs ahead, so that its time does not count
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop))
    return statistics.median(samples)


def timed(name: str, rule: Rule, decay: str, length: int = 32768, heads: int = 16) -> None:
    source = torch.Generator().manual_seed(0)
    inputs = draw(source, torch.bfloat16, (1, length, heads, heads, 128, 128), decay, False)
    leaves = {n: x.requires_grad_() for n, x in inputs.items() if x is not None}
    gates = {n: x for n, x in leaves.items() if n not in "qkv"}

    def forward() -> Tensor:
        o: Tensor = fv.scan(
            leaves["q"], leaves["k"], leaves["v"], rule, **gates, implementation="triton"
        )
        return o

    begun = time.perf_counter()
    o = forward()
    torch.cuda.synchronize()
    first = time.perf_counter() - begun
    do = torch.randn_like(o)
    begun = time.perf_counter()
    torch.autograd.grad(o, list(leaves.values()), do)
    torch.cuda.synchronize()
    first_back = time.perf_counter() - begun
    with torch.no_grad():
        ahead = milliseconds(forward)
    o = forward()
    back = milliseconds(
        lambda: torch.autograd.grad(o, list(leaves.values()), do, retain_graph=True), 6
    )
    print(
        f"{name}: forward {ahead:.3f} ms, backward {back:.3f} ms, first calls {first:.1f} s and "
        f"{first_back:.1f} s",
        flush=True,
    )
    stages(forward)


def decode(rule: Rule, decay: str) -> None:
    """One token of 64 sequences with 32 heads of 128, in a graph, against a copy of the state."""
    source = torch.Generator().manual_seed(0)
    inputs = draw(source, torch.bfloat16, (64, 1, 32, 32, 128, 128), decay, False)
    q, k, v = (inputs.pop(name) for name in "qkv")
    state = torch.randn(64, 32, 128, 128, device=DEVICE)
    copy = torch.empty_like(state)

    def step() -> object:
        return fv.scan_step(q, k, v, rule, state, **inputs, implementation="triton")

    o, after = step()
    exact, expected = fv.scan_step(
        *(x.double() for x in (q, k, v)), rule, state.double(),
        **{n: None if x is None else x.double() for n, x in inputs.items()},
        implementation="reference",
    )  # fmt: skip
    worst = float((after - expected).abs().max()), float((o - exact).abs().max())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    ours, bare = milliseconds(graph.replay), milliseconds(lambda: copy.copy_(state))
    print(
        f"decode {rule.key} {decay}: {ours:.4f} ms, copy {bare:.4f} ms, {bare / ours:.0%} of copy "
        f"bandwidth, errors {worst}",
        flush=True,
    )


def stages(run: Callable[[], object]) -> None:
    """Device time of each kernel of a forward and its backward."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        o = run()
        assert isinstance(o, Tensor)
        o.backward(torch.ones_like(o))
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.device_time_total)[:9]
    print(
        "   ", ", ".join(f"{r.key[:28]} {r.device_time_total / 1e3:.3f}" for r in rows), flush=True
    )


VARIANTS: dict[str, tuple[Rule, str, tuple[dict[str, object], ...]]] = {
    "fixed decay": (
        fv.Additive(),
        "fixed",
        (
            {"v_tile": 64, "walk": {"num_warps": 4, "num_stages": 3}},
            {"v_tile": 128, "walk": {"num_warps": 8, "num_stages": 3}},
        ),
    ),
    "Gated DeltaNet": (
        fv.Delta(),
        "token",
        (
            {"v_tile": 16, "walk": {"num_warps": 4, "num_stages": 2}},
            {"v_tile": 16, "walk": {"num_warps": 4, "num_stages": 3}},
            {"v_tile": 32, "walk": {"num_warps": 4, "num_stages": 3}},
            {"pairs": {"num_warps": 8, "num_stages": 1}},
        ),
    ),
    "KDA": (
        fv.Delta(),
        "channel",
        (
            {"pairs_k_tile": 64, "v_tile": 16, "walk": {"num_warps": 4, "num_stages": 3}},
            {"pairs_k_tile": 64, "pairs": {"num_warps": 4, "num_stages": 1}},
            {"pairs_k_tile": 32, "pairs": {"num_warps": 4, "num_stages": 1}},
        ),
    ),
}


def sweep() -> None:
    """Kernel times of a forward with other settings than those in foveal.tuning."""
    import dataclasses

    from foveal.engines.state import launch

    chosen = launch.tuning
    for name, (rule, decay, variants) in VARIANTS.items():
        inputs = draw(
            torch.Generator().manual_seed(0), torch.bfloat16, (1, 32768, 16, 16, 128, 128), decay, False
        )  # fmt: skip
        call = inputs | {"rule": rule, "implementation": "triton"}
        for changes in ({}, *variants):
            launch.tuning = lambda *args, changes=changes: dataclasses.replace(
                chosen(*args), **changes
            )
            try:
                ahead = milliseconds(functools.partial(fv.scan, **call), 6)
                print(f"{name} {changes}: {ahead:.3f} ms", flush=True)
            except Exception as error:
                print(f"{name} {changes}: {type(error).__name__}: {str(error)[:200]}", flush=True)
    launch.tuning = chosen


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("check", "time", "sweep"))
    parser.add_argument("--seconds", type=float, default=90.0)
    options = parser.parse_args()
    if options.what == "sweep":
        sweep()
        return 0
    if options.what == "check":
        return 1 if checks(options.seconds) else 0
    for name, rule, decay in (
        ("fixed decay", fv.Additive(), "fixed"),
        ("Gated DeltaNet", fv.Delta(), "token"),
        ("KDA", fv.Delta(), "channel"),
    ):
        try:
            timed(name, rule, decay)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    for rule, decay in ((fv.Delta(), "channel"), (fv.Additive(), "fixed")):
        try:
            decode(rule, decay)
        except Exception as error:
            print(f"decode {rule.key}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
