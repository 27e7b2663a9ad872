"""An implementation against the definition in float64: output, lse and every gradient."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from foveal._attend import attend
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Dense
from foveal.scores.base import Composed, Score
from foveal.scores.softmax import Softmax
from foveal.testing.bounds import Verdict, check


def check_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern = Dense(),
    score: Score = Softmax(),
    *,
    cu_seqlens: Tensor | None = None,
    return_lse: bool = True,
    implementation: str | None = None,
) -> list[Verdict]:
    """Verdicts on o, lse and the gradients of q, k, v and of every tensor of the score.

    Each result of `attend` is compared with the float64 `reference` on the same numbers, by the
    rule of `foveal.testing.bounds`; the plain computation of that rule is the `reference` in the
    dtype of q.  Options: as for `attend`; return_lse False admits implementations without lse.
    Raises AssertionError that lists the verdicts when one of them is not ok.
    """
    call = _Call(q, k, v, pattern, score, cu_seqlens, return_lse)
    exact = call.results("reference", torch.float64)
    plain = call.results("reference", None)
    found = call.results(implementation, None)
    verdicts = [check(name, found[name], plain[name], exact[name]) for name in exact]
    if not all(verdict.ok for verdict in verdicts):
        shapes = ", ".join(f"{n} {list(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v)))
        lines = "\n  ".join(str(verdict) for verdict in verdicts)
        raise AssertionError(
            f"attend({shapes}, {q.dtype}, {pattern!r}, {score.key})"
            f" by {implementation or 'the plan'}\n  {lines}"
        )
    return verdicts


@dataclasses.dataclass(frozen=True)
class _Call:
    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    score: Score
    cu_seqlens: Tensor | None
    return_lse: bool

    def results(self, implementation: str | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Results by name; `dtype` None leaves every tensor as it came."""
        leaves: dict[str, Tensor] = {}
        q, k, v = (
            _leaf(leaves, f"d{name}", getattr(self, name), dtype) for name in ("q", "k", "v")
        )
        found = attend(
            q,
            k,
            v,
            self.pattern,
            with_leaves(self.score, leaves, dtype),
            cu_seqlens=self.cu_seqlens,
            return_lse=self.return_lse,  # type: ignore[call-overload]
            implementation=implementation,
        )
        outputs = dict(zip(("o", "lse"), found if self.return_lse else (found,), strict=False))
        source = torch.Generator().manual_seed(0)
        weights = [
            torch.randn(x.shape, generator=source, dtype=torch.float64).to(x)
            for x in outputs.values()
        ]
        gradients = torch.autograd.grad(
            list(outputs.values()), list(leaves.values()), weights, allow_unused=True
        )
        results = {name: x.detach() for name, x in outputs.items()}
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            results[name] = torch.zeros_like(leaf) if gradient is None else gradient
        return results


def with_leaves(score: Score, leaves: dict[str, Tensor], dtype: torch.dtype | None) -> Score:
    """The score with each of its tensors replaced by a leaf, which is added to `leaves` by name."""
    if isinstance(score, Composed):
        return Composed(tuple(with_leaves(member, leaves, dtype) for member in score.members))
    if not dataclasses.is_dataclass(score):
        return score
    tensors = {
        field.name: tensor
        for field in dataclasses.fields(score)
        if isinstance(tensor := getattr(score, field.name), Tensor)
    }
    replaced = {
        name: _leaf(leaves, f"d{type(score).__name__}.{name}", tensor, dtype)
        for name, tensor in tensors.items()
    }
    return dataclasses.replace(score, **replaced)


def _leaf(leaves: dict[str, Tensor], name: str, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = x.detach()
    leaf = (x if dtype is None else x.to(dtype)).requires_grad_()
    leaves[name if name not in leaves else f"{name}#{len(leaves)}"] = leaf
    return leaf
