import pytest
import torch

import foveal as fv
from foveal.patterns.documents import Packed, pack
from foveal.testing import Sizes, check, check_attend, check_pattern, packed_lengths, qkv

LENGTHS = (5, 0, 13, 1, 0, 24, 13, 8)
INNER = [
    fv.Dense(),
    fv.Causal(),
    fv.Sliding(3, 1),
    fv.Sliding(3, 0, sink_tokens=2),
    fv.Strided(3),
    fv.Strided(2, causal=False),
    fv.Fixed(4, 1),
    fv.Partition(4, 1, 2, 0),
    fv.Neighborhood(1, border="clip"),
    fv.Axial(0, causal=True),
    fv.Causal() & fv.Strided(2, causal=False),
    fv.Sliding(2) | fv.Strided(4),
]


def block_diagonal(inner: fv.Pattern, lengths: tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for length in lengths:
        if length:
            stop = start + length
            mask[start:stop, start:stop] = inner.dense_mask(length, length)
            start = stop
    return mask


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_each_document_on_its_own(inner: fv.Pattern) -> None:
    total = sum(LENGTHS)
    assert torch.equal(
        Packed(inner, LENGTHS).dense_mask(total, total), block_diagonal(inner, LENGTHS)
    )


@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize("lengths", [LENGTHS, (9,), (0, 7, 0), (1, 1, 1), (6, 6, 6)], ids=str)
def test_keeps_every_promise(inner: fv.Pattern, lengths: tuple[int, ...]) -> None:
    check_pattern(Packed(inner, lengths), [sum(lengths)], random_extents=0)


@pytest.mark.parametrize(
    "inner", [fv.Neighborhood(3), fv.Neighborhood(2, dilation=2), fv.Neighborhood(3, border="wrap")]
)
def test_neighborhoods_keep_every_promise(inner: fv.Pattern) -> None:
    check_pattern(Packed(inner, (7, 0, 5, 12, 5)), [29], random_extents=0)


@pytest.mark.parametrize(
    ("pattern", "inner"),
    [
        *((inner, inner) for inner in INNER),
        (fv.Documents(), fv.Dense()),
        (fv.Documents() & fv.Causal(), fv.Causal()),
        (fv.Neighborhood(3, border="wrap"), fv.Neighborhood(3, border="wrap")),
    ],
    ids=repr,
)
def test_packed_call_equals_one_call_per_document(
    pattern: fv.Pattern, inner: fv.Pattern, source: torch.Generator
) -> None:
    lengths = (5, 0, 13, 3, 0, 24)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    sizes = Sizes((45,), q_heads=4, kv_heads=2, head_dim=5, value_dim=3)
    q, k, v = qkv(sizes, source, torch.float64)
    for implementation in ("cpu", "reference"):
        o, lse = fv.attend(
            q, k, v, pattern, cu_seqlens=cu_seqlens, return_lse=True, implementation=implementation
        )
        for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            if start == stop:
                continue
            part = (x[:, start:stop] for x in (q, k, v))
            one, one_lse = fv.attend(*part, inner, return_lse=True, implementation="reference")
            assert check("o", o[:, start:stop], one, one).ok
            assert check("lse", lse[:, start:stop], one_lse, one_lse).ok


def test_gradients_of_random_documents(source: torch.Generator) -> None:
    for documents in (1, 3, 8):
        cu_seqlens = packed_lengths(50, documents, source)
        q, k, v = qkv(Sizes((50,), q_heads=2, kv_heads=1), source)
        check_attend(q, k, v, fv.Causal(), cu_seqlens=cu_seqlens, implementation="cpu")


def test_offsets_of_a_wrapped_window_are_those_inside_the_document(
    source: torch.Generator,
) -> None:
    lengths = (7, 12, 5)
    q, k, v = qkv(Sizes((24,), head_dim=4), source, torch.float64)
    pattern = fv.Neighborhood(3, border="wrap")
    score = fv.RelativeBias(torch.randn(1, 5, generator=source, dtype=torch.float64))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    o = fv.attend(q, k, v, pattern, score, cu_seqlens=cu_seqlens, implementation="reference")
    start = 0
    for length in lengths:
        part = (x[:, start : start + length] for x in (q, k, v))
        one = fv.attend(*part, pattern, score, implementation="reference")
        torch.testing.assert_close(o[:, start : start + length], one)
        start += length


@pytest.mark.parametrize(
    ("pattern", "inner"),
    [
        ((fv.Documents() & fv.Causal()) & fv.Sliding(3), fv.Sliding(3)),
        (fv.Sliding(3) & (fv.Causal() & fv.Documents()), fv.Sliding(3)),
        (fv.Documents() & fv.Documents(), fv.Dense()),
    ],
    ids=repr,
)
def test_documents_are_found_in_nested_intersections(
    pattern: fv.Pattern, inner: fv.Pattern
) -> None:
    packed = pack(pattern, torch.tensor([0, 4, 10]), fv.Extent((10,), (10,)))
    assert torch.equal(packed.dense_mask(10, 10), block_diagonal(inner, (4, 6)))


def test_block_lists_speak_of_the_packed_tokens(source: torch.Generator) -> None:
    block_mask = torch.rand(1, 2, 6, 6, generator=source) < 0.5
    lists = fv.Blocks(fv.BlockSelection.from_block_mask(block_mask, 4, 4))
    q, k, v = qkv(Sizes((24,), q_heads=2, head_dim=4), source)
    cu_seqlens = torch.tensor([0, 5, 5, 24])
    for pattern, inner in (
        (lists, fv.Dense()),
        (fv.Causal() & lists, fv.Causal()),
        (lists & fv.Documents(), fv.Dense()),
    ):
        check_attend(q, k, v, pattern, cu_seqlens=cu_seqlens, implementation="cpu")
        packed = pack(pattern, cu_seqlens, fv.Extent((24,), (24,)))
        expected = lists.dense_mask(24, 24) & block_diagonal(inner, (5, 0, 19))
        assert torch.equal(packed.dense_mask(24, 24), expected)
