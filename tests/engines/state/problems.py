"""Random scans, and all results of one: output, final state, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import foveal as fv


@dataclass(frozen=True)
class Shape:
    """Sizes and gates of a scan; `steep` mixes gates of 0 and down to -60."""

    length: int
    decay: str = "token"
    gated: bool = True
    batch: int = 1
    heads: int = 1
    value_heads: int = 2
    head_dim: int = 5
    value_dim: int = 3
    steep: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    reverse: bool = False

    @property
    def count(self) -> int:
        return self.batch if self.cu_seqlens is None else len(self.cu_seqlens) - 1


def draw(
    shape: Shape,
    rule: fv.Rule,
    source: torch.Generator,
    dtype: torch.dtype = torch.float64,
    initial: bool = True,
) -> dict[str, Any]:
    """Arguments of `scan` by name; q and k are positive where the rule divides by their products."""

    def random(*sizes: int) -> Tensor:
        return torch.rand(sizes, generator=source, dtype=dtype)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=source, dtype=dtype)

    tokens = (shape.batch, shape.length)
    q, k = (normal(*tokens, shape.heads, shape.head_dim) for _ in range(2))
    if rule == fv.Additive(normalised=True):
        q, k = q.abs() + 0.1, k.abs() + 0.1
    sizes: dict[str, tuple[int, ...]] = {
        "fixed": (shape.value_heads,),
        "token": (*tokens, shape.value_heads),
        "channel": (*tokens, shape.value_heads, shape.head_dim),
    }
    log_decay = None
    if shape.decay != "none":
        log_decay = -0.5 * random(*sizes[shape.decay])
        if shape.steep:
            log_decay = torch.where(random(*log_decay.shape) < 0.3, 120 * log_decay, 0 * log_decay)
    gate = random(*tokens, shape.value_heads) if shape.gated else None
    if isinstance(rule, fv.MLSTM):
        gate = normal(*tokens, shape.value_heads) * 3
    state = None
    if initial:
        parts = rule.part_shapes(shape.head_dim, shape.value_dim)
        state = tuple(random(shape.count, shape.value_heads, *part) for part in parts.values())
    return {
        "q": q,
        "k": F.normalize(k, dim=-1),
        "v": normal(*tokens, shape.value_heads, shape.value_dim),
        "log_decay": log_decay,
        "write_gate": gate,
        "initial_state": state,
    }


def results(
    inputs: dict[str, Any],
    rule: fv.Rule,
    shape: Shape,
    implementation: str | None,
    dtype: torch.dtype | None = None,
    signs: bool = True,
) -> dict[str, Tensor]:
    """o, the parts of the final state, and the gradients of all inputs under fixed weights.

    Without `signs` these weights are positive.
    """
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, x: Tensor) -> Tensor:
        x = x.detach() if dtype is None else x.detach().to(dtype)
        leaves[name] = x.requires_grad_(name != "initial_state 2")
        return leaves[name]

    arguments = {n: leaf(n, x) for n, x in inputs.items() if isinstance(x, Tensor)}
    parts = inputs["initial_state"]
    if parts is not None:
        arguments["initial_state"] = tuple(
            leaf(f"initial_state {number}", part) for number, part in enumerate(parts)
        )
    cu = None if shape.cu_seqlens is None else torch.tensor(shape.cu_seqlens)
    o, state = fv.scan(
        arguments.pop("q"),
        arguments.pop("k"),
        arguments.pop("v"),
        rule,
        **arguments,
        return_state=True,
        cu_seqlens=cu,
        reverse=shape.reverse,
        implementation=implementation,
    )
    outputs = {"o": o}
    finals = (state,) if isinstance(state, Tensor) else state
    outputs |= {f"state {number}": part for number, part in enumerate(finals)}
    source = torch.Generator().manual_seed(7)
    differentiable = [x for x in outputs.values() if x.requires_grad]
    weights = [torch.randn(x.shape, generator=source).to(x) for x in differentiable]
    weights = weights if signs else [x.abs() for x in weights]
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    gradients = torch.autograd.grad(
        differentiable, list(wanted.values()), weights, materialize_grads=True
    )
    found = {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {name: x.detach() for name, x in outputs.items()} | found
