"""Lists of key blocks per token: the tiled edition, the kernels in the interpreter, the compiler."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

import foveal as fv
from foveal.engines.tile import column_attend, launches, select, token_attend
from foveal.engines.tile.token_lists import TokenLists, block_spans, segments
from foveal.engines.tile.windows import windows
from tests.engines.tile import compiled, interpreted_tokens

has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="Triton is not installed")


def random_lists(source: torch.Generator, Lq: int, Lk: int, block: int, heads: int) -> fv.Blocks:
    mask = torch.rand(2, heads, Lq, -(-Lk // block), generator=source) < 0.4
    return fv.Blocks(fv.BlockSelection.from_block_mask(mask, 1, block))


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Lq", "Lk", "block"), [(21, 21, 4), (9, 17, 5), (1, 13, 16), (5, 3, 2)])
def test_lists_of_tokens_agree_with_the_definition(
    Lq: int, Lk: int, block: int, causal: bool, heads: int, source: torch.Generator
) -> None:
    pattern: fv.Pattern = random_lists(source, Lq, Lk, block, heads)
    pattern = pattern & fv.Causal() if causal else pattern
    q, k, v = inputs = [
        torch.randn(2, n, h, 5, generator=source, dtype=torch.float64).requires_grad_()
        for n, h in ((Lq, 4), (Lk, 2), (Lk, 2))
    ]
    results = []
    for name in (None, "reference"):
        o, lse = fv.attend(q, k, v, pattern, return_lse=True, implementation=name)
        seen = torch.where(lse.isfinite(), lse, 0.0)
        gradients = torch.autograd.grad(o.sin().sum() + seen.cos().sum(), inputs)
        results.append((o, lse, *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_what_is_not_seen_may_be_nan(source: torch.Generator) -> None:
    pattern = random_lists(source, 12, 12, 3, 1) & fv.Causal()
    q, k, v = (torch.randn(2, 12, 2, 4, generator=source) for _ in range(3))
    k[:, 7], v[:, 7] = torch.nan, torch.inf
    o = fv.attend(q, k, v, pattern)
    sees = pattern.dense_mask(12, 12)[:, 0, :, 7]
    assert torch.equal(o.isfinite().all(-1).all(-1), ~sees)


@pytest.mark.parametrize("chunk", [7, 19, 100])
def test_segments_hold_every_listing_once(chunk: int, source: torch.Generator) -> None:
    mask = torch.rand(2, 3, 19, 6, generator=source) < 0.5
    selection = fv.BlockSelection.from_block_mask(mask, 1, 4)
    starts, stops = block_spans(24, 4, torch.device("cpu"))
    lists = TokenLists(selection.indices, starts, stops, 4, False, 0)
    found = segments(lists, 5, chunk)
    flat = selection.indices.flatten()
    places: list[int] = []
    for cell, first, stop in zip(found.cell, found.first, found.stop, strict=True):
        if int(cell) == found.cells:
            continue
        own = found.order[int(first) : int(stop)]
        token = own // lists.indices.shape[3]
        assert 0 < len(own) <= 5
        assert (token // 19 == int(cell) // 6 // found.chunks).all()
        assert (token % 19 // chunk == int(cell) // 6 % found.chunks).all()
        assert (flat[own] == int(cell) % 6).all()
        places += own.tolist()
    assert sorted(places) == torch.nonzero(flat >= 0).flatten().tolist()


def test_segments_leave_out_what_is_near() -> None:
    starts, stops = block_spans(40, 4, torch.device("cpu"))
    own = torch.arange(40) // 4
    mask = torch.arange(10) <= own[:, None]
    selection = fv.BlockSelection.from_block_mask(mask[None, None], 1, 4)
    lists = TokenLists(selection.indices, starts, stops, 4, True, 0, near=(1, 2))
    found = segments(lists, 100, 40, far=True)
    flat, slots = selection.indices.flatten(), selection.indices.shape[3]
    used = [
        found.order[f:s]
        for c, f, s in zip(found.cell, found.first, found.stop, strict=True)
        if c < found.cells
    ]
    listed = torch.cat(used)
    pairs = set(zip((listed // slots).tolist(), flat[listed].tolist(), strict=True))
    assert pairs == {(t, b) for t in range(40) for b in range(1, t // 4 - 1)}


def test_windows_start_anew_in_documents() -> None:
    cuts = torch.tensor([0, 5, 5, 14])
    table = windows(14, 14, 4, 2, 4, torch.device("cpu"), cuts)
    assert table.starts[:5].tolist() == [0, 4, 5, 9, 13]
    assert table.stops[:5].tolist() == [4, 5, 9, 13, 14]
    assert table.first.tolist() == [0] * 5 + [2] * 9
    assert table.own.tolist() == [0] * 4 + [1] + [2] * 4 + [3] * 4 + [4]
    assert table.seen.tolist() == [0, 0, 0, 1, 1, 4, 4, 4, 5, 5, 6, 6, 7, 7]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(torch.set_num_threads, 1).result()
            yield pool


@needs_triton
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 9, 9, 2, 1, 16, 16, 4, True),
        (1, 11, 17, 6, 2, 8, 12, 5, True),
        (1, 7, 20, 16, 1, 16, 16, 16, False),
    ],
)
def test_kernels_agree_in_the_interpreter(
    sizes: interpreted_tokens.Sizes, small: bool, interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    found = interpreter.submit(interpreted_tokens.errors, sizes, run_seed, small).result()
    assert max(found) < 2e-5, found


TILES = [
    (2, 9, 9, 16, 1, 32, 32, 4, True),
    (1, 11, 17, 32, 2, 32, 64, 5, True),
    (1, 7, 70, 16, 1, 64, 32, 32, False),
    (2, 70, 70, 16, 1, 32, 32, 32, True),
]


@needs_triton
@pytest.mark.parametrize("sizes", TILES, ids=str)
def test_tokens_beside_each_other_agree_in_the_interpreter(
    sizes: interpreted_tokens.Sizes, interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    found = interpreter.submit(interpreted_tokens.tile_errors, sizes, run_seed).result()
    assert max(found) < 2e-5, found


def test_what_tokens_beside_each_other_do_not_take() -> None:
    def takes(heads: int, dim: int, value_dim: int, slots: int) -> bool:
        q, k = torch.empty(1, 8, heads, dim), torch.empty(1, 8, 2, dim)
        v = torch.empty(1, 8, 2, value_dim)
        starts, stops = block_spans(8, 4, torch.device("cpu"))
        indices = torch.zeros(1, 2, 8, slots, dtype=torch.int32)
        return token_attend.has_tiles(q, k, v, TokenLists(indices, starts, stops, 4, True, 0))

    assert takes(32, 64, 128, 32)
    assert not takes(16, 64, 128, 16)
    assert not takes(80, 64, 128, 16)
    assert not takes(32, 80, 64, 16)
    assert not takes(32, 64, 48, 16)
    assert not takes(32, 64, 64, 33)


@needs_triton
@pytest.mark.parametrize(
    "case",
    [
        (37, 37, 4, 1, (4, 2, 8, 3, 0)),
        (30, 41, 4, 2, (2, 2, 2, 4, 0)),
        (40, 40, 2, 1, (4, 2, 8, 3, 22)),
        (33, 33, 3, 1, (8, 2, 4, 5, 0)),
        (50, 50, 16, 1, (1, 1, 1, 5, 0)),
        (180, 180, 4, 2, (1, 1, 1, 5, 0)),
        (150, 190, 3, 1, (1, 1, 1, 16, 0)),
        (190, 190, 2, 1, (1, 1, 1, 4, 77)),
        (70, 70, 3, 3, (1, 1, 1, 3, 0)),
    ],
)
def test_choices_agree_in_the_interpreter(
    case: tuple[Any, ...], interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    # Sums in another order may exchange two blocks whose scores are equal to the last bit.
    assert interpreter.submit(interpreted_tokens.lists_differ, *(*case, run_seed)).result() <= 1


@needs_triton
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("near", [False, True])
def test_gates_of_parts_agree_in_the_interpreter(
    near: bool, small: bool, interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    sizes = (2, 19, 23, 6, 2, 16, 24, 4, True)
    assert (
        interpreter.submit(interpreted_tokens.gated_error, sizes, near, small, run_seed).result()
        < 2e-6
    )


@needs_triton
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    "sizes", [(70, 70, 4, 1, 32, 1, 2), (33, 100, 6, 2, 32, 1, 1), (40, 40, 2, 2, 32, 0, 1)]
)
def test_what_is_near_agrees_in_the_interpreter(
    sizes: tuple[int, ...], small: bool, interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    found = interpreter.submit(interpreted_tokens.near_errors, sizes, run_seed, small).result()
    assert max(found) < 2e-5, found


@needs_triton
@pytest.mark.parametrize("far", [False, True])
def test_counted_segments_agree_in_the_interpreter(
    far: bool, interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    assert not interpreter.submit(interpreted_tokens.counted_differ, far, run_seed).result()


@needs_triton
@pytest.mark.parametrize(
    ("kind", "used", "best"),
    [
        ("random", 5, 16),
        ("random", 300, 16),
        ("random", 150, 40),
        ("ties", 200, 16),
        ("cluster", 200, 3),
        ("forced", 140, 16),
    ],
)
def test_the_best_of_rows_agree_in_the_interpreter(
    kind: str, used: int, best: int, interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    call = interpreted_tokens.best_of_rows_differ
    assert interpreter.submit(call, kind, used, best, run_seed).result() == 0


@needs_triton
@pytest.mark.parametrize("width", [1, 5, 16, 37])
def test_rows_without_sorts_agree_in_the_interpreter(
    width: int, interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    assert interpreter.submit(interpreted_tokens.rows_differ, width, run_seed).result() == []


KEYS = [
    ("columns", 24, 2, (30, 30, 4, 2)),
    ("columns", 9, 1, (25, 41, 6, 2)),
    ("tokens", 1, 2, (20, 20, 8, 2)),
    ("tokens", 1, 4, (11, 30, 4, 2)),
    ("tokens", 16, 1, (40, 40, 8, 2)),
    ("spans", 1, 2, (12, 90, 6, 2)),
    ("spans", 16, 4, (30, 120, 4, 4)),
]


@needs_triton
@pytest.mark.parametrize("case", KEYS, ids=str)
def test_keys_runs_and_columns_agree_in_the_interpreter(
    case: tuple[str, int, int, tuple[int, ...]], interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    found = interpreter.submit(interpreted_tokens.key_errors, *(*case, run_seed)).result()
    assert max(found) < 2e-5, found


@needs_triton
@pytest.mark.parametrize("case", [(53, (9, 4, 8, 2, 2, 16)), (40, (1, 40, 8, 1, 2, 16))])
def test_columns_agree_in_the_interpreter(
    case: tuple[int, tuple[int, ...]], interpreter: ProcessPoolExecutor, run_seed: int
) -> None:
    found = interpreter.submit(interpreted_tokens.column_errors, *(*case, run_seed)).result()
    assert max(found) < 2e-5, found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32)])
def test_kernels_compile_for_gpus_that_are_not_here(
    target: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is not set
    monkeypatch.setitem(compiled._TYPES, torch.int64, "*i64")
    found: list[compiled.Launch] = []

    def keep(self: Any) -> None:
        found.append(compiled.Launch(self.kernel, self.arguments, self.options))

    monkeypatch.setattr(launches.Launch, "__call__", keep)
    q = torch.zeros(1, 256, 8, 128, dtype=torch.bfloat16)
    k = v = torch.zeros(1, 256, 2, 128, dtype=torch.bfloat16)
    table = windows(256, 256, 32, 16, 64, torch.device("cpu"))
    lists = table.lists(torch.zeros(1, 2, 256, 16, dtype=torch.int32))
    select._on_gpu(
        q, k[:, : table.count], torch.zeros(1, 256, 8), table, select.Choice(16, 1, 2), 0.1
    )
    for by_key in (True, False):
        o, lse = token_attend.forward(q, k, v, lists, 0.1, by_key)
    token_attend.backward((q, k, v, o, lse), lists, 0.1, o, None)
    starts = columns = torch.zeros(1, 8, 4, 3, dtype=torch.int32)
    column_attend.forward(q, k, v, fv.ColumnSelection(starts[..., :1], columns[..., :1]), True, 0.1)
    shared = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}[target[1]]
    for launch in {each.name: each for each in found}.values():
        assert launch.compile(GPUTarget(*target)).metadata.shared <= shared, launch.name
