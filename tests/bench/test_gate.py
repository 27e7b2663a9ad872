"""Nothing wrong passes the gate, and nothing right is stopped by it."""

from dataclasses import replace

import pytest
import torch

from foveal.bench import truth
from foveal.bench.baselines import BASELINES, baselines
from foveal.bench.baselines.base import Prepared
from foveal.bench.cases import Case
from foveal.bench.gate import Gate
from foveal.bench.ours import Foveal
from foveal.patterns import Causal, Neighborhood, Partition, Pattern, Sliding

CPU = torch.device("cpu")
SMALL = {"q_heads": 2, "kv_heads": 2, "head_dim": 8, "value_dim": 8}
IMAGE = Case("image", Neighborhood(window=3), (7, 9), **SMALL)


def _verdicts(case: Case, competitor) -> dict[str, bool]:
    gate = Gate(case, case.inputs(CPU))
    prepared = competitor.prepare(case, gate.inputs)
    return {v.name: v.ok for v in gate.verdicts(prepared, competitor)}


def test_ours_is_checked_with_lse_and_all_gradients() -> None:
    assert _verdicts(IMAGE, Foveal()) == dict.fromkeys(("o", "lse", "dq", "dk", "dv"), True)


@pytest.mark.parametrize("name", ["masked", "dense"])
def test_sdpa_passes_on_a_grid(name: str) -> None:
    assert all(_verdicts(IMAGE, baselines([name])[0]).values())


def test_sampled_rows_check_whole_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "_PAIRS", 0)
    case = Case("text", Sliding(left=9), (50,), q_heads=4, kv_heads=2, head_dim=8, value_dim=6)
    gate = Gate(case, case.inputs(CPU))
    prepared = Foveal().prepare(case, gate.inputs)
    verdicts = gate.verdicts(prepared, Foveal())
    assert [v.name for v in verdicts if not v.ok] == []
    assert all(v.error > 0 for v in verdicts)


@pytest.mark.parametrize("part", ["o", "lse", "dq", "dk", "dv"])
def test_an_error_in_any_result_is_red(part: str) -> None:
    gate = Gate(IMAGE, IMAGE.inputs(CPU))
    good = Foveal().prepare(IMAGE, gate.inputs)

    def with_lse(q, k, v):
        leaves = {"dq": q, "dk": k, "dv": v}
        if part in leaves:
            leaves[part].register_hook(lambda gradient: gradient * 1.001)
        o, lse = good.with_lse(*(x * 1.0 for x in (q, k, v)))
        return (o * 1.001 if part == "o" else o), (lse + 1e-3 if part == "lse" else lse)

    verdicts = gate.verdicts(replace(good, with_lse=with_lse), Foveal())
    assert not {v.name: v.ok for v in verdicts}[part]


def test_a_wrong_mask_is_red() -> None:
    gate = Gate(IMAGE, IMAGE.inputs(CPU))
    wider = Foveal().prepare(replace(IMAGE, pattern=Neighborhood(window=5)), gate.inputs)
    assert not all(v.ok for v in gate.verdicts(wider, Foveal()))


LOCAL = [
    Sliding(left=32),
    Sliding(left=32, right=16),
    Partition(size=32, before=32) & Causal(),
    Partition(size=16, before=32, after=16),
]


@pytest.mark.parametrize("pattern", LOCAL, ids=repr)
def test_local_attention_says_the_same(pattern: Pattern) -> None:
    peer = baselines(["local_attention"])[0]
    if reason := peer.absent():
        pytest.skip(reason)
    case = Case("text", pattern, (128,), **SMALL)
    assert peer.refuses(case, CPU) is None
    assert all(_verdicts(case, peer).values())


def test_every_refusal_is_a_sentence() -> None:
    awkward = Case("x", Sliding(left=4, sink_tokens=2), (9,), q_heads=4, kv_heads=2)
    far = Case("x", Sliding(left=511), (2**16,))
    reasons = [
        reason for case in (awkward, far) for b in BASELINES if (reason := b.refuses(case, CPU))
    ]
    assert f"it has no {awkward.pattern.key}" in reasons
    assert any("leaves windows of 1" in reason for reason in reasons)
    assert any("the mask alone takes 4.3 GB" in reason for reason in reasons)
    assert all(len(reason.split()) > 3 for reason in reasons)


def test_layouts_come_back_to_tokens() -> None:
    case = Case("x", Neighborhood(window=3), (4, 5), q_heads=4, kv_heads=2, head_dim=3, value_dim=2)
    q, k, v = case.inputs(CPU)
    prepared: Prepared = baselines(["masked"])[0].prepare(case, (q, k, v))
    for native, tokens in zip(prepared.inputs, (q, k, v), strict=True):
        assert torch.equal(prepared.tokens(native), tokens)
