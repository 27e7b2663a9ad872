"""Kernels compile side by side; what launches them is loaded by one thread at a time."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
import torch

from foveal.engines.tile.compiling import compile_side_by_side


class Overlap:
    """The most threads that were inside at once."""

    def __init__(self) -> None:
        self.most = self._inside = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1


class Kernel:
    """A kernel that notes who compiles and who loads beside it."""

    def __init__(self, compiling: Overlap, loading: Overlap, together: threading.Barrier) -> None:
        self._compiling, self._loading, self._together = compiling, loading, together

    def warmup(self, *arguments: object, **options: object) -> Kernel:
        self._together.wait(10)
        with self._compiling:
            return self

    @property
    def run(self) -> object:
        with self._loading:
            return None


def test_launchers_load_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    compiling, loading, together = Overlap(), Overlap(), threading.Barrier(6)
    options: dict[str, Any] = {}
    calls = [(Kernel(compiling, loading, together), (1,), (), options) for _ in range(6)]
    compile_side_by_side(calls, torch.device("cuda"))
    assert compiling.most > 1
    assert loading.most == 1
