"""The effect of a run of tokens as an affine map of the state."""

from __future__ import annotations

import pytest
import torch

import foveal as fv
from tests.engines.state.problems import Shape, draw

RULES = [fv.Delta(), fv.Additive()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
@pytest.mark.parametrize("decay", ["none", "fixed", "token", "channel"])
def test_the_map_takes_any_state_to_the_final_one(
    rule: fv.Rule, decay: str, source: torch.Generator
) -> None:
    edges = (0, 7, 7, 70)
    inputs = draw(Shape(70, decay, cu_seqlens=edges), rule, source)
    initial = inputs.pop("initial_state")[0]
    cu = torch.tensor(edges)
    _, final = fv.scan(**inputs, rule=rule, initial_state=initial, return_state=True, cu_seqlens=cu)
    del inputs["q"]
    found = fv.scan_map(**inputs, rule=rule, cu_seqlens=cu)
    torch.testing.assert_close(found(initial), final)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.key)
@pytest.mark.parametrize("decay", ["none", "fixed", "token", "channel"])
def test_maps_of_pieces_join_to_the_map_of_the_whole(
    rule: fv.Rule, decay: str, source: torch.Generator
) -> None:
    inputs = draw(Shape(90, decay), rule, source)
    tokens = {n: inputs[n] for n in ("k", "v", "log_decay", "write_gate")}

    def piece(start: int, stop: int) -> fv.ChunkMap:
        own = {n: x if x is None or x.dim() == 1 else x[:, start:stop] for n, x in tokens.items()}
        return fv.scan_map(**own, rule=rule)

    first, second, third = piece(0, 20), piece(20, 65), piece(65, 90)
    whole = fv.scan_map(**tokens, rule=rule)
    for joined in (first.then(second).then(third), first.then(second.then(third))):
        torch.testing.assert_close(joined.transition, whole.transition)
        torch.testing.assert_close(joined.addition, whole.addition)


def test_a_normaliser_has_no_map() -> None:
    x = torch.zeros(1, 3, 1, 2)
    with pytest.raises(fv.errors.RuleError, match="rule"):
        fv.scan_map(x, x, fv.Additive(normalised=True))
