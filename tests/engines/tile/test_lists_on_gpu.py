"""Lists on a GPU: kernels along them, their choice, and how they are made, against float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.compose import SparseBranches, native_sparse
from foveal.compose.native_sparse import compress_mean, gated_sum
from foveal.engines.tile import rows, select, token_attend
from foveal.engines.tile.token_lists import TokenLists, block_spans
from foveal.engines.tile.windows import windows
from foveal.selectors import VerticalSlash
from foveal.testing import check_attend
from foveal.testing.bounds import Verdict, check, error
from tests.engines.tile.interpreted_tokens import key_lists, shares

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@dataclasses.dataclass(frozen=True)
class Sizes:
    length: int
    heads: int
    kv_heads: int
    dim: int = 128
    block: int = 64
    dtype: torch.dtype = torch.bfloat16
    value_dim: int | None = None
    causal: bool = True
    keys: int | None = None

    def draw(self, source: torch.Generator) -> list[Tensor]:
        keys = self.length if self.keys is None else self.keys
        value_dim = self.dim if self.value_dim is None else self.value_dim
        shapes = (
            (2, self.length, self.heads, self.dim),
            (2, keys, self.kv_heads, self.dim),
            (2, keys, self.kv_heads, value_dim),
        )
        return [torch.randn(s, generator=source).to("cuda", self.dtype) for s in shapes]


TOKENS = (
    Sizes(130, 4, 2, 64, dtype=torch.float32),
    Sizes(130, 16, 1, 32, block=16, dtype=torch.float32),
    Sizes(150, 40, 1, 128),
    Sizes(150, 4, 1, 192, value_dim=128),
    Sizes(150, 4, 2, 256),
    Sizes(777, 8, 2),
    Sizes(400, 4, 4),
    Sizes(300, 32, 2),
    Sizes(300, 6, 1, 64),
    Sizes(200, 4, 2, block=32),
    Sizes(301, 4, 2, block=128, keys=450),
    Sizes(200, 4, 2, 64, dtype=torch.float16, causal=False),
    Sizes(150, 16, 1, 64, dtype=torch.float16),
    Sizes(150, 4, 2, 80, dtype=torch.bfloat16, value_dim=48),
    Sizes(333, 32, 2, 64),
    Sizes(301, 32, 2, dtype=torch.float16, keys=450),
    Sizes(301, 16, 1, block=128, keys=450, causal=False),
    Sizes(222, 16, 1, 32, block=16, value_dim=128),
    Sizes(222, 16, 1, 80),
    Sizes(3, 16, 1, keys=5000),
)


@pytest.mark.parametrize("sizes", TOKENS, ids=str)
def test_tokens_along_their_lists(sizes: Sizes, source: torch.Generator) -> None:
    q, k, v = sizes.draw(source)
    blocks = -(-k.shape[1] // sizes.block)
    mask = torch.rand(2, sizes.kv_heads, sizes.length, blocks, generator=source) < 0.4
    pattern: fv.Pattern = fv.Blocks(fv.BlockSelection.from_block_mask(mask.cuda(), 1, sizes.block))
    pattern = pattern & fv.Causal() if sizes.causal else pattern
    check_attend(q, k, v, pattern, implementation="triton")


@pytest.mark.parametrize("by_key", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(777, 8, 2),
        Sizes(300, 4, 4, 64, 32, keys=400),
        Sizes(260, 6, 1, 80),
        Sizes(500, 32, 2),
        Sizes(333, 12, 1, 64, dtype=torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("near", [(1, 2), (0, 1), (2, 1)])
def test_near_blocks(
    sizes: Sizes, near: tuple[int, int], by_key: bool, source: torch.Generator
) -> None:
    """Blocks that all tokens beside each other list are computed for them together."""
    q, k, v = sizes.draw(source)
    starts, stops = block_spans(k.shape[1], sizes.block, q.device)
    shift = k.shape[1] - sizes.length
    own = (torch.arange(sizes.length) + shift)[:, None] // sizes.block
    block = torch.arange(len(starts))
    mask = torch.rand(2, sizes.kv_heads, sizes.length, len(starts), generator=source) < 0.4
    mask = (mask | (block < near[0]) | (block > own - near[1])) & (block <= own)
    selection = fv.BlockSelection.from_block_mask(mask.cuda(), 1, sizes.block)
    lists = TokenLists(selection.indices, starts, stops, sizes.block, True, shift, near)
    found = token_attend.forward(q, k, v, lists, sizes.dim**-0.5, by_key)
    pattern = fv.Blocks(selection) & fv.Causal()
    wide = (x.double() for x in (q, k, v))
    exact = fv.attend(*wide, pattern, return_lse=True, implementation="reference")
    plain = fv.attend(q, k, v, pattern, return_lse=True, implementation="reference")
    lse = found[1].transpose(1, 2) * math.log(2)
    judged = zip(("o", "lse"), (found[0], lse), plain, exact, strict=True)
    raise_bad([check(*each) for each in judged])


def drawn_lists(sizes: Sizes, source: torch.Generator) -> tuple[TokenLists, fv.Pattern]:
    """Lists in which every fifth token lists nothing, and their pattern."""
    keys = sizes.length if sizes.keys is None else sizes.keys
    starts, stops = block_spans(keys, sizes.block, torch.device("cuda"))
    mask = torch.rand(2, sizes.kv_heads, sizes.length, len(starts), generator=source) < 0.4
    mask[:, :, ::5] = False
    selection = fv.BlockSelection.from_block_mask(mask.cuda(), 1, sizes.block)
    causal, shift = sizes.causal, keys - sizes.length
    lists = TokenLists(selection.indices.int(), starts, stops, sizes.block, causal, shift)
    return lists, fv.Blocks(selection) & fv.Causal() if causal else fv.Blocks(selection)


BESIDE = (
    Sizes(301, 32, 2, keys=450),
    Sizes(222, 16, 1, 64, dtype=torch.float16),
    Sizes(97, 32, 2, 64, block=32, value_dim=128, causal=False),
)


@pytest.mark.parametrize("sizes", BESIDE, ids=str)
def test_rows_beside_what_is_not_finite(sizes: Sizes, source: torch.Generator) -> None:
    q, k, v = sizes.draw(source)
    lists, pattern = drawn_lists(sizes, source)
    k[0, 5, 0, 3], v[0, 70, -1, 1], v[1, 20, 0, 7] = torch.inf, torch.nan, -torch.inf
    o, _ = token_attend.forward(q, k, v, lists, sizes.dim**-0.5)
    wide = [x.double() for x in (q, k, v)]
    exact = fv.attend(*wide, pattern, implementation="reference")
    plain = fv.attend(q, k, v, pattern, implementation="reference")
    finite = exact.isfinite()
    assert torch.equal(o.isfinite(), finite)
    assert not finite.all()
    kept = (torch.where(finite, x, 0.0) for x in (o, plain, exact))
    raise_bad([check("o", *kept)])


@pytest.mark.parametrize("sizes", BESIDE, ids=str)
def test_repeats_are_alike(sizes: Sizes, source: torch.Generator) -> None:
    q, k, v = sizes.draw(source)
    lists, _ = drawn_lists(sizes, source)
    first, *others = (token_attend.forward(q, k, v, lists, 0.1) for _ in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("sizes", BESIDE[:2], ids=str)
def test_keys_that_lie_between_others(sizes: Sizes, source: torch.Generator) -> None:
    """Keys and values as parts of one projection, and with heads in front of tokens."""
    q, k, v = sizes.draw(source)
    lists, _ = drawn_lists(sizes, source)
    wanted = token_attend.forward(q, k, v, lists, 0.1)
    joined = torch.cat([k, v], 2)
    between = joined[:, :, : k.shape[2]], joined[:, :, k.shape[2] :]
    ahead = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    for keys in (between, ahead):
        found = token_attend.forward(q, *keys, lists, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("columns 64 q", Sizes(777, 4, 2)),
        ("columns 128 kv", Sizes(500, 8, 2, 64, causal=False)),
        ("columns 24 one", Sizes(300, 6, 2, dtype=torch.float16, keys=411)),
        ("tokens 1 kv", Sizes(300, 8, 2)),
        ("tokens 1 q", Sizes(200, 4, 2, 64, keys=333)),
        ("tokens 16 one", Sizes(300, 32, 2, causal=False)),
        ("spans 1 kv", Sizes(200, 6, 2)),
        ("spans 64 q", Sizes(333, 4, 4, 80, value_dim=48)),
        ("spans 128 kv", Sizes(444, 4, 2, 64, dtype=torch.float32)),
    ],
    ids=str,
)
def test_keys_runs_and_columns(kind: str, sizes: Sizes, source: torch.Generator) -> None:
    q, k, v = sizes.draw(source)
    name, block, of = kind.split()
    keys = sizes.length if sizes.keys is None else sizes.keys
    heads = {"one": 1, "kv": sizes.kv_heads, "q": sizes.heads}[of]
    shape = (2, heads, -(-sizes.length // int(block)))
    found = key_lists(name, int(block), shape, keys, source)
    moved = (x.cuda() if isinstance(x, Tensor) else x for x in dataclasses.astuple(found))
    pattern: fv.Pattern = fv.Chosen(type(found)(*moved))
    pattern = pattern & fv.Causal() if sizes.causal else pattern
    check_forward(q, k, v, pattern, "triton")


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (Sizes(1000, 4, 2), (60, 200, 64, 30, 100, 64)),
        (Sizes(777, 4, 1, 64), (200, 30, 64, 30, 20, 128)),
    ],
    ids=str,
)
def test_vertical_and_slash(
    sizes: Sizes, options: tuple[int, ...], source: torch.Generator
) -> None:
    q, k, v = sizes.draw(source)
    pattern = fv.Chosen(VerticalSlash(*options).select(q, k)) & fv.Causal()
    check_forward(q, k, v, pattern, "triton")


def check_forward(q: Tensor, k: Tensor, v: Tensor, pattern: fv.Pattern, name: str | None) -> None:
    """o and lse alone."""
    wide = (x.double() for x in (q, k, v))
    exact = fv.attend(*wide, pattern, return_lse=True, implementation="reference")
    plain = fv.attend(q, k, v, pattern, return_lse=True, implementation="reference")
    found = fv.attend(q, k, v, pattern, return_lse=True, implementation=name)
    judged = zip(("o", "lse"), found, plain, exact, strict=True)
    raise_bad([check(*each) for each in judged])


def raise_bad(verdicts: list[Verdict]) -> None:
    bad = [str(verdict) for verdict in verdicts if not verdict.ok]
    assert not bad, "; ".join(bad)


CHOICES = (
    (700, 8, 2, 128, (32, 16, 64, 6), None, torch.bfloat16),
    (1500, 16, 1, 128, (64, 64, 64, 16), None, torch.bfloat16),
    (900, 4, 4, 128, (32, 16, 64, 8), None, torch.bfloat16),
    (1300, 12, 2, 64, (64, 64, 64, 6), (0, 100, 101, 700, 1300), torch.bfloat16),
    (600, 4, 2, 64, (32, 16, 128, 20), None, torch.float16),
    (600, 4, 1, 64, (32, 8, 32, 5), None, torch.float32),
    (9000, 2, 1, 64, (32, 32, 32, 16), None, torch.bfloat16),
    (2100, 4, 4, 192, (16, 16, 16, 9), None, torch.bfloat16),
)


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_choice_of_blocks(case: tuple, source: torch.Generator) -> None:  # type: ignore[type-arg]
    """Nothing that is left out has a better score than what is listed, but for roundings."""
    length, heads, kv_heads, dim, (size, stride, block, best), cuts, dtype = case
    q, k, _ = Sizes(length, heads, kv_heads, dim, dtype=dtype).draw(source)
    cu = None if cuts is None else torch.tensor(cuts, device="cuda")
    table = windows(length, length, size, stride, block, q.device, cu)
    keys = compress_mean(k, table)
    scale = dim**-0.5
    window = torch.arange(table.count, device="cuda")
    hidden = (window < table.first[:, None] * table.step) | (window >= table.seen[:, None])
    shared = keys.double().repeat_interleave(heads // kv_heads, 2)
    s = torch.einsum("bthd,bwhd->bthw", q.double(), shared) * scale
    s = s.masked_fill(hidden[:, None], -torch.inf)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse[..., None]).nan_to_num(0.0).unflatten(2, (kv_heads, -1)).sum(3)
    score = p.transpose(1, 2) @ select._bins(table)
    choice = select.Choice(best, 1, 2)
    found = select.select(q, keys, lse.float(), table, choice, scale)
    blocks = score.shape[-1]
    number = torch.arange(blocks, device="cuda")
    allowed = (number >= table.first[:, None]) & (number <= table.own[:, None])
    forced = allowed & ((number == table.first[:, None]) | (number > table.own[:, None] - 2))
    assert torch.equal(
        (found >= 0).sum(-1), allowed.sum(-1).clamp(max=best).expand(2, kv_heads, -1)
    )
    listed = fv.BlockSelection(found, 1, block).block_mask(blocks)
    assert not (listed & ~allowed).any()
    assert not (forced & ~listed).any()
    least = score.masked_fill(~listed | forced, torch.inf).amin(-1)
    most = score.masked_fill(listed | ~allowed, 0.0).amax(-1)
    assert (least >= most * (1 - 2.0**-10) - 1e-12).all()


@pytest.mark.parametrize("width", [1, 31, 512, 1024])
def test_rows_without_sorts(width: int, source: torch.Generator) -> None:
    scores = torch.randn(2, 3, 9, width, generator=source).round(decimals=2)
    scores[0, 0, 0] = -torch.inf
    scores[0, 1, 2, : width // 2] = torch.inf
    counts = torch.randint(0, width + 2, (2, 3, 9, 1), generator=source).float()
    mask = torch.rand(2, 3, 9, width, generator=source) < 0.2
    states = torch.randint(0, 3, (2, 3, 9, width), generator=source).to(torch.uint8)
    assert torch.equal(rows.best(scores.cuda(), counts.cuda()).cpu(), rows.best(scores, counts))
    whole = shares(scores)
    for mass in (0.0, 0.4, 1.0):
        assert torch.equal(rows.heaviest(whole.cuda(), mass).cpu(), rows.heaviest(whole, mass))
    assert torch.equal(rows.places(mask.cuda()).cpu(), rows.places(mask))
    assert torch.equal(rows.walk_words(states.cuda(), 3).cpu(), rows.walk_words(states, 3))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.bfloat16, 3), (torch.float32, 3), (torch.bfloat16, 2)]
)
def test_gated_sum(dtype: torch.dtype, count: int, shared: bool, source: torch.Generator) -> None:
    outputs = [torch.randn(2, 333, 6, 80, generator=source).to("cuda", dtype) for _ in range(count)]
    gates = torch.rand(2, 333, 1 if shared else 6, 3, generator=source).to("cuda", dtype)
    do = torch.randn(2, 333, 6, 80, generator=source).to("cuda", dtype)

    def run(cast: torch.dtype, unsigned: bool = False) -> list[Tensor]:
        leaves = [(x.abs() if unsigned else x).to(cast).requires_grad_() for x in (gates, *outputs)]
        o = gated_sum(tuple(leaves[1:]), leaves[0])
        weight = (do.abs() if unsigned else do).to(cast)
        return [o.detach(), *torch.autograd.grad(o, leaves, weight)]

    judged = zip(run(dtype), run(torch.float64), run(torch.float64, True), strict=True)
    raise_bad([check(str(n), *(a, 0.0, b, c)) for n, (a, b, c) in enumerate(judged)])


NATIVE = (
    (Sizes(700, 8, 2), SparseBranches(best=16, window=100), None),
    (Sizes(450, 16, 1), SparseBranches(64, 64, 64, 16, window=64), None),
    (Sizes(450, 8, 2), SparseBranches(64, 64, 64, 16, window=0), None),
    (Sizes(500, 4, 4, 64), SparseBranches(best=16, window=80), (0, 100, 101, 333, 500)),
    (Sizes(300, 4, 2, 64, dtype=torch.float16), SparseBranches(best=16), None),
)


@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_native_sparse_where_all_blocks_are_listed(
    case: tuple[Sizes, SparseBranches, tuple[int, ...] | None], source: torch.Generator
) -> None:
    """Then a rounding decides on no list, and outputs can be compared."""
    sizes, branches, cuts = case
    q, k, v = (x[:1] for x in sizes.draw(source))
    gates = torch.rand(1, sizes.length, sizes.heads, 3, generator=source).to(q)
    do = torch.randn(q.shape, generator=source, dtype=torch.float64)

    def run(dtype: torch.dtype, device: str) -> list[Tensor]:
        leaves = [x.detach().to(device, dtype).requires_grad_() for x in (q, k, v, gates)]
        cu = None if cuts is None else torch.tensor(cuts, device=device)
        o = native_sparse(*leaves, branches=branches, cu_seqlens=cu)
        return [x.cpu() for x in (o.detach(), *torch.autograd.grad(o, leaves, do.to(o)))]

    found, exact = run(sizes.dtype, "cuda"), run(torch.float64, "cpu")
    plain = run(sizes.dtype, "cpu")
    judged = zip(("o", "dq", "dk", "dv", "dgates"), found, plain, exact, strict=True)
    raise_bad([check(n, a, error(b, c), c) for n, a, b, c in judged])


BESIDE_NATIVE = (
    (Sizes(701, 32, 2), SparseBranches(best=16, window=100), None),
    (Sizes(450, 16, 1, 64), SparseBranches(64, 64, 64, 16, window=0), None),
    (Sizes(500, 32, 2), SparseBranches(best=16, window=80), (0, 100, 101, 333, 500)),
    (Sizes(333, 16, 1, 64, dtype=torch.float16), SparseBranches(best=16), None),
    (Sizes(701, 4, 2), SparseBranches(64, 64, 64, 16, window=100), None),
    (Sizes(500, 12, 4, 64), SparseBranches(32, 32, 32, 16, window=0), (0, 100, 101, 333, 500)),
)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("case", BESIDE_NATIVE, ids=str)
def test_native_sparse_without_gradients(
    case: tuple[Sizes, SparseBranches, tuple[int, ...] | None],
    shared: bool,
    source: torch.Generator,
) -> None:
    """The gates are applied by the pass along the lists, where it has them."""
    sizes, branches, cuts = case
    q, k, v = (x[:1] for x in sizes.draw(source))
    heads = 1 if shared else sizes.heads
    gates = torch.rand(1, sizes.length, heads, 3, generator=source).to(q)

    def run(dtype: torch.dtype, device: str) -> Tensor:
        own = (x.to(device, dtype) for x in (q, k, v, gates))
        cu = None if cuts is None else torch.tensor(cuts, device=device)
        return native_sparse(*own, branches=branches, cu_seqlens=cu).cpu()

    found, exact = run(sizes.dtype, "cuda"), run(torch.float64, "cpu")
    raise_bad([check("o", found, error(run(sizes.dtype, "cpu"), exact), exact)])
