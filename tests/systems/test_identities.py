"""Every identity of every system of the catalogue, outputs and gradients, on fresh inputs."""

from __future__ import annotations

import pytest
import torch

from foveal.systems import Identity, systems

CLAIMS = [
    pytest.param(each, id=f"{system.name}-{each.name}")
    for system in systems()
    for each in system.identities
]


@pytest.mark.parametrize("identity", CLAIMS)
def test_identity_holds(identity: Identity, source: torch.Generator) -> None:
    for _ in range(3):
        for what, left, right in identity.pairs(source):
            torch.testing.assert_close(
                left, right, rtol=1e-9, atol=1e-9, msg=lambda text, what=what: f"{what}: {text}"
            )
