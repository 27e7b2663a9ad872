"""Pictures are well-formed, small, deterministic, and say what they show."""

import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

import foveal as fv
from foveal._errors import MissingDependencyError, PatternError
from foveal.probe import picture as module
from foveal.probe.picture import picture, write_png

SVG = "{http://www.w3.org/2000/svg}"
SELECTION = fv.BlockSelection.from_block_mask(torch.eye(4).bool()[None, None], 16, 16)
CASES = [
    (fv.Sliding(12, sink_tokens=2), (64,)),
    (fv.Strided(8), (64,)),
    (fv.Neighborhood((7, 7)), (24, 24)),
    (fv.Neighborhood(5, dilation=2), (24, 20)),
    (fv.Axial(1), (3, 40)),
    (fv.Neighborhood((3, 5, 5)), (6, 12, 12)),
    (fv.Neighborhood((3, 5, 5)), (20, 9, 9)),
    (fv.Blocks(SELECTION) & fv.Causal(), (64,)),
    (fv.Dense(), (1,)),
    (fv.Dense(), (1, 1)),
    (fv.Causal(), (5000,)),
]


def _texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(("pattern", "grid"), CASES, ids=lambda value: str(value))
def test_every_pattern_makes_a_small_document(pattern: fv.Pattern, grid: tuple[int, ...]) -> None:
    svg = picture(pattern, grid)
    ElementTree.fromstring(svg)
    assert len(svg) < 30_000
    assert svg == picture(pattern, grid)
    assert pattern.key in _texts(svg)
    assert "nan" not in svg.lower().replace("ui-monospace", "")


def test_counts_stand_in_the_legend() -> None:
    texts = _texts(picture(fv.Neighborhood((7, 7)), (24, 24)))
    assert {"full", "partial", "skipped", "36", "220", "1,040"} <= set(texts)
    assert "visits 19.8% of the tiles" in texts
    assert "for 8.5% of the pairs" in texts
    assert "middle: 49 keys" in texts


def test_the_mark_of_a_single_key_is_singular() -> None:
    assert "first: query 0 sees 1 key" in _texts(picture(fv.Causal(), 40))


def test_titles_are_escaped_and_cut() -> None:
    svg = picture(fv.Dense(), 8, title="a < b & c", caption="x" * 500)
    title = _texts(svg)[0]
    assert title.startswith("a < b & c")
    assert title.endswith("...")
    assert len(title) < 130


def test_fewer_queries_than_keys_keep_their_places() -> None:
    assert "last: query 9 sees 50 keys" in _texts(picture(fv.Causal(), 10, 50))


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(PatternError):
        picture(fv.Neighborhood((7, 7)), (4, 4))
    with pytest.raises(PatternError, match="at least one"):
        picture(fv.Dense(), 0)


def test_png_without_a_converter_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_with_cairosvg", lambda svg, path: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"foveal\[png\]"):
        write_png(picture(fv.Dense(), 8), tmp_path / "x.png")
