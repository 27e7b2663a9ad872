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

_NEARBY = 60
"""Nearby inputs at which the error of a plain computation is taken before a verdict is final."""


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
    dtype of q.  On few numbers a plain computation can be lucky, so before a verdict is final its
    error is also taken at nearby inputs.
    Options: as for `attend`; return_lse False admits implementations without lse.
    Raises AssertionError that lists the verdicts when one of them is not ok.
    """
    call = _Call(q, k, v, pattern, score, cu_seqlens, return_lse)
    exact = call.results("reference", torch.float64)
    terms = call.terms(exact)
    found = call.results(implementation, None)
    for near in (None, *range(_NEARBY)):
        plain = call.plain(exact, near)
        verdicts = [check(n, found[n], plain[n], exact[n], terms[n]) for n in exact]
        if all(verdict.ok for verdict in verdicts):
            break
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

    def results(
        self,
        implementation: str | None,
        dtype: torch.dtype | None,
        weights: dict[str, Tensor] | None = None,
        near: int | None = None,
    ) -> dict[str, Tensor]:
        """Results by name; `dtype` None leaves every tensor as it came, `near` moves it a little."""
        leaves = _Leaves(dtype, near)
        q, k, v = (leaves.add(f"d{name}", getattr(self, name)) for name in ("q", "k", "v"))
        found = attend(
            q,
            k,
            v,
            self.pattern,
            _with_leaves(self.score, leaves),
            cu_seqlens=self.cu_seqlens,
            return_lse=self.return_lse,  # type: ignore[call-overload]
            implementation=implementation,
        )
        outputs = dict(zip(("o", "lse"), found if self.return_lse else (found,), strict=False))
        weights = self.weights(outputs) if weights is None else weights
        gradients = torch.autograd.grad(
            list(outputs.values()),
            list(leaves.by_name.values()),
            [weights[name].to(x) for name, x in outputs.items()],
            allow_unused=True,
        )
        results = {name: x.detach() for name, x in outputs.items()}
        for (name, leaf), gradient in zip(leaves.by_name.items(), gradients, strict=True):
            results[name] = torch.zeros_like(leaf) if gradient is None else gradient
        return results

    def plain(self, exact: dict[str, Tensor], near: int | None) -> dict[str, Tensor]:
        """The exact results with the error that a plain computation makes at nearby inputs."""
        if near is None:
            return self.results("reference", None)
        plain = self.results("reference", None, near=near)
        there = self.results("reference", torch.float64, near=near)
        return {
            name: exact[name] + (plain[name].double() - there[name]).nan_to_num(0.0)
            for name in exact
        }

    def weights(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same random cotangents in every call."""
        source = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(x.shape, generator=source, dtype=torch.float64)
            for name, x in outputs.items()
        }

    def terms(self, exact: dict[str, Tensor]) -> dict[str, Tensor]:
        """How large the terms are that the results sum: v and the cotangents without signs.

        dS = P (dP - delta + dlse), delta = sum(do o): one evaluation holds P dP alone, as its dlse
        is delta, the other the part of delta.
        """
        unsigned = dataclasses.replace(self, v=self.v.detach().abs(), return_lse=True)
        o = unsigned.results("reference", torch.float64)["o"]
        do = self.weights(exact)["o"].abs().to(o)
        both = []
        for dlse in (torch.zeros(o.shape[:-1], dtype=o.dtype, device=o.device), (do * o).sum(-1)):
            both.append(unsigned.results("reference", torch.float64, {"o": do, "lse": dlse}))
        return {name: torch.maximum(both[0][name].abs(), both[1][name].abs()) for name in exact}


class _Leaves:
    """Tensors made into leaves of the graph, by name."""

    def __init__(self, dtype: torch.dtype | None, near: int | None) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._dtype = dtype
        self._source = None if near is None else torch.Generator().manual_seed(near)

    def add(self, name: str, x: Tensor) -> Tensor:
        x = x.detach()
        if self._source is not None:
            step = max(32 * torch.finfo(x.dtype).eps, 2.0**-10)
            x = x * (1 + step * torch.randn(x.shape, generator=self._source)).to(x)
        leaf = (x if self._dtype is None else x.to(self._dtype)).requires_grad_()
        self.by_name[name if name not in self.by_name else f"{name}#{len(self.by_name)}"] = leaf
        return leaf


def _with_leaves(score: Score, leaves: _Leaves) -> Score:
    """The score with a leaf in place of each of its tensors."""
    if isinstance(score, Composed):
        return Composed(tuple(_with_leaves(member, leaves) for member in score.members))
    if not dataclasses.is_dataclass(score):
        return score
    replaced = {
        field.name: leaves.add(f"d{type(score).__name__}.{field.name}", tensor)
        for field in dataclasses.fields(score)
        if isinstance(tensor := getattr(score, field.name), Tensor)
    }
    return dataclasses.replace(score, **replaced)
