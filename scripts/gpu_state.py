"""Checks and times the Triton edition of the state engine on a CUDA device; one line per case.

python scripts/gpu_state.py check [--seconds 90]            o, states and gradients against float64
python scripts/gpu_state.py fuzz [--first 0] [--count N]    random cases with steep gates: all finite, and
                                                            one in 25 of the short ones against float64
python scripts/gpu_state.py time [--seconds 60] [--out F]   ours and peers, interleaved; JSON lines
python scripts/gpu_state.py first [--out F]                 first calls of a process with an empty cache

A case that fails is printed with its error and the run goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

import foveal as fv
from foveal.engines.state.reference import scan_in
from foveal.rules.base import Recurrence, Rule
from foveal.testing.bounds import INPUTS, Verdict, check, error

DEVICE = "cuda"
Inputs = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A scan on random numbers; `steep` mixes gates of 0 and down to -60."""

    rule: Rule
    decay: str
    dtype: torch.dtype
    sizes: tuple[int, int, int, int, int, int]  # B, L, H, Hv, Dk, Dv
    steep: bool = False
    packed: tuple[int, ...] | None = None
    gated: bool = True
    initial: bool = True
    piece: int | None = None  # chunks per piece, where the plan would not cut

    def __str__(self) -> str:
        parts = [self.rule.key, self.decay, str(self.dtype)[6:], str(self.sizes)]
        parts += ["steep"] * self.steep + [f"packed {self.packed}"] * (self.packed is not None)
        return " ".join(parts + [f"pieces of {self.piece}"] * (self.piece is not None))

    @property
    def count(self) -> int:
        return self.sizes[0] if self.packed is None else len(self.packed) - 1

    def draw(self, seed: int, device: str = "cpu") -> Inputs:
        """q, k (of norm 1), v, log_decay, write_gate and the parts of the initial state."""
        source = torch.Generator(device).manual_seed(seed)
        batch, length, heads, value_heads, dk, dv = self.sizes

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=source, device=device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source, device=device)

        q, k = (normal(batch, length, heads, dk) for _ in range(2))
        if self.rule == fv.Additive(normalised=True):
            q, k = q.abs() + 0.1, k.abs() + 0.1
        found = {
            "q": q.to(self.dtype),
            "k": torch.nn.functional.normalize(k, dim=-1).to(self.dtype),
            "v": normal(batch, length, value_heads, dv).to(self.dtype),
        }
        tokens = (batch, length, value_heads)
        shapes = {"fixed": (value_heads,), "token": tokens, "channel": (*tokens, dk)}
        if self.decay != "none":
            gate = -uniform(*shapes[self.decay]) * 0.1
            if self.steep:
                gate = torch.where(uniform(*gate.shape) < 0.3, gate * 600, gate * 0)
            found["log_decay"] = gate
        if isinstance(self.rule, fv.MLSTM):
            found["write_gate"] = normal(*tokens) * 3
        elif self.gated:
            found["write_gate"] = uniform(*tokens)
        if self.initial:
            for number, part in enumerate(self.rule.part_shapes(dk, dv).values()):
                found[f"initial {number}"] = normal(self.count, value_heads, *part).abs()
        return {name: x.to(DEVICE) for name, x in found.items()}

    def run(self, inputs: Inputs, implementation: str, dtype: torch.dtype | None = None) -> Inputs:
        """o, the parts of the final state and all gradients; `dtype` None leaves tensors as they came."""
        leaves = {
            name: x.detach().to(x.dtype if dtype is None else dtype).requires_grad_()
            for name, x in inputs.items()
        }
        calls = {n: x for n, x in leaves.items() if not n.startswith("initial")}
        parts = tuple(x for n, x in leaves.items() if n.startswith("initial"))
        cu = None if self.packed is None else torch.tensor(self.packed, device=inputs["q"].device)
        run = self._plain if implementation == "plain" else self._scan(implementation)
        o, states = run(calls, parts or None, cu)
        outputs = {"o": o} | {f"state {number}": part for number, part in enumerate(states)}
        outputs = {name: x for name, x in outputs.items() if x.requires_grad}
        source = torch.Generator().manual_seed(3)
        weights = [torch.randn(x.shape, generator=source).to(x) for x in outputs.values()]
        gradients = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), weights, allow_unused=True
        )
        found = {name: x.detach() for name, x in outputs.items()}
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
        return found

    def silent(self, inputs: Inputs) -> Inputs:
        """o and the parts of the final state without gradients, which may be other kernels."""
        calls = {n: x for n, x in inputs.items() if not n.startswith("initial")}
        parts = tuple(x for n, x in inputs.items() if n.startswith("initial"))
        cu = None if self.packed is None else torch.tensor(self.packed, device=inputs["q"].device)
        with torch.no_grad():
            o, states = self._scan("triton")(calls, parts or None, cu)
        found = {SILENT + "o": o}
        return found | {f"{SILENT}state {number}": part for number, part in enumerate(states)}

    def _scan(self, implementation: str) -> Callable[..., tuple[Tensor, tuple[Tensor, ...]]]:
        def call(calls: Inputs, parts: Any, cu: Tensor | None) -> tuple[Tensor, Any]:
            state = parts[0] if parts is not None and len(parts) == 1 else parts
            o, last = fv.scan(
                **calls,
                rule=self.rule,
                initial_state=state,
                return_state=True,
                cu_seqlens=cu,
                implementation=implementation,
            )
            return o, last if isinstance(last, tuple) else (last,)

        return call

    def _plain(self, calls: Inputs, parts: Any, cu: Tensor | None) -> tuple[Tensor, Any]:
        """The recurrence with all arithmetic and the state in the dtype of q."""
        q, k, v = (calls[n] for n in "qkv")
        lengths = (q.shape[1],) * len(q) if cu is None else tuple(cu.diff().tolist())
        decay, gate = (calls.get(n) for n in ("log_decay", "write_gate"))
        plain = Recurrence(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1),
            decay if decay is None or decay.dim() == 1 else decay.flatten(0, 1),
            None if gate is None else gate.flatten(0, 1),
            None, q.shape[-1] ** -0.5, False, lengths,
        )  # fmt: skip
        o, states = scan_in(q.dtype, self.rule, plain, parts)
        return o.unflatten(0, q.shape[:2]), states


SILENT = "without gradients, "
PACKED = (0, 1, 1, 64, 130, 321)
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CHECKS = (
    Problem(fv.Delta(), "channel", BF16, (1, 321, 2, 4, 128, 128), packed=PACKED),
    Problem(fv.Delta(), "token", BF16, (1, 321, 2, 4, 128, 128), packed=PACKED),
    Problem(fv.Additive(), "fixed", BF16, (1, 700, 2, 2, 128, 128), piece=3),
    Problem(fv.Additive(), "token", BF16, (1, 700, 2, 2, 128, 128), steep=True, piece=3),
    Problem(fv.MLSTM(), "token", BF16, (1, 321, 2, 2, 128, 128), packed=PACKED, piece=2),
    Problem(fv.Delta(), "channel", BF16, (2, 200, 2, 2, 128, 128), steep=True),
    Problem(fv.Delta(), "token", BF16, (2, 200, 2, 2, 128, 128), steep=True),
    Problem(fv.Additive(), "channel", BF16, (2, 200, 2, 2, 128, 128), steep=True, piece=1),
    Problem(fv.Delta(), "channel", F32, (1, 130, 1, 2, 60, 72), steep=True),
    Problem(fv.Delta(), "token", F16, (1, 130, 1, 1, 64, 64)),
    Problem(fv.Additive(), "channel", F32, (1, 321, 1, 2, 60, 72), steep=True, packed=PACKED),
    Problem(fv.Additive(), "token", F32, (1, 321, 1, 2, 60, 72), steep=True, packed=PACKED, piece=1),
    Problem(fv.Additive(normalised=True), "fixed", F16, (1, 200, 1, 2, 64, 144), piece=1),
    Problem(fv.MLSTM("sigmoid"), "token", F32, (1, 200, 1, 2, 64, 64), piece=1),
    Problem(fv.Delta(), "fixed", BF16, (1, 130, 1, 1, 256, 40)),
    Problem(fv.Delta(), "none", BF16, (1, 130, 1, 1, 64, 64)),
    Problem(fv.Delta(), "fixed", BF16, (1, 321, 2, 2, 64, 64), steep=True, packed=PACKED),
    Problem(fv.Additive(), "none", BF16, (1, 130, 1, 1, 256, 64), gated=False),
    Problem(fv.Delta(), "token", BF16, (1, 700, 1, 2, 128, 128), piece=3),
    Problem(fv.Delta(), "channel", BF16, (1, 700, 1, 2, 128, 64), steep=True, piece=3),
    Problem(fv.Delta(), "token", BF16, (1, 700, 1, 2, 128, 128), piece=1),
    Problem(fv.Delta(), "channel", BF16, (1, 700, 2, 2, 64, 128), steep=True, piece=1),
    Problem(fv.Additive(), "fixed", BF16, (1, 1100, 3, 3, 128, 128), piece=3, gated=False),
    Problem(fv.Additive(), "fixed", BF16, (1, 321, 2, 4, 128, 128), packed=PACKED, piece=1, gated=False),
    Problem(fv.Additive(), "none", BF16, (2, 700, 2, 2, 128, 64), piece=3, gated=False, initial=False),
    Problem(fv.Additive(), "fixed", F16, (2, 200, 1, 2, 64, 128), steep=True, piece=1, gated=False),
)  # fmt: skip


def in_pieces(problem: Problem) -> None:
    """Cuts sequences as the problem says, in this process, whatever the plan would do."""
    from foveal.engines.state import task
    from foveal.tuning import state as tuning

    task.piece_of = tuning.piece_of
    if problem.piece is not None:
        task.piece_of = _always(problem.piece)


@functools.cache
def _always(piece: int) -> Callable[..., int]:
    """One function for one number: launches that are kept are told apart by it."""
    return lambda *_: piece


def terms_of_decay(problem: Problem, inputs: Inputs, exact: Inputs) -> Tensor:
    """The gradient of a decay sums q dq - k dk over all tokens behind it: their size without signs.

    That of a fixed decay sums those of all tokens.
    """
    terms = sum((inputs[n].double() * exact[f"d{n}"]).abs().sum() for n in "qk")
    assert isinstance(terms, Tensor)
    return terms * problem.sizes[1] if problem.decay == "fixed" else terms


def verdicts(problem: Problem, inputs: Inputs, got: Inputs) -> list[Verdict]:
    """By the rule of `foveal.testing.bounds`; neighbours are visited until every result is within it.

    Plain is the same computation, by chunks, in float32, or the recurrence in 16 bits.
    """
    exact = problem.run(inputs, "chunk", torch.float64)
    terms = {"dlog_decay": terms_of_decay(problem, inputs, exact)}
    errors = dict.fromkeys(exact, 0.0)
    found: list[Verdict] = []
    for number in range(INPUTS):
        near = inputs if number == 0 else _neighbour(inputs, number)
        there = exact if number == 0 else problem.run(near, "chunk", torch.float64)
        plain = problem.run(near, "chunk" if problem.dtype == F32 else "plain", problem.dtype)
        for name, x in there.items():
            errors[name] = max(errors[name], error(plain[name], x))
        found = [check(n, got[n], errors[n], exact[n], terms.get(n)) for n in exact]
        alone = [n for n in got if n.startswith(SILENT) and n.removeprefix(SILENT) in exact]
        for name in alone:
            same = name.removeprefix(SILENT)
            found.append(check(name, got[name], errors[same], exact[same]))
        if all(verdict.ok for verdict in found):
            break
    return found


def _neighbour(inputs: Inputs, number: int) -> Inputs:
    """Inputs further away than a rounding and too near to change how large errors are."""
    source = torch.Generator().manual_seed(number)
    near = {}
    for name, x in inputs.items():
        step = max(32 * torch.finfo(x.dtype).eps, 2.0**-10)
        near[name] = x * (1 + step * torch.randn(x.shape, generator=source)).to(x)
    return near


def run_check(number: int) -> str:
    problem = CHECKS[number]
    try:
        in_pieces(problem)
        inputs = problem.draw(number)
        got = problem.run(inputs, "triton") | problem.silent(inputs)
        found = verdicts(problem, inputs, got)
        worst = max(v.error / max(v.allowed, 1e-30) for v in found)
        bad = [str(v) for v in found if not v.ok]
        return f"{'FAILED' if bad else 'ok    '} {worst:6.2f} {problem} {'; '.join(bad)}"
    except Exception as failure:
        return f"ERROR  {problem} {type(failure).__name__}: {str(failure)[:300]}"


LENGTHS = (1, 63, 64, 65, 1000)
RULES: tuple[Rule, ...] = (fv.Additive(), fv.Additive(normalised=True), fv.Delta(), fv.MLSTM())


def fuzzed(number: int) -> Problem:
    """The case of a number: any rule, decay, lengths, packed or not, in pieces or not."""
    source = torch.Generator().manual_seed(number)

    def pick(choices: Iterable[Any]) -> Any:
        options = list(choices)
        return options[int(torch.randint(len(options), (), generator=source))]

    rule = pick(RULES)
    decays = ("token",) if isinstance(rule, fv.MLSTM) else ("none", "fixed", "token", "channel")
    if pick((True, False)):
        edges = [0]
        for _ in range(pick((1, 3, 5))):
            edges.append(edges[-1] + pick((0, *LENGTHS)))
        packed, length = tuple(edges), edges[-1]
    else:
        packed, length = None, pick(LENGTHS)
    batch = 1 if packed is not None else pick((1, 2))
    sizes = (batch, length, 2, 2, 64, 64)
    return Problem(
        rule, pick(decays), BF16, sizes, steep=True, packed=packed, initial=pick((True, False)),
        piece=pick((None, 1, 3)), gated=pick((True, False)),
    )  # fmt: skip


def sound(name: str, x: Tensor) -> Tensor:
    """Whether numbers are finite; the log scale of a memory that holds nothing is -inf."""
    empty = x == -torch.inf if name == SILENT + "state 2" else False
    return x.isfinite() | empty


COMPARED = 25
"""One case in so many is compared with float64, where it is short: a loop over tokens runs beside it."""
SHORT = 200
"""Tokens of the longest problem that is compared."""


def run_fuzz(number: int) -> str | None:
    """What is not finite or too far off, or an error; None for a case that is all right."""
    problem = fuzzed(number)
    try:
        in_pieces(problem)
        inputs = problem.draw(number, DEVICE)
        found = problem.run(inputs, "triton") | problem.silent(inputs)
        good = torch.stack([sound(name, x).all() for name, x in found.items()])
        bad = [
            f"{name} not finite" for name, ok in zip(found, good.tolist(), strict=True) if not ok
        ]
        if not bad and number % COMPARED == 0 and problem.sizes[1] <= SHORT:
            bad = [str(v) for v in verdicts(problem, inputs, found) if not v.ok]
        return f"FAILED {number} {problem}: {'; '.join(bad)}" if bad else None
    except Exception as failure:
        return f"ERROR  {number} {problem} {type(failure).__name__}: {str(failure)[:300]}"


def pooled(
    run: Callable[[int], str | None], groups: Sequence[Sequence[int]], seconds: float, workers: int
) -> tuple[int, int]:
    """Prints the lines of all numbers that were begun in time; how many those are, and how many failed.

    A group is run by one process, so that no two of them compile the same kernels.
    """
    end = time.monotonic() + seconds
    done = failed = 0
    total = sum(len(group) for group in groups)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        waiting = pool.imap_unordered(functools.partial(run_group, run, end), groups)
        for _ in groups:
            try:
                lines = waiting.next(timeout=max(end - time.monotonic(), 0.01) + GRACE)
            except multiprocessing.TimeoutError:
                break
            done += len(lines)
            for line in lines:
                failed += line is not None and not line.startswith("ok")
                if line is not None:
                    print(line, flush=True)
        pool.terminate()
    print(f"{done} of {total} done, {failed} failed", flush=True)
    return done, failed


GRACE = 8.0
"""Seconds that a process may take to end the number which it has begun."""


def run_group(
    run: Callable[[int], str | None], end: float, numbers: Sequence[int]
) -> list[str | None]:
    """What numbers gave that were begun before `end`."""
    found = []
    for number in numbers:
        if time.monotonic() > end:
            break
        found.append(run(number))
    return found


def kinds(numbers: range, parts: int = 4) -> list[list[int]]:
    """Numbers of the fuzz by what they compile; a part of every kind, then the next part of every kind."""
    by_kind: dict[tuple[object, ...], list[int]] = {}
    for number in numbers:
        problem = fuzzed(number)
        by_kind.setdefault(
            (problem.rule, problem.decay, problem.initial, problem.gated), []
        ).append(number)
    return [found[part::parts] for part in range(parts) for found in by_kind.values()]


Writer = Callable[[dict[str, object]], None]
Calls = dict[str, Callable[[], object]]


def milliseconds(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Device times of calls by turns, each with a cold cache."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            flush.zero_()
            torch.cuda._sleep(6_000_000)  # the host runs ahead, so that its time does not count
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(stop))
    return samples


def timed(case: str, problem: Problem, write: Writer, with_gates: bool = True) -> None:
    """Forward and backward of ours, and of a peer that is installed."""
    inputs = problem.draw(0, DEVICE)
    if not with_gates:
        inputs.pop("write_gate")
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def forward() -> Tensor:
        o: Tensor = fv.scan(**leaves, rule=problem.rule, implementation="triton")
        return o

    def silent() -> Tensor:
        with torch.no_grad():
            return forward()

    o = forward()
    do = torch.randn_like(o)
    calls: Calls = {"forward": silent}
    calls["backward"] = lambda: torch.autograd.grad(o, list(leaves.values()), do, retain_graph=True)
    for name, samples in milliseconds(calls, 9).items():
        _report(case, "triton", name, samples, write)


def _report(case: str, runner: str, name: str, samples: list[float], write: Writer) -> None:
    median = statistics.median(samples)
    print(f"{case}, {runner}, {name}: {median:.3f} ms", flush=True)
    write(
        {"case": case, "runner": runner, "pass": name, "milliseconds": median, "samples": samples}
    )


def long_sequence(name: str, problem: Problem, write: Writer, with_gates: bool = True) -> None:
    """The forward of one long sequence of few heads, in pieces and in one."""
    inputs = problem.draw(0, DEVICE)
    if not with_gates:
        inputs.pop("write_gate")

    def whole(piece: int | None) -> Callable[[], object]:
        def call() -> object:
            in_pieces(dataclasses.replace(problem, piece=piece))
            try:
                return fv.scan(**inputs, rule=problem.rule, implementation="triton")
            finally:
                in_pieces(problem)

        return call

    found = milliseconds({"triton": whole(None), "triton, not split": whole(1 << 20)}, 5)
    for runner, samples in found.items():
        _report(name, runner, "forward", samples, write)


def decode(name: str, problem: Problem, write: Writer) -> None:
    """One token of every sequence, in a graph, against a copy of the states."""
    inputs = problem.draw(0, DEVICE)
    state = inputs.pop("initial 0")
    copy = torch.empty_like(state)

    def step() -> object:
        return fv.scan_step(**inputs, rule=problem.rule, state=state, implementation="triton")

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    calls: Calls = {"triton": graph.replay, "copy": lambda: copy.copy_(state)}
    for runner, samples in milliseconds(calls, 15).items():
        _report(name, runner, "forward", samples, write)


LONG = (1, 131072, 2, 2, 128, 128)
SHAPE = (1, 32768, 16, 16, 128, 128)
ONE = (64, 1, 32, 32, 128, 128)


def timings() -> Iterator[tuple[str, Callable[[Writer], None]]]:
    """What is timed, the most important first."""
    delta, additive, mlstm = fv.Delta(), fv.Additive(), fv.MLSTM()

    def problem(rule: Rule, decay: str, sizes: Any, initial: bool = False) -> Problem:
        return Problem(rule, decay, BF16, sizes, initial=initial)

    for name, rule, decay in (
        ("fixed decay", additive, "fixed"),
        ("Gated DeltaNet", delta, "token"),
        ("KDA", delta, "channel"),
        ("mLSTM", mlstm, "token"),
    ):
        own = problem(rule, decay, SHAPE)
        gates = rule is not additive
        yield name, functools.partial(timed, name, own, with_gates=gates)
    copied = torch.empty(4 * 32768 * 16 * 128 // 2, dtype=BF16, device=DEVICE)
    target = torch.empty_like(copied)

    def copy(write: Writer) -> None:
        found = milliseconds({"copy": lambda: target.copy_(copied)}, 9)
        _report("a copy of as many bytes as q, k, v, o", "copy", "forward", found["copy"], write)

    yield "copy", copy
    for name, rule, decay in (
        ("fixed decay", additive, "fixed"),
        ("Gated DeltaNet", delta, "token"),
        ("KDA", delta, "channel"),
    ):
        title = f"{name}, 131,072 tokens, 2 heads"
        gates = rule is not additive
        own = problem(rule, decay, LONG)
        yield title, functools.partial(long_sequence, title, own, with_gates=gates)
    for name, rule, decay in (("KDA", delta, "channel"), ("fixed decay", additive, "fixed")):
        title = f"{name}, decode step, 64 x 32 heads"
        yield title, functools.partial(decode, title, problem(rule, decay, ONE, initial=True))


def first_call(kind: str) -> None:
    """Prints the seconds of a first forward and backward as JSON; run with an empty cache."""
    rule, decay = {"fixed decay": (fv.Additive(), "fixed"), "Gated DeltaNet": (fv.Delta(), "token"),
                   "KDA": (fv.Delta(), "channel"), "mLSTM": (fv.MLSTM(), "token")}[kind]  # fmt: skip
    problem = Problem(rule, decay, BF16, (1, 2048, 16, 16, 128, 128), initial=False)
    leaves = {name: x.requires_grad_() for name, x in problem.draw(0, DEVICE).items()}
    x = torch.ones(256, 256, device=DEVICE, dtype=BF16)
    (x @ x).sum().item()
    import triton  # noqa: F401

    begun = time.perf_counter()
    o = fv.scan(**leaves, rule=rule, implementation="triton")
    torch.cuda.synchronize()
    middle = time.perf_counter()
    o.sum().backward()
    torch.cuda.synchronize()
    found = {
        "case": kind,
        "first_forward_s": middle - begun,
        "first_backward_s": time.perf_counter() - middle,
    }
    print(json.dumps(found), flush=True)


def first_calls(write: Writer) -> None:
    """Each kind in a process of its own, with an empty cache."""
    import subprocess

    for kind in ("fixed decay", "Gated DeltaNet", "KDA", "mLSTM"):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"TRITON_CACHE_DIR": folder}
            done = subprocess.run(
                [sys.executable, __file__, "first", "--kind", kind],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        print(lines[-1] if lines else done.stderr[-500:], flush=True)
        if lines:
            write(json.loads(lines[-1]))


def writer(path: Path | None) -> Writer:
    """Appends JSON lines to a file, behind one that names the machine."""

    def write(line: dict[str, object]) -> None:
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    if importlib.util.find_spec("triton") is not None:
        import triton

        name = torch.cuda.get_device_name()
        write({"device": name, "torch": torch.__version__, "triton": triton.__version__})
    return write


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("check", "fuzz", "time", "first"))
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--workers", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what == "check":
        each = [[number] for number in range(len(CHECKS))]
        done, failed = pooled(run_check, each, options.seconds, options.workers)
        return 1 if failed else 0
    if options.what == "fuzz":
        numbers = range(options.first, options.first + options.count)
        done, failed = pooled(run_fuzz, kinds(numbers), options.seconds, options.workers)
        line = {"fuzz": [options.first, options.first + options.count], "done": done}
        writer(options.out)(line | {"failed": failed})
        return 1 if failed else 0
    if options.what == "first":
        if options.kind:
            first_call(options.kind)
        else:
            first_calls(writer(options.out))
        return 0
    end, write = time.monotonic() + options.seconds, writer(options.out)
    for name, run in timings():
        if time.monotonic() > end:
            print(f"{name}: the time was over", flush=True)
            continue
        try:
            run(write)
        except Exception as failure:
            print(f"{name}: {type(failure).__name__}: {str(failure)[:300]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
