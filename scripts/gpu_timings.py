"""Times of ours and of peers on the shapes that are judged, interleaved; milliseconds of the device.

Every sample starts with an overwritten second-level cache and a device that waits while the host
enqueues, so host time shows only where it exceeds the wait; it is recorded apart.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import foveal as fv
from foveal.patterns.base import Extent, Pattern
from foveal.tuning import tile as tuning

Writer = Callable[[dict[str, object]], None]
Attend = Callable[[Any, Any, Any], Any]
_WAIT_CYCLES = 3_000_000


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    grid: tuple[int, ...]
    heads: int
    dim: int
    pattern: Pattern
    batch: int = 1
    kv_heads: int | None = None
    cu_seqlens: torch.Tensor | None = None
    mask: Callable[..., Any] | None = None  # for FlexAttention: a mask function of positions
    block: int = 128

    @property
    def tokens(self) -> int:
        return torch.Size(self.grid).numel()

    def pairs(self) -> int:
        """Visible pairs per batch, averaged over heads."""
        if isinstance(self.pattern, fv.Blocks):
            selection = self.pattern.selection
            tiles = int(selection.counts.sum()) / selection.indices.shape[1]
            return int(tiles * selection.q_block * selection.kv_block)
        if self.cu_seqlens is not None:
            lengths = self.cu_seqlens.diff().double()
            return int((lengths * (lengths + 1) / 2).sum())
        bounds = self.pattern.bounds(Extent(self.grid, self.grid))
        assert bounds is not None
        return bounds.pairs

    @property
    def flops(self) -> float:
        return 4.0 * self.batch * self.pairs() * self.heads * self.dim


def cases() -> Iterator[Case]:
    """Most important first."""
    yield Case("dense D128", (16384,), 16, 128, fv.Dense())
    yield Case("causal D128", (16384,), 16, 128, fv.Causal())
    yield Case("dense D64", (16384,), 32, 64, fv.Dense())
    yield Case(
        "window 1024", (32768,), 16, 128, fv.Sliding(1023),
        mask=lambda b, h, q, k: (q >= k) & (q - k < 1024),
    )  # fmt: skip
    yield _block_case()
    yield _document_case()
    yield Case("2-D 128x128 window 25", (128, 128), 16, 128, fv.Neighborhood((25, 25)))
    yield Case("2-D 256x256 window 13", (256, 256), 8, 64, fv.Neighborhood((13, 13)))
    yield Case("causal D64", (16384,), 32, 64, fv.Causal())
    yield Case("causal D128 L4096 B4", (4096,), 16, 128, fv.Causal(), batch=4)
    yield Case("causal GQA 32:8 D128 L8192", (8192,), 32, 128, fv.Causal(), kv_heads=8)
    yield Case("2-D 256x256 window 80", (256, 256), 24, 128, fv.Neighborhood((80, 80)))
    yield Case("3-D 30x48x80 window 18x24x24", (30, 48, 80), 24, 128, fv.Neighborhood((18, 24, 24)))
    yield Case("causal D256 L8192", (8192,), 8, 256, fv.Causal())


def _block_case() -> Case:
    L, heads, block = 32768, 16, 128
    source = torch.Generator().manual_seed(0)
    kept = torch.rand(1, heads, L // block, L // block, generator=source) < 0.1
    on_device: list[torch.Tensor] = []

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return on_device[0][h, q // block, k // block]

    if torch.cuda.is_available():
        on_device.append(kept[0].cuda())
    pattern = fv.Blocks(fv.BlockSelection.from_block_mask(kept, block, block))
    return Case("blocks 10 %", (L,), heads, 128, pattern, mask=mask)


def _document_case() -> Case:
    total, documents = 65536, 64
    source = torch.Generator().manual_seed(0)
    weights = torch.rand(documents, generator=source) ** 2 + 0.02
    ends = (weights.cumsum(0) / weights.sum() * total).round().to(torch.int32)
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), ends])
    cu_seqlens[-1] = total
    owner = torch.repeat_interleave(torch.arange(documents), cu_seqlens.diff().long())
    if torch.cuda.is_available():
        owner = owner.cuda()

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (owner[q] == owner[k]) & (q >= k)

    return Case(
        "64 documents causal", (total,), 16, 128, fv.Causal(), cu_seqlens=cu_seqlens, mask=mask
    )


@dataclasses.dataclass
class Runner:
    """Somebody's forward, and the backward of a kept graph."""

    name: str
    attend: Attend
    inputs: tuple[torch.Tensor, ...]
    tokens: Callable[[torch.Tensor], torch.Tensor]
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    host: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    error: str | None = None
    graph: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.attend(*self.inputs)

    def prepare_backward(self) -> None:
        leaves = tuple(x.detach().requires_grad_() for x in self.inputs)
        self.inputs = leaves
        out = self.attend(*leaves)
        seed = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(3),
                           device=out.device, dtype=out.dtype)  # fmt: skip
        self.graph = (out, self.seed(seed))

    def seed(self, like: torch.Tensor) -> torch.Tensor:
        return like

    def backward(self) -> tuple[torch.Tensor, ...]:
        assert self.graph is not None
        return torch.autograd.grad(self.graph[0], self.inputs, self.graph[1], retain_graph=True)


def run(
    implementations: list[str],
    seconds: float,
    write: Writer,
    names: Sequence[str],
    samples: int,
    command: list[str],
) -> None:
    """The cases of these names, or all, while there is time; `samples` of each pass, 0 only compiles."""
    end = time.monotonic() + seconds
    write(
        {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": _triton(),
            "command": command,
        }
    )
    for case in cases():
        if names and case.name not in names:
            continue
        if time.monotonic() > end:
            write({"case": case.name, "skipped": "the time was over"})
            print(f"{case.name}: skipped, the time was over", flush=True)
            continue
        try:
            _time_case(case, implementations, end, write, samples)
        except Exception as error:
            write({"case": case.name, "error": f"{type(error).__name__}: {error}"[:2000]})
            print(f"{case.name}: {type(error).__name__}: {error}"[:300], flush=True)
        torch.cuda.empty_cache()


def _triton() -> str:
    import triton

    return str(triton.__version__)


def _time_case(
    case: Case, implementations: list[str], end: float, write: Writer, samples: int
) -> None:
    source = torch.Generator("cuda").manual_seed(0)
    kv_heads = case.kv_heads or case.heads
    q, k, v = (
        torch.randn(case.batch, *case.grid, h, case.dim, generator=source, device="cuda").bfloat16()
        for h in (case.heads, kv_heads, kv_heads)
    )
    runners = [_ours(case, name, (q, k, v)) for name in implementations]
    runners += _peers(case, (q, k, v))
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    exact = _exact_rows(case, q, k, v)
    for runner in runners:
        _warm_up(runner, case, exact, write)
    for _ in range(samples):
        for runner in runners:
            if runner.error is None:
                _sample(runner, "forward", runner.forward, flush)
                if runner.graph is not None:
                    _sample(runner, "backward", runner.backward, flush)
        if time.monotonic() > end:
            break
    for runner in runners:
        _report(case, runner, write)


def _sample(runner: Runner, part: str, call: Callable[[], object], flush: torch.Tensor) -> None:
    flush.zero_()
    torch.cuda._sleep(_WAIT_CYCLES)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    began = time.perf_counter()
    call()
    host = time.perf_counter() - began
    stop.record()
    stop.synchronize()
    runner.samples.setdefault(part, []).append(start.elapsed_time(stop))
    runner.host.setdefault(part, []).append(host * 1e3)


def _warm_up(
    runner: Runner, case: Case, exact: tuple[torch.Tensor, torch.Tensor], write: Writer
) -> None:
    """First calls: compilation, correctness of sampled rows, the kept graph."""
    try:
        began = time.perf_counter()
        out = runner.forward()
        torch.cuda.synchronize()
        first = time.perf_counter() - began
        rows, expected = exact
        got = runner.tokens(out).flatten(1, -3)[0, rows, 0].double()
        error = float((got - expected).norm() / expected.norm())
        write({"case": case.name, "runner": runner.name, "first_call_s": first, "error": error})
        if not error < 0.02:
            raise ArithmeticError(f"sampled rows are wrong by {error:.3g}")
        del out
        runner.prepare_backward()
        runner.backward()
        for _ in range(2):
            runner.forward()
            runner.backward()
        torch.cuda.synchronize()
    except Exception as error:
        runner.error = f"{type(error).__name__}: {error}"[:1500]
        runner.graph = None
        write({"case": case.name, "runner": runner.name, "failed": runner.error})


def _report(case: Case, runner: Runner, write: Writer) -> None:
    if runner.error is not None:
        print(f"{case.name:30} {runner.name:12} FAILED {runner.error[:160]}", flush=True)
    text = f"{case.name:30} {runner.name:12}"
    for part, samples in runner.samples.items():
        milliseconds = statistics.median(samples)
        work = case.flops * (2.5 if part == "backward" else 1.0)
        rate = work / milliseconds / 1e9
        host = statistics.median(runner.host[part])
        write(
            {
                "case": case.name,
                "runner": runner.name,
                "pass": part,
                "milliseconds": milliseconds,
                "tflops": rate,
                "host_milliseconds": host,
                "samples": samples,
            }
        )
        text += f"  {part} {milliseconds:8.3f} ms {rate:6.1f} TFLOP/s (host {host:.2f} ms)"
    if runner.samples:
        print(text, flush=True)


def _exact_rows(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some queries of batch 0 and head 0, and their outputs in float64."""
    q, k, v = (x.flatten(1, -3)[0, :, 0].double() for x in (q, k, v))
    rows = torch.linspace(0, case.tokens - 1, 48).long()
    extent = Extent(case.grid, case.grid)
    k_pos = torch.arange(case.tokens)
    if case.cu_seqlens is not None:
        owner = torch.bucketize(k_pos, case.cu_seqlens[1:].long(), right=True)
        visible = (owner[rows, None] == owner[None]) & (rows[:, None] >= k_pos)
    elif isinstance(case.pattern, fv.Blocks):
        visible = case.pattern.allows(rows[:, None], k_pos[None], extent)[0, 0]
    else:
        visible = case.pattern.allows(rows[:, None], k_pos[None], extent)
    scores = (q[rows] @ k.T * case.dim**-0.5).masked_fill(~visible.cuda(), -torch.inf)
    return rows.cuda(), scores.softmax(-1) @ v


def _ours(case: Case, implementation: str, inputs: tuple[torch.Tensor, ...]) -> Runner:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fv.attend(
            q, k, v, case.pattern, cu_seqlens=case.cu_seqlens, implementation=implementation
        )

    return Runner(implementation, attend, inputs, lambda x: x)


def _peers(case: Case, inputs: tuple[torch.Tensor, ...]) -> list[Runner]:
    first = tuple(x.flatten(1, -3).transpose(1, 2).contiguous() for x in inputs)
    grouped = case.kv_heads is not None
    back = lambda x: x.transpose(1, 2)  # noqa: E731
    plain = isinstance(case.pattern, fv.Dense | fv.Causal) and case.cu_seqlens is None
    causal = isinstance(case.pattern, fv.Causal)
    found = []
    if plain:
        for name, backend in (
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash2", SDPBackend.FLASH_ATTENTION),
        ):

            def attend(q: Any, k: Any, v: Any, backend: SDPBackend = backend) -> Any:
                with sdpa_kernel([backend]):
                    return scaled_dot_product_attention(
                        q, k, v, is_causal=causal, enable_gqa=grouped
                    )

            found.append(Runner(name, attend, first, back))
    elif case.mask is not None:
        try:
            found.append(Runner("flex", _flex(case), first, back))
        except Exception as error:
            print(f"{case.name}: flex: {error}"[:300], flush=True)
    return found


def _flex(case: Case) -> Attend:
    """FlexAttention with blocks of 128, its lists made as its users make them."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False
    torch.compiler.reset()
    heads = case.heads if isinstance(case.pattern, fv.Blocks) else None
    sizes = case.tokens, case.tokens
    mask = create_block_mask(
        case.mask, None, heads, *sizes, device="cuda", BLOCK_SIZE=128, _compile=True
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=case.kv_heads is not None)


def sweep(stage: str, dim: int, configs: list[tuning.Config], write: Writer) -> None:
    """Times of the portable edition with other sizes of one kernel: full rows, causal and local."""
    problems = {
        "dense": (fv.Dense(), (8192,)),
        "causal": (fv.Causal(), (8192,)),
        "local": (fv.Neighborhood((25, 25)), (128, 128)),
    }
    part = "forward" if stage == "forward" else "backward"
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for config in configs or list(_configs()):
        record: dict[str, object] = {"stage": stage, "dim": dim, **dataclasses.asdict(config)}
        for name, (pattern, grid) in problems.items():
            case = Case(name, grid, 16, dim, pattern)
            inputs = tuple(
                torch.randn(1, *grid, 16, dim, device="cuda", dtype=torch.bfloat16) for _ in "qkv"
            )
            runner = _ours(case, "triton", inputs)
            try:
                with tuning.forced(stage, config):
                    if part == "backward":
                        runner.prepare_backward()
                    call = runner.forward if part == "forward" else runner.backward
                    call()
                    for _ in range(7):
                        _sample(runner, part, call, flush)
                record[name] = min(runner.samples[part])
            except Exception as error:
                record[name] = f"{type(error).__name__}: {error}"[:200]
        write(record)
        print(record, flush=True)


def _configs() -> Iterator[tuning.Config]:
    for queries, keys in ((128, 128), (128, 64), (64, 128), (64, 64), (128, 32)):
        for warps in (4, 8):
            for stages in (1, 2, 3):
                yield tuning.Config(queries, keys, warps, stages)
