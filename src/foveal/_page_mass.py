"""page_mass(): how much of a decode every page of the cache accounts for."""

from __future__ import annotations

from torch import Tensor

from foveal._autocast import in_own_dtypes
from foveal._decode import asked, decode
from foveal._errors import CacheError
from foveal._host import on_host
from foveal.caches.base import Cache
from foveal.engines.decode.mass import page_weights
from foveal.engines.decode.problem import describe_decode, describe_terms
from foveal.patterns.base import Pattern
from foveal.patterns.dense import Causal
from foveal.scores.base import Score
from foveal.scores.softmax import Softmax


@on_host
@in_own_dtypes
def page_mass(
    q: Tensor,
    cache: Cache,
    score: Score = Softmax(),
    *,
    pattern: Pattern = Causal(),
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """o and lse as `decode`, and m_p = sum over queries i and keys j of page p of their weight w_ij.

    Shapes: q [B, Lq, Hq, D]; returns o [B, Lq, Hq, Dv], lse [B, Lq, Hq] and the mass [B, Hq, pages], pages of
    cache.page_size tokens in the order of storage, in float32 (float64 for float64).  The mass of a
    query head sums to Lq, less what a sink takes and queries that see nothing.
    Options: as for `decode`, which runs first; the masses are a second pass over the keys in PyTorch.
    Limits: a cache of one part whose keys are kept whole or quantised.
    Paper: PagedEviction (2509.04377) and retrieval by pages judge pages by such masses.
    """
    parts = asked(q, cache)
    if len(parts) > 1 or type(cache).project is not Cache.project:
        raise CacheError(
            "cache", type(cache).__name__, "a cache of one part of whole keys is needed"
        )
    o, lse = decode(
        q, cache, score, pattern=pattern, return_lse=True, implementation=implementation
    )
    problem = describe_decode(q, cache.shape, parts)
    terms = describe_terms(problem, score, pattern, parts)
    return o, lse, page_weights(parts[0].view, terms, q, lse)
