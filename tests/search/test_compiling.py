"""Kernels compiled for devices that are not here: facts, niches, and what does not fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foveal.errors import FovealError
from foveal.search import artefact
from foveal.search.archive import Archive
from foveal.search.candidate import cell_of
from foveal.search.controller import Search
from foveal.search.evaluator import JudgedEvaluator
from foveal.search.isolate.process import Nursery
from foveal.search.library import template_task
from foveal.search.strategies import strategy
from foveal.search.verify.judge import Judge

with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

PTX = """
wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {...}
@%p1 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {...}
fma.rn.f32 %f1, %f2, %f3, %f4;
cp.async.cg.shared.global [%r1], [%r2], 16;
"""
GCN = """
v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
v_fmac_f32_e32 v0, v1, v2
.vgpr_count: 96
.vgpr_spill_count: 3
"""


def compiled(asm: dict[str, str], shared: int, warps: int, **known: int) -> Any:
    metadata = SimpleNamespace(num_warps=warps, shared=shared)
    return SimpleNamespace(asm=asm, metadata=metadata, **known)


def test_facts_of_nvidia_text() -> None:
    made = compiled({"ptx": PTX}, 60 << 10, 8, n_regs=100, n_spills=8)
    facts = artefact.facts_of(made, "sm_90")
    matrix = 2 * 64 * 128 * 16 / 4 + 2 * 16 * 8 * 16
    assert facts["matrix_share"] == pytest.approx(matrix / (matrix + 64))
    assert facts["copies"] == 1
    assert facts["resident"] == 2  # 65,536 registers / (256 threads x 104)
    assert facts["spills"] == 8
    assert cell_of(facts) == (1, 1, 1, 3)
    specialised = {"ptx": "cp.async.bulk.tensor", "ttgir": "ttg.warp_specialize"}
    bulk = compiled(specialised, 0, 4, n_regs=32, n_spills=0)
    assert artefact.facts_of(bulk, "sm_90")["copies"] == 3
    assert artefact.facts_of(bulk, "sm_90")["matrix_share"] == 0


def test_facts_of_amd_text() -> None:
    facts = artefact.facts_of(compiled({"amdgcn": GCN}, 16 << 10, 4), "gfx942")
    assert facts["registers"] == 96
    assert facts["spills"] == 12
    assert facts["shared"] == 0.25
    assert facts["matrix_share"] == pytest.approx(16384 / (16384 + 128))


@with_triton
def test_what_cannot_be_compiled_for_is_a_sentence() -> None:
    with pytest.raises(FovealError, match="one of sm_80"):
        template_task("rows/softmax", targets=("sm_17",))
    with pytest.raises(FovealError, match="not written in Triton"):
        template_task("attention/causal", targets=("sm_90",))


@pytest.fixture
def rows(nursery: Nursery) -> Iterator[JudgedEvaluator]:
    task = template_task("rows/softmax", targets=("gfx942", "sm_90"))
    with Judge(task, nursery, seconds=60.0) as judge:
        yield JudgedEvaluator(task, judge)


@with_triton
@pytest.mark.slow
def test_candidates_are_verified_here_and_compiled_for_another_device(
    rows: JudgedEvaluator, tmp_path: Path
) -> None:
    from triton.backends import backends

    if "amd" not in backends:
        pytest.skip("this Triton has no backend for gfx942")
    with Archive(tmp_path / "a.db") as archive:
        search = Search(rows.task, archive, [rows], strategy("evolution"), 0)
        search.run(100.0, most=2)
        entries = archive.entries(evaluated=True)
        assert len(entries) == 2
        for entry in entries:
            assert entry.evaluation is not None
            assert entry.evaluation.ok, entry.evaluation.reason
            assert entry.evaluation.speedup is None
            assert entry.evaluation.facts["registers"] > 0
        assert archive.elites()
        assert archive.champion() is None
