"""Plans of heads: what a search finds, that they survive a file; lists as patterns; spans that were named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal.compose import attend_segments
from foveal.selectors import load_plan, save_plan
from foveal.systems.sparse.heads import (
    CANDIDATES,
    Head,
    Mode,
    attend_planned,
    find_comb,
    heads_of,
    plan_of,
    search_heads,
)
from foveal.systems.sparse.prefill import minference, pbs_pattern
from foveal.systems.sparse.steps import named_spans, self_selected_span
from foveal.systems.sparse.tokens import head_importance

MODES = (Mode("a_shape", 2, 6), Mode("vertical_slash", 6, 1), Mode("grid", 8, 6))


def tensors(source: torch.Generator, length: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(1, length, 3, 8, generator=source, dtype=torch.float64)
    k, v = (torch.randn(1, length, 3, 8, generator=source, dtype=torch.float64) for _ in range(2))
    return q, k, v


def planted(source: torch.Generator, length: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Head 0 looks at its neighbours, head 1 at keys of its own, head 2 at every seventh key."""
    _, k, v = tensors(source, length)
    place = torch.arange(length, dtype=torch.float64)
    q = torch.zeros_like(k)
    # q . k = 8 (i j - j^2 / 2): the nearest key weighs most.
    q[0, :, 0, :2] = torch.stack([place, torch.ones_like(place)], -1)
    k[0, :, 0] = 0
    k[0, :, 0, :2] = torch.stack([8 * place, -4 * place.square()], -1)
    marks = torch.zeros(2, length, dtype=torch.float64)
    marks[0, [11, 83, 131, 144]] = 12.0
    marks[1, 3::7] = 12.0
    q[0, :, 1:, 0] = 6.0
    k[0, :, 1:, 0] = marks.T
    return q, k, v


def test_search_finds_the_mode_that_a_head_follows(source: torch.Generator) -> None:
    q, k, v = planted(source)
    found = search_heads(q, k, v, MODES)
    assert found[0] == Head("none", (MODES[0],))
    assert found[2] == Head("none", (MODES[2],))
    o = attend_planned(q, k, v, found)[0]
    dense = fv.attend(q, k, v, fv.Causal())
    misses = ((o - dense).abs() > 5e-3).sum((0, 1, 3))
    for mode in MODES:
        other = attend_planned(q, k, v, (Head("none", (mode,)),) * 3)[0]
        assert (misses <= ((other - dense).abs() > 5e-3).sum((0, 1, 3))).all()


def test_search_uses_the_boundary_that_helps(source: torch.Generator) -> None:
    """Queries of one kind look back at keys of the other, which stand in between."""
    q, k, v = (x[:, :, :1] for x in tensors(source, 40))
    kinds = torch.arange(40) // 10 % 2
    q = torch.zeros_like(q)
    q[0, :, 0, 0] = 8.0
    k[0, :, 0, 0] = torch.where(kinds == 0, 6.0, -6.0)
    (found,) = search_heads(q, k, v, (Mode("a_shape", 1, 18), Mode("a_shape", 8, 2)), kinds=kinds)
    assert found.boundary == "both"


def test_plans_survive_a_file(source: torch.Generator, tmp_path: Path) -> None:
    heads = Head("none", (Mode("blocks", 3),)), Head("query", (MODES[0], MODES[1]))
    save_plan(plan_of({5: heads, 11: heads[:1]}), tmp_path / "plan.json")
    plan = load_plan(tmp_path / "plan.json")
    assert heads_of(plan, 5) == heads
    assert heads_of(plan, 11) == heads[:1]
    with pytest.raises(fv.errors.UnknownNameError, match="7"):
        heads_of(plan, 7)
    assert all(heads_of(plan_of({0: [Head("none", (m,))]}), 0) for m in CANDIDATES)


def test_a_plan_runs_every_kind_of_head(source: torch.Generator) -> None:
    q, k, v = tensors(source, 140)
    heads = tuple(Head("none", (mode,)) for mode in (Mode("blocks", 1), MODES[1], Mode("dense")))
    o = minference(q, k, v, heads=heads)
    torch.testing.assert_close(o[:, :, 2], fv.attend(q, k, v, fv.Causal())[:, :, 2])
    assert not torch.allclose(o[:, :, 0], fv.attend(q, k, v, fv.Causal())[:, :, 0])


def test_the_comb_of_a_period_is_found() -> None:
    columns = torch.full((2, 50), 0.01)
    columns[0, 2::6] = 1.0
    columns[1, 4::9] = 1.0
    stride, place = find_comb(columns, 20)
    assert stride.tolist() == [6, 9]
    assert place.tolist() == [2, 4]


def test_wrong_plans_are_named(source: torch.Generator) -> None:
    q, k, v = tensors(source, 9)
    with pytest.raises(fv.errors.SelectionError, match="3 query heads"):
        attend_planned(q, k, v, (Head("none", (Mode("dense"),)),))
    with pytest.raises(fv.errors.UnknownNameError, match="kind of head"):
        Mode("a_shap", 1, 1)  # type: ignore[arg-type]
    with pytest.raises(fv.errors.SelectionError, match="sizes"):
        Mode("vertical_slash", 0, 4)
    kinds = torch.tensor([0, 1] * 4 + [0])
    with pytest.raises(fv.errors.SelectionError, match="4 modes for 2 kinds"):
        attend_planned(q, k, v, (Head("both", (Mode("dense"),)),) * 3, kinds)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda *qkv: Mode("grid", math.nan, math.nan), "sizes: got (nan, nan)"),
        (lambda *qkv: Mode("a_shape", 0, 2.5), "sizes: got (0, 2.5)"),
        (lambda *qkv: Mode("grid", "a", 1), "sizes: got ('a', 1)"),
        (lambda *qkv: Head("none", (3,)), "modes: got (3,)"),
        (lambda *qkv: Head("none", Mode("dense")), "modes: got Mode"),
        (lambda *qkv: heads_of({"0": [["none", {}]]}, 0), "plan: got ['none', {}]"),
        (lambda *qkv: heads_of({"0": [3]}, 0), "plan: got 3"),
        (lambda *qkv: find_comb(torch.ones(5), 1), "most: got 1"),
        (lambda *qkv: search_heads(*qkv, (3,)), "candidates: got (3,)"),
        (lambda *qkv: search_heads(*qkv, MODES, tolerance=math.nan), "tolerance: got nan"),
        (lambda *qkv: search_heads(*qkv, MODES, tolerance=-1.0), "tolerance: got -1.0"),
        (lambda *qkv: search_heads(*qkv, MODES, kinds=[0] * 9), "kinds: got a list"),
        (lambda q, k, v: search_heads(None, k, v, MODES), "q: got None"),
    ],
)
def test_a_search_names_what_it_cannot_use(
    call: Callable[..., object], said: str, source: torch.Generator
) -> None:
    with pytest.raises(fv.errors.FovealError) as raised:
        call(*tensors(source, 9))
    assert said in str(raised.value)


def test_an_empty_batch_has_an_empty_comb(source: torch.Generator) -> None:
    q, k, v = (x[:0] for x in tensors(source, 9))
    assert fv.system("mminference").op(q, k, v).shape == (0, 9, 3, 8)


@pytest.mark.parametrize("name", ["a_vl", "ltri_llm", "s3_attention"])
def test_an_empty_batch_has_nothing_to_keep(name: str, source: torch.Generator) -> None:
    q, k, v = (x[:0] for x in tensors(source, 9))
    assert fv.system(name).op(q, k, v, budget=4).shape == (0, 1, 3, 8)


@pytest.mark.parametrize(("length", "mass"), [(29, 0.5), (40, 1.0), (7, 0.3)])
def test_sorted_segments_as_lists_of_keys(
    length: int, mass: float, source: torch.Generator
) -> None:
    q, k, v = tensors(source, length)
    options = {"segment": 8, "block": 4, "mass": mass, "queries": 5}
    o = fv.attend(q, k, v, pbs_pattern(q, k, **options))
    torch.testing.assert_close(o, attend_segments(q, k, v, **options), rtol=1e-9, atol=1e-9)


def test_named_pieces_become_runs(source: torch.Generator) -> None:
    starts, stops = named_spans([[], [1], [0, 2]], [(0, 3), (3, 5), (5, 9)])
    assert starts.tolist() == [[0, 0], [3, 0], [0, 5]]
    assert stops.tolist() == [[0, 0], [5, 0], [3, 9]]
    q, k, v = tensors(source, 9)
    o = self_selected_span(q[:, -3:], k, v, starts[None], stops[None], window=1, sink_tokens=0)
    for row, keys in enumerate(([6], [3, 4, 7], [*range(3), *range(5, 9)])):
        one = fv.attend(q[:, 6 + row : 7 + row], k[:, keys], v[:, keys])
        torch.testing.assert_close(o[:, row : row + 1], one)
    with pytest.raises(fv.errors.SelectionError, match="pieces"):
        named_spans([[3]], [(0, 3)])


def test_head_importance_adds_up_over_layers(source: torch.Generator) -> None:
    o = torch.randn(2, 7, 3, 5, generator=source, dtype=torch.float64)
    first = head_importance(o)
    torch.testing.assert_close(first, o.abs().sum((1, 3)))
    torch.testing.assert_close(head_importance(o, first), 2 * first)
