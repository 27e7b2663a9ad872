"""The catalogue as a list: names, options, shapes, support, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import foveal as fv
from foveal.layers.shards import coverage, head_shards
from foveal.patterns import Extent, Neighborhood

ENTRIES = [pytest.param(each, id=each.name) for each in fv.systems()]


def test_names_are_unique() -> None:
    names = [each.name for each in fv.systems()]
    assert len(set(names)) == len(names)


def test_a_family_lists_its_own() -> None:
    assert fv.systems("locality")
    assert {each.family for each in fv.systems("locality")} == {"locality"}


def test_unknown_names_come_with_close_matches() -> None:
    with pytest.raises(fv.errors.UnknownNameError, match="did you mean sliding_window"):
        fv.system("sliding_windows")
    with pytest.raises(fv.errors.UnknownNameError, match="locality"):
        fv.systems("lokality")


@pytest.mark.parametrize("entry", ENTRIES)
def test_entry_is_complete(entry: fv.System) -> None:
    assert fv.system(entry.name) is entry
    assert entry.title
    assert entry.paper
    assert entry.summary.endswith(".")
    assert entry.kind in ("operator", "model")
    assert entry.layer is None or issubclass(entry.layer, nn.Module)
    for shape in entry.reference_shapes:
        assert {"grid", "heads", "kv_heads", "head_dim"} <= set(shape)


@pytest.mark.parametrize("entry", ENTRIES)
def test_reference_shapes_fit_the_defaults(entry: fv.System) -> None:
    """`defaults` are options of the pattern too, and some implementation runs every shape."""
    for shape in entry.reference_shapes:
        supported = entry.supports(shape)
        assert None in supported.values()
        assert all(reason is None or reason for reason in supported.values())
        if entry.compose is not None:
            for options in (entry.defaults, shape.get("options", {})):
                pattern = entry.pattern(shape["grid"], **options)
                pattern.validate(Extent(shape["grid"], shape["grid"]))


def test_support_names_what_refuses() -> None:
    supported = fv.system("gna").supports(
        {"grid": (12, 12), "heads": 2, "head_dim": 8}, device="cuda", window=5, stride=2
    )
    assert supported["cpu"] is not None
    assert supported["reference"] is None


def test_options_reach_the_pattern() -> None:
    assert fv.system("gna").pattern((9, 9), window=5, stride=3) == Neighborhood(5, stride=3)
    with pytest.raises(fv.errors.UnknownNameError, match="kernel_size"):
        fv.system("gna").pattern((9, 9), kernel_size=5)


@pytest.mark.parametrize("name", ["cross_axis_attention", "ifactformer"])
def test_systems_without_a_pattern_say_so(name: str) -> None:
    with pytest.raises(fv.errors.PatternError, match="selects pairs"):
        fv.system(name).pattern((8, 8))


def test_operator_returns_lse_and_takes_an_implementation(source: torch.Generator) -> None:
    q, k, v = (torch.randn(1, 9, 2, 4, generator=source) for _ in range(3))
    op = fv.system("sliding_window").op
    o, lse = op(q, k, v, left=2, return_lse=True)
    assert lse.shape == (1, 9, 2)
    torch.testing.assert_close(o, op(q, k, v, left=2, implementation="reference"))
    with pytest.raises(fv.errors.RefusedError):
        op(q, k, v, left=2, implementation="sdpa")


def test_two_heads_with_a_stride_of_eight_do_not_cover() -> None:
    assert coverage(head_shards(32, 2, 2, 8)) < 1.0
    assert coverage(head_shards(32, 8, 2, 8)) == 1.0


def test_scales_must_add_up() -> None:
    x = torch.zeros(1, 20, 1, 4)
    for name in ("var", "hmar", "mvar"):
        with pytest.raises(fv.errors.PatternError, match="680"):
            fv.system(name).op(x, x, x)


def test_combs_must_divide_the_grid() -> None:
    x = torch.zeros(1, 5, 4, 4, 1, 4)
    with pytest.raises(fv.errors.PatternError, match="divide the grid"):
        fv.system("dilated_window_3d").op(x, x, x, group=(2, 2, 2), scope="global")


def test_split_heads_must_be_even() -> None:
    x = torch.zeros(1, 6, 3, 4)
    with pytest.raises(fv.errors.ShapeError, match="even number of heads"):
        fv.system("sparse_transformer").op(x, x, x)


def test_boxes_need_a_place_for_every_voxel() -> None:
    x = torch.zeros(1, 6, 3, 4)
    with pytest.raises(fv.errors.ShapeError, match="coordinates"):
        fv.system("box_attention").op(x, x, x, torch.zeros(5, 4, dtype=torch.int64))


def test_sphere_takes_queries_on_a_grid_of_their_own(source: torch.Generator) -> None:
    q = torch.randn(1, 3, 4, 2, 5, generator=source, dtype=torch.float64)
    k, v = (torch.randn(1, 6, 8, 2, 5, generator=source, dtype=torch.float64) for _ in range(2))
    op = fv.system("sphere_attention").op
    o = op(q, k, v)
    assert o.shape == q.shape
    alone = op(q[:, 1:2, 2:3], k, v)
    torch.testing.assert_close(o[:, 1:2, 2:3], alone)
