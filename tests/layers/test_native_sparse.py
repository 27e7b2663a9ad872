"""Native sparse attention as a layer: pieces, packed documents, maps to compressed keys."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from foveal.compose import SparseBranches, compress_mean, native_sparse, selected_blocks
from foveal.layers import NativeSparseAttention
from foveal.layers.native_sparse import LinearCompression, MLPCompression

BRANCHES = SparseBranches(4, 2, 8, 3, window=5)
KINDS = ("mean", "linear", "mlp")


def layer(kind: str) -> NativeSparseAttention:
    made = NativeSparseAttention(16, 4, kv_heads=2, branches=BRANCHES, compression=kind).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole(kind: str, source: torch.Generator) -> None:
    made, x = layer(kind), torch.randn(2, 31, 16, generator=source, dtype=torch.float64)
    state, pieces = None, []
    for start, stop in ((0, 3), (3, 4), (4, 20), (20, 21), (21, 31)):
        y, state = made(x[:, start:stop], state, return_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), made(x))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_alone(kind: str, source: torch.Generator) -> None:
    made, x = layer(kind), torch.randn(1, 31, 16, generator=source, dtype=torch.float64)
    cuts = torch.tensor([0, 10, 11, 31])
    alone = [made(x[:, a:b]) for a, b in ((0, 10), (10, 11), (11, 31))]
    torch.testing.assert_close(made(x, cu_seqlens=cuts), torch.cat(alone, 1))
    y, state = made(x, cu_seqlens=cuts, return_state=True)
    torch.testing.assert_close(y, torch.cat(alone, 1))
    new = torch.randn(3, 1, 16, generator=source, dtype=torch.float64)
    y, _ = made(new, state, return_state=True)
    for n, (a, b) in enumerate(((0, 10), (10, 11), (11, 31))):
        longer = torch.cat([x[:, a:b], new[n : n + 1]], 1)
        torch.testing.assert_close(y[n], made(longer)[0, -1:])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 3])
def test_a_batch_goes_on_from_lengths_of_one_remainder(
    kind: str, step: int, source: torch.Generator
) -> None:
    """9, 13 and 17 tokens leave the same rest by `step` + 1, and are no batch of one length."""
    made, x = layer(kind), torch.randn(1, 39, 16, generator=source, dtype=torch.float64)
    parts = x.split([9, 13, 17], 1)
    _, state = made(x, cu_seqlens=torch.tensor([0, 9, 22, 39]), return_state=True)
    new = torch.randn(3, step, 16, generator=source, dtype=torch.float64)
    y, _ = made(new, state, return_state=True)
    for n, part in enumerate(parts):
        longer = torch.cat([part, new[n : n + 1]], 1)
        torch.testing.assert_close(y[n], made(longer)[0, -step:])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_documents_may_be_empty(kind: str, source: torch.Generator) -> None:
    made, x = layer(kind), torch.randn(2, 20, 16, generator=source, dtype=torch.float64)
    state, pieces = None, []
    for piece in x.split([0, 7, 0, 13], 1):
        y, state = made(piece, state, return_state=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), made(x))
    assert made(x[:, :0]).shape == (2, 0, 16)
    assert made(x[:1, :0], cu_seqlens=torch.tensor([0, 0, 0])).shape == (1, 0, 16)
    _, state = made(x[:1], cu_seqlens=torch.tensor([0, 0, 20]), return_state=True)
    y, _ = made(x[:, :1], state, return_state=True)
    torch.testing.assert_close(y[0], made(x[:1, :1])[0])
    _, state = made(x[:0], return_state=True)
    assert made(x[:0, :1], state).shape == (0, 1, 16)


def test_no_tokens_at_all() -> None:
    q, k = torch.zeros(2, 0, 4, 6), torch.zeros(2, 0, 2, 6)
    gates = torch.ones(2, 0, 4, 3, requires_grad=True)
    o = native_sparse(q, k, k, gates, branches=BRANCHES)
    assert o.shape == (2, 0, 4, 6)
    o.sum().backward()


def test_every_parameter_learns(source: torch.Generator) -> None:
    for kind in KINDS:
        made, x = layer(kind), torch.randn(2, 31, 16, generator=source, dtype=torch.float64)
        made(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_learned_maps_start_as_the_mean(source: torch.Generator) -> None:
    k = torch.randn(2, 29, 2, 6, generator=source)
    table = BRANCHES.windows(k, k)
    mean = compress_mean(k, table)
    for learned in (LinearCompression(2, 6, 4), MLPCompression(2, 6, 4, 5)):
        torch.testing.assert_close(learned(k, table), mean)
    torch.testing.assert_close(mean[:, 3], k[:, 6:10].mean(1))


def test_lists_serve_as_a_pattern(source: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 29, h, 6, generator=source) for h in (4, 2, 2))
    chosen = fv.attend(q, k, v, fv.Blocks(selected_blocks(q, k, branches=BRANCHES)) & fv.Causal())
    gates = torch.tensor([0.0, 1.0, 0.0]).expand(2, 29, 1, 3)
    torch.testing.assert_close(chosen, native_sparse(q, k, v, gates, branches=BRANCHES))


def test_lists_of_tiles_reach_all_when_they_may(source: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 29, h, 6, generator=source) for h in (4, 2, 2))
    gates = torch.tensor([0.0, 1.0, 0.0]).expand(2, 29, 1, 3)
    branches = SparseBranches(4, 2, 8, 4, window=5, granularity="tile")
    o = native_sparse(q, k, v, gates, branches=branches)
    torch.testing.assert_close(o, fv.attend(q, k, v, fv.Causal()))
    fewer = SparseBranches(4, 2, 8, 3, window=5, granularity="tile")
    assert not torch.allclose(o, native_sparse(q, k, v, gates, branches=fewer))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 5, "stride": 2}, "length"),
        ({"block": 9, "stride": 2, "length": 4}, "block"),
        ({"best": 2}, "best"),
        ({"window": -1}, "window"),
        ({"granularity": "row"}, "granularity"),
    ],
)
def test_sizes_that_do_not_fit_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(fv.errors.SelectionError, match=message):
        SparseBranches(**options)  # type: ignore[arg-type]


def test_calls_of_the_layer_that_do_not_fit_are_named() -> None:
    made, x = layer("linear"), torch.zeros(2, 9, 16, dtype=torch.float64)
    with pytest.raises(fv.errors.PackingError, match="batch of 1"):
        made(x, cu_seqlens=torch.tensor([0, 9]))
    for given in (x[0], x[..., :5], x[None]):
        with pytest.raises(fv.errors.ShapeError, match=r"^x: "):
            made(given)
    with pytest.raises(fv.errors.DtypeError, match=r"^x: got torch.float32"):
        made(x.float())
    with pytest.raises(fv.errors.OptionError, match="SparseBranches"):
        NativeSparseAttention(16, 4, branches=3)  # type: ignore[arg-type]


def test_tensors_that_do_not_fit_are_named() -> None:
    q = torch.zeros(1, 9, 4, 2)
    with pytest.raises(fv.errors.ShapeError, match="gates"):
        native_sparse(q, q, q, torch.ones(1, 9, 2, 3), branches=BRANCHES)
    with pytest.raises(fv.errors.ShapeError, match="compressed"):
        native_sparse(q, q, q, compressed=(q, q), branches=BRANCHES)
