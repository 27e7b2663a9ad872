"""Which kernel a scan on a GPU takes."""

from __future__ import annotations

import pytest
import torch

task = pytest.importorskip("foveal.engines.state.task", reason="it imports triton")


@pytest.mark.parametrize(
    ("lengths", "bulk"),
    [((100,), True), ((128, 64, 100), True), ((100, 128), False), ((64, 0, 100), True)],
)
def test_chunks_of_bulk_copies_end_with_their_sequence(
    lengths: tuple[int, ...], bulk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reached into the next sequence would take over what is not finite there."""
    monkeypatch.setattr(task, "has_bulk_copies", lambda: True)
    sizes = torch.bfloat16, 64, 128, 1, False
    assert task.adds_in_bulk(*sizes, lengths) is bulk
