"""What a process with Triton's interpreter runs: the Triton edition of the decode engine on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import foveal as fv
from foveal.caches import Cache, Contiguous, KVShape, Latent, Paged, Pruned, Quantised
from tests.engines.decode.problems import verdicts

Make = Callable[[torch.Generator], tuple[Tensor, Cache, fv.Score, fv.Pattern]]


def _case(
    cache: Cache,
    source: torch.Generator,
    Lq: int = 1,
    groups: int = 2,
    lengths: tuple[int, ...] = (70, 0, 33),
    score: fv.Score = fv.Softmax(),
    pattern: fv.Pattern = fv.Causal(),
) -> tuple[Tensor, Cache, fv.Score, fv.Pattern]:
    shape = cache.shape
    size = (len(lengths), max(lengths), shape.kv_heads)
    if isinstance(cache, Latent):
        widths = cache.latent_dim, cache.rope_dim
    else:
        widths = shape.head_dim, shape.values
    k, v = (torch.randn(*size, n, generator=source).to(shape.dtype) for n in widths)
    cache.append(k, v, counts=lengths)
    heads = groups * shape.kv_heads
    q = torch.randn(len(lengths), Lq, heads, shape.head_dim, generator=source)
    return q.to(shape.dtype), cache, score, pattern


def _shape(dtype: torch.dtype = torch.float32, head_dim: int = 12, value_dim: int = 20) -> KVShape:
    return KVShape(3, 2, head_dim, value_dim, dtype)


CASES: dict[str, Make] = {
    "pages of 16": lambda s: _case(Paged(_shape(), pages=20), s),
    "pages of 3 per head, float16, sink": lambda s: _case(
        Paged(_shape(torch.float16), pages=80, page_size=3, per_head=True),
        s,
        score=fv.Softmax(sink=torch.randn(4, generator=s).half()),
    ),
    "several queries, key bias": lambda s: _case(
        Paged(_shape(), pages=20),
        s,
        Lq=7,
        score=fv.Softmax() + fv.KeyBias(torch.randn(3, 2, 80, generator=s)),
    ),
    "window and sinks, several queries": lambda s: _case(
        Contiguous(_shape(), max_tokens=300),
        s,
        Lq=5,
        lengths=(280, 3, 33),
        pattern=fv.Sliding(40, 0, 3),
    ),
    "long sequences, float16": lambda s: _case(
        Paged(_shape(torch.float16, 128, 128), pages=30), s, lengths=(300, 0, 129)
    ),
    "window, one query, soft cap": lambda s: _case(
        Paged(_shape(), pages=9, page_size=128),
        s,
        lengths=(300, 3, 33),
        pattern=fv.Sliding(100, 0, 2),
        score=fv.Softmax(soft_cap=3.0),
    ),
    "row tiles, slopes": lambda s: _case(
        Paged(_shape(), pages=20),
        s,
        Lq=37,
        groups=3,
        score=fv.Softmax() + fv.Alibi(torch.rand(6, generator=s)),
    ),
    "fp8": lambda s: _case(Quantised(_shape(), pages=20), s),
    "int8": lambda s: _case(Quantised(_shape(), pages=20, bits="int8"), s),
    "int4, several queries": lambda s: _case(Quantised(_shape(), pages=20, bits="int4"), s, Lq=3),
    "pruned": lambda s: _case(Pruned(_shape(), pages=9, recent=3, group=64), s),
    "latent": lambda s: _case(
        Latent(3, 16, 8, pages=20, page_size=16, dtype=torch.float32), s, Lq=2, groups=4
    ),
}


def failures(name: str, seed: int, lean: bool = False) -> list[str]:
    """What is worse than the precision allows."""
    q, cache, score, pattern = CASES[name](torch.Generator().manual_seed(seed))
    checked = verdicts(q, cache, score, pattern, "triton")
    return [str(verdict) for verdict in checked if not verdict.ok]


def nan_stays(seed: int) -> tuple[bool, bool, bool]:
    """Other sequences, earlier queries and old contents of pages: none is touched by NaN."""
    source = torch.Generator().manual_seed(seed)
    q, cache, _, _ = _case(Paged(_shape(), pages=20), source, Lq=2)
    clean = fv.decode(q, cache, implementation="triton")
    cache.free([2])
    bad = torch.full((3, 33, 2, 12), torch.nan)
    cache.append(bad, torch.full((3, 33, 2, 20), torch.nan), counts=(0, 0, 33))
    dirty = fv.decode(q, cache, implementation="triton")
    others = torch.equal(clean[:2], dirty[:2]) and bool(dirty[2].isnan().all())
    cache.free([2])
    old = bool(fv.decode(q, cache, implementation="triton")[:2].isfinite().all())
    value = torch.full((3, 1, 2, 20), torch.nan)
    cache.append(torch.zeros(3, 1, 2, 12), value, counts=(1, 0, 0))
    o = fv.decode(q, cache, implementation="triton")[0]
    return others, old, bool(o[0].isfinite().all()) and bool(o[1].isnan().all())
