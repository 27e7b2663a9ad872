"""What `use` asks of a layer beside what the layer itself says: fewer pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveal._errors import PatternError, RefusedError
from foveal.hf.layer_call import LayerCall, solve
from foveal.hf.prefill import Operator
from foveal.patterns import Causal, Dense, Extent, Pattern
from foveal.scores import Bias, Softmax


@dataclass(frozen=True)
class Selected:
    """Fewer pairs: `pattern` gives those of a sequence of some length, `operator` finds them in q and k."""

    pattern: Callable[[int], Pattern] | None = None
    operator: Operator | None = None

    def solve(self, call: LayerCall) -> Tensor:
        """o [B, Lq, Hq, Dv] of a call on these pairs."""
        if self.operator is not None:
            return _operated(call, self.operator)
        o: Tensor = solve(self._fewer(call))
        return o

    def _fewer(self, call: LayerCall) -> LayerCall:
        assert self.pattern is not None
        kept = self.pattern(call.k.shape[1]) & call.pattern
        if call.reads_a_whole:
            return replace(call, pattern=kept)
        try:
            kept.validate(Extent((call.q.shape[1],), (call.k.shape[1],)))
        except PatternError:
            return _last_rows(call, self.pattern)
        return replace(call, pattern=kept)


def _operated(call: LayerCall, operator: Operator) -> Tensor:
    """Every sequence, or document, by itself; exact attention where the operator reads no such call."""
    if not operator.reads(call.q.shape[1], call.k.shape[1]):
        o: Tensor = solve(call)
        return o
    score = call.score
    if not isinstance(score, Softmax) or score.soft_cap is not None or score.sink is not None:
        needed = "it takes the softmax of scaled products, and this layer computes another score"
        raise RefusedError(operator.name, needed)
    if not isinstance(call.pattern, Causal if operator.causal else Dense):
        seen = "earlier tokens" if operator.causal else "all tokens"
        raise RefusedError(operator.name, f"it chooses among {seen}; this layer sees others")
    factor = 1.0 if score.scale is None else score.scale * call.q.shape[-1] ** 0.5
    q = call.q if factor == 1.0 else call.q * factor
    if call.padding is None and call.documents is None and not operator.alone:
        return operator.run(q, call.k, call.v)
    o = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
    for row, keys, queries in _sequences(call):
        own = (q[row, queries][None], call.k[row, keys][None], call.v[row, keys][None])
        o = o.index_put((queries.new_tensor(row), queries), operator.run(*own)[0])
    return o


def _sequences(call: LayerCall) -> list[tuple[int, Tensor, Tensor]]:
    """(row, places of its keys, places of its queries) of every sequence that stands alone."""
    found = []
    behind = call.k.shape[1] - call.q.shape[1]
    every = torch.ones(call.k.shape[:2], dtype=torch.bool, device=call.k.device)
    padding = every if call.padding is None else call.padding
    for row, real in enumerate(padding):
        if call.documents is not None:
            numbers = call.documents[row]
            found += [(row, x, x) for n in numbers.unique() for x in [_places(numbers == n)]]
        else:
            found.append((row, _places(real), _places(real[behind:])))
    return [each for each in found if len(each[2])]


def _places(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _last_rows(call: LayerCall, pattern: Callable[[int], Pattern]) -> LayerCall:
    """The last queries of the sequence so far, for patterns that need a query for every key."""
    Lq, Lk = call.q.shape[1], call.k.shape[1]
    lengths = [Lk] if call.padding is None else call.padding.sum(-1).tolist()
    terms = torch.full((len(lengths), 1, Lq, Lk), -torch.inf)
    for row, length in enumerate(lengths):
        extent = Extent((length,), (length,))
        q_pos = torch.arange(length - min(Lq, length), length)
        kept = pattern(length) & call.pattern
        visible = kept.allows(q_pos[:, None], torch.arange(length)[None], extent)
        terms[row, 0, Lq - len(q_pos) :, Lk - length :].masked_fill_(visible, 0.0)
    return replace(call, pattern=Dense(), score=call.score + Bias(terms.to(call.q.device)))
