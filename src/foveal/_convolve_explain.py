"""The plans of the convolution verbs, in numbers and sentences, without running them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from foveal._arguments import named_device, need_tensors, tensors_or_none
from foveal._convolve import Filters, check_operands, described, implementations_of, split_channels
from foveal._convolve_plan import (
    MIX_IMPLEMENTATIONS,
    SPECTRAL_IMPLEMENTATIONS,
    choose_convolution,
)
from foveal._host import on_host
from foveal.engines.convolution.mix_problem import Border, describe_mix
from foveal.engines.convolution.problem import Axes, Flags, Padding
from foveal.engines.convolution.spectral import describe_spectral
from foveal.engines.convolution.strips_problem import Strips, column_of, row_of


@dataclass(frozen=True)
class ConvolutionExplanation:
    """What a call of `convolve`, `local_mix` or `fftconv` will do.

    implementation names one per filter; flops counts the forward, two per product of a tap and a token
    on the grid, or 5 N log2 N per Fourier transform; bytes is each tensor moved once.
    """

    implementation: tuple[str, ...]
    problem: str
    refusals: tuple[tuple[str, str], ...]
    flops: int
    bytes: int

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [
            f"runs       {', '.join(self.implementation)}",
            f"problem    {self.problem}",
            f"work       {self.flops / 1e9:,.3f} GFLOP forward, {self.bytes / 1e6:,.2f} MB moved",
        ]
        lines.extend(f"refused    {name}: {reason}" for name, reason in self.refusals)
        return "\n".join(lines)


@on_host
def explain_convolve(
    x: Tensor,
    filter: Filters,
    *,
    bias: Tensor | None = None,
    dilation: Axes = 1,
    padding: Padding = None,
    causal: Flags = False,
    channels_first: bool = False,
    implementation: str | None = None,
    device: str = "cpu",
) -> ConvolutionExplanation:
    """What `convolve` with the same arguments will run and cost; nothing is computed.

    Shapes: as `convolve`; tensors on the meta device stand for a call on `device`.
    """
    check_operands(x, filter, bias)
    found = []
    if isinstance(filter, Tensor | Strips):
        pairs: list[tuple[Tensor, Tensor | Strips]] = [(x, filter)]
        own = bias
    else:
        pairs = list(zip(split_channels(x, filter, channels_first), filter, strict=True))
        own = None
    for part, each in pairs:
        problem = described(part, each, own, dilation, padding, causal, channels_first)
        elements = problem.batch * problem.channels
        elements *= math.prod(problem.grid) + math.prod(problem.out_grid)
        if isinstance(each, Strips):
            products = row_of(problem).products + column_of(problem).products
            taps = each.row.numel() + each.column.numel()
            window = f"{problem.window[1]} and then {problem.window[0]}"
        else:
            products, taps = problem.products, each.numel()
            window = "x".join(str(k) for k in problem.window)
        grid = "x".join(str(n) for n in problem.grid)
        found.append(
            _explanation(
                problem,
                implementations_of(each),
                implementation,
                device,
                f"{problem.batch} x {grid} tokens, {problem.channels} channels, {window} taps",
                2 * products,
                (elements + taps) * problem.dtype.itemsize,
            )
        )
    return ConvolutionExplanation(
        tuple(name for one in found for name in one.implementation),
        "; ".join(one.problem for one in found),
        tuple(dict.fromkeys(refusal for one in found for refusal in one.refusals)),
        sum(one.flops for one in found),
        sum(one.bytes for one in found),
    )


@on_host
def explain_local_mix(
    weights: Tensor,
    v: Tensor,
    window: Axes,
    *,
    dilation: Axes = 1,
    border: Border = "zero",
    causal: Flags = False,
    implementation: str | None = None,
    device: str = "cpu",
) -> ConvolutionExplanation:
    """What `local_mix` with the same arguments will run and cost; nothing is computed.

    Shapes: as `local_mix`; tensors on the meta device stand for a call on `device`.
    """
    need_tensors(weights=weights, v=v)
    problem = describe_mix(weights, v, window, dilation, border, causal)
    grid = "x".join(str(n) for n in problem.grid)
    taps = "x".join(str(k) for k in problem.window)
    return _explanation(
        problem,
        MIX_IMPLEMENTATIONS,
        implementation,
        device,
        f"{problem.batch} x {grid} tokens, {problem.heads} heads of {problem.head_dim}, {taps} taps",
        2 * weights.numel() * problem.head_dim,
        (weights.numel() + 2 * v.numel()) * problem.dtype.itemsize,
    )


@on_host
def explain_fftconv(
    x: Tensor,
    filter: Tensor,
    *,
    pre_gate: Tensor | None = None,
    post_gate: Tensor | None = None,
    skip: Tensor | None = None,
    causal: bool = True,
    implementation: str | None = None,
    device: str = "cpu",
) -> ConvolutionExplanation:
    """What `fftconv` with the same arguments will run and cost; nothing is computed.

    Shapes: as `fftconv`; tensors on the meta device stand for a call on `device`.
    """
    need_tensors(x=x, filter=filter)
    tensors_or_none(pre_gate=pre_gate, post_gate=post_gate, skip=skip)
    problem = describe_spectral(x, filter, pre_gate, post_gate, skip, causal)
    sizes = " x ".join(str(n) for n in problem.sizes)
    tensors = (x, x, filter, pre_gate, post_gate)
    return _explanation(
        problem,
        SPECTRAL_IMPLEMENTATIONS,
        implementation,
        device,
        f"{problem.batch} x {problem.channels} transforms of {sizes}",
        problem.flops,
        sum(t.numel() * t.dtype.itemsize for t in tensors if t is not None),
    )


def _explanation(
    problem: Any,
    implementations: Mapping[str, ModuleType],
    implementation: str | None,
    device: str,
    text: str,
    flops: int,
    moved: int,
) -> ConvolutionExplanation:
    device = named_device(device)
    if problem.device == "meta":
        problem = dataclasses.replace(problem, device=device)
    plan = choose_convolution(problem, implementations, implementation)
    return ConvolutionExplanation((plan.implementation,), text, plan.refusals, flops, moved)
