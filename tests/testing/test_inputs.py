import pytest
import torch

from foveal.testing import LAYOUTS, Sizes, packed_lengths, qkv


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes_dtypes_and_values(layout: str, dtype: torch.dtype, source: torch.Generator) -> None:
    sizes = Sizes((3, 4), (2, 5), batch=2, q_heads=6, kv_heads=3, head_dim=7, value_dim=4)
    q, k, v = qkv(sizes, source, dtype, layout)
    assert q.shape == (2, 3, 4, 6, 7)
    assert k.shape == (2, 2, 5, 3, 7)
    assert v.shape == (2, 2, 5, 3, 4)
    for x in (q, k, v):
        assert x.dtype == dtype
        assert bool(x.isfinite().all())
        assert x.is_contiguous() == (layout == "contiguous")


def test_sizes_default_to_those_of_the_queries() -> None:
    q, k, v = Sizes((5,), q_heads=3, head_dim=4).shapes
    assert q == k == v == (1, 5, 3, 4)


def test_layouts_are_what_they_say(source: torch.Generator) -> None:
    sizes = Sizes((4,), batch=2, q_heads=3)
    assert qkv(sizes, source, layout="strided")[0].stride(-1) == 2
    assert qkv(sizes, source, layout="heads_first")[0].transpose(1, 2).is_contiguous()
    broadcast = qkv(sizes, source, layout="broadcast")[0]
    assert broadcast.stride()[0] == broadcast.stride()[2] == 0


def test_a_seed_repeats_the_numbers_in_every_layout_but_broadcast() -> None:
    sizes = Sizes((4,), batch=2, q_heads=3)
    first, *others = (
        qkv(sizes, torch.Generator().manual_seed(3), layout=layout)[0]
        for layout in LAYOUTS
        if layout != "broadcast"
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("total", "documents"), [(0, 1), (10, 1), (10, 4), (3, 20)])
def test_packed_lengths(total: int, documents: int, source: torch.Generator) -> None:
    cu_seqlens = packed_lengths(total, documents, source)
    assert cu_seqlens.dtype == torch.int32
    assert len(cu_seqlens) == documents + 1
    assert cu_seqlens[0] == 0
    assert cu_seqlens[-1] == total
    assert bool((cu_seqlens.diff() >= 0).all())
