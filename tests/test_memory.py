"""The CPU edition never allocates what grows with Lq x Lk, forward or backward."""

import pytest
import torch

import foveal as fv
from foveal.testing import Sizes, qkv
from tests.watch import Watch

LENGTH = 4096
SIDE = 64
CASES = [
    (fv.Sliding(127), (LENGTH,)),
    (fv.Sliding(63, 64), (LENGTH,)),
    (fv.Sliding(63, sink_tokens=4), (LENGTH,)),
    (fv.Neighborhood(129), (LENGTH,)),
    (fv.Neighborhood(65, stride=4, dilation=3), (LENGTH,)),
    (fv.Neighborhood((13, 13)), (SIDE, SIDE)),
    (fv.Neighborhood((7, 7), dilation=(3, 2)), (SIDE, SIDE)),
    (fv.Neighborhood((7, 9), border="wrap"), (SIDE, SIDE)),
    (fv.Neighborhood((9, 9), causal=(True, False)), (SIDE, SIDE)),
    (fv.Neighborhood((5, 5, 5)), (16, 16, 16)),
    (fv.Partition((8, 8), (4, 4)), (SIDE, SIDE)),
    (fv.Axial(0), (SIDE, SIDE)),
    (fv.Axial(1, causal=True), (SIDE, SIDE)),
    (fv.Strided(64), (LENGTH,)),
    (fv.Sliding(31) | fv.Strided(64), (LENGTH,)),
    (fv.Fixed(64, 2), (LENGTH,)),
]


def watched(
    pattern: fv.Pattern, grid: tuple[int, ...], score: fv.Score, **options: object
) -> Watch:
    sizes = Sizes(grid, q_heads=2, kv_heads=1, head_dim=8)
    source = torch.Generator().manual_seed(0)
    q, k, v = (x.requires_grad_() for x in qkv(sizes, source))
    with Watch() as watch:
        fv.attend(q, k, v, pattern, score, implementation="cpu", **options).sum().backward()
    return watch


@pytest.mark.parametrize(("pattern", "grid"), CASES, ids=lambda p: str(p))
def test_no_matrix_of_all_pairs(pattern: fv.Pattern, grid: tuple[int, ...]) -> None:
    watch = watched(pattern, grid, fv.Softmax(soft_cap=5.0, sink=torch.zeros(2)))
    assert watch.largest < LENGTH * LENGTH / 2  # bytes: half a bool for each pair


def test_no_matrix_of_all_pairs_with_additive_terms() -> None:
    score = fv.Softmax() + fv.KeyBias(torch.zeros(1, 1, LENGTH)) + fv.Alibi(torch.ones(2))
    table = fv.RelativeBias(torch.zeros(2, 255))
    watch = watched(fv.Sliding(127), (LENGTH,), score + table)
    assert watch.largest < LENGTH * LENGTH / 2
    table = fv.RelativeBias(torch.zeros(2, 25, 25))
    watch = watched(fv.Neighborhood((13, 13)), (SIDE, SIDE), table)
    assert watch.largest < LENGTH * LENGTH / 2


def test_no_matrix_of_all_pairs_for_documents_and_block_lists() -> None:
    cu_seqlens = torch.arange(0, LENGTH + 1, 128)
    watch = watched(fv.Causal(), (LENGTH,), fv.Softmax(), cu_seqlens=cu_seqlens)
    assert watch.largest < LENGTH * LENGTH / 2
    diagonal = torch.eye(LENGTH // 64, dtype=torch.bool)[None, None]
    lists = fv.Blocks(fv.BlockSelection.from_block_mask(diagonal, 64, 64))
    for score in (fv.Softmax(), fv.KeyBias(torch.zeros(1, 1, LENGTH))):
        watch = watched(lists, (LENGTH,), score)
        assert watch.largest < LENGTH * LENGTH / 2
    watch = watched(lists & fv.Causal(), (LENGTH,), fv.Alibi(torch.ones(2)))
    assert watch.largest < LENGTH * LENGTH / 2


def test_the_watch_sees_a_matrix_of_all_pairs() -> None:
    q = torch.ones(1, 300, 1, 4)
    with Watch() as watch:
        fv.attend(q, q, q, fv.Sliding(3), implementation="reference")
    assert watch.largest >= 4 * 300 * 300


def test_memory_grows_with_the_length_not_its_square() -> None:
    short = watched(fv.Sliding(63), (1024,), fv.Softmax()).largest
    long = watched(fv.Sliding(63), (LENGTH,), fv.Softmax()).largest
    assert long <= 4.5 * short


def test_indices_have_64_bits() -> None:
    """Offsets into tensors of more than 2^31 elements are never held in fewer bits."""
    for pattern, grid in CASES[::2]:
        watch = watched(pattern, grid, fv.Softmax())
        assert watch.integer_dtypes <= {torch.int64}
