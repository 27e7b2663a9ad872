"""Systems of the catalogue that thin out the attention of a trained model as it is, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from foveal._attend import attend
from foveal._errors import RefusedError
from foveal.caches.policies import POLICIES
from foveal.hf.fetched import FETCHING
from foveal.patterns import Causal
from foveal.systems import System

NAME = "foveal"
Reads = Literal["a whole", "pieces", "steps"]


@dataclass(frozen=True)
class Operator:
    """A system that finds its pairs in q and k, with options.

    reads: calls that it is made for: "a whole" sequence; "pieces" of several tokens too; single "steps"
    of generation too.  All others are exact.
    """

    name: str
    op: Callable[..., Tensor] = field(repr=False)
    causal: bool
    calls: Reads
    options: Mapping[str, Any]

    def reads(self, queries: int, keys: int) -> bool:
        """Whether a call of so many queries on so many keys is one that it is made for."""
        if self.calls == "a whole":
            return queries == keys
        return queries > 1 or self.calls == "steps"

    @property
    def alone(self) -> bool:
        """Whether sequences read together would change each other: a basis is found from all keys."""
        return self.name == "loki"

    def run(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """o [B, Lq, Hq, Dv] without padding, B = 1 for operators that are `alone`."""
        if self.alone and not bool(k.isfinite().all()):
            exact: Tensor = attend(q, k, v, Causal())
            return exact
        return self.op(q, k, v, **self.options)


_CAUSAL: dict[str, Reads] = {
    "loki": "steps",
    "minference": "a whole",
    "pbs_attention": "a whole",
    "pyramid_sparse": "a whole",
    "retrieval_attention": "steps",
    "sale": "pieces",
    "squeezed_attention": "pieces",
    "xattention": "pieces",
}
_STORES = {"lean_attention", "dist_attention", "vattention", "eigen_attention", "matryoshka_kv"}
_BIDIRECTIONAL: dict[str, Reads] = {
    "monarch_rt": "a whole",
    "pyramid_sparse": "a whole",
    "sparse_vdit": "a whole",
    "vggt_block_sparse": "a whole",
}


def operator(entry: System, causal: bool, options: Mapping[str, Any]) -> Operator:
    """The system as an operator of a model that looks back only (`causal`) or both ways.

    Raises RefusedError, with the reason, for a system that a trained model cannot take over.
    """
    known = _CAUSAL if causal else _BIDIRECTIONAL
    if entry.name not in known:
        raise RefusedError(NAME, _reason(entry, causal))
    entry.check(**options)
    given = {**options, "causal": causal} if "causal" in entry.defaults else dict(options)
    return Operator(entry.name, entry.op, causal, known[entry.name], given)


def _reason(entry: System, causal: bool) -> str:
    name = entry.name
    if name in POLICIES:
        return f'{name} is a cache policy: use(model, cache="{name}") is needed'
    if name in (_BIDIRECTIONAL if causal else _CAUSAL):
        seen = ("both ways", "only back") if causal else ("only back", "both ways")
        return f"{name} looks {seen[0]}, and this model {seen[1]}"
    if name in _STORES:
        return (
            f"{name} is a way to hold and read keys: fv.decode with a cache of foveal.caches has it"
        )
    if name in FETCHING:
        return f'{name} fetches what single tokens read: use(model, cache="{name}") is needed'
    if name == "spatten":
        return "spatten hands what it pruned to the next layer, and layers do not meet here"
    if entry.family == "sparse":
        return f"{name} needs a model that was trained with it"
    return f"{name} computes something else than fewer pairs of softmax"
