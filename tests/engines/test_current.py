"""Launches on one GPU of several go to that which holds the tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from foveal.engines.common.current import on


def test_another_device_is_made_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextlib.contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    for device in (torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)):
        with on(device):
            pass
    assert entered == [torch.device("cuda", 1)]
