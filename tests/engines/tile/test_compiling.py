"""Kernels compile side by side; what launches them is loaded by one thread at a time."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

import pytest
import torch

from foveal.engines.tile import compiling
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


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No device, and what Triton does once; the order in which kernels were compiled and traced."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(compiling, "_started", [])
    monkeypatch.setattr(compiling, "_pending", [])
    monkeypatch.setattr(compiling, "_build_driver", lambda: done.append("driver"))
    monkeypatch.setattr(compiling, "_hash_triton", lambda: done.append("hash"))
    return done


def test_launchers_load_one_by_one() -> None:
    compiling, loading, together = Overlap(), Overlap(), threading.Barrier(6)
    options: dict[str, Any] = {}
    calls = [(Kernel(compiling, loading, together), (1,), (), options) for _ in range(6)]
    compile_side_by_side(calls, torch.device("cuda"))
    assert compiling.most > 1
    assert loading.most == 1


class Traced:
    """A kernel that is a while in Python, says that it is traced, and then waits for all the others."""

    def __init__(self, name: str, done: list[str], together: threading.Barrier) -> None:
        self.__module__, self.__name__ = "of.hopper_forward", name
        self._done, self._together = done, together
        self.run = None

    def warmup(self, *arguments: object, **options: object) -> Traced:
        self._done.append(f"{self.__name__} begins")
        time.sleep(0.02)
        self._done.append(f"{self.__name__} traced")
        compiling.traced()
        self._together.wait(10)
        return self


def named(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(compiling, "LONGEST", set(names))


def test_the_longest_are_traced_first_one_by_one(
    monkeypatch: pytest.MonkeyPatch, triton: list[str]
) -> None:
    named(monkeypatch, "long", "longer")
    together = threading.Barrier(4)
    kernels = [Traced(name, triton, together) for name in ("a", "long", "b", "longer")]
    calls: list[compiling.Call] = [(kernel, (1,), (), {}) for kernel in kernels]
    compile_side_by_side(calls, torch.device("cuda"))
    long = ["long begins", "long traced", "longer begins", "longer traced"]
    assert sorted(triton[:2]) == ["driver", "hash"]
    assert triton[2:6] == long
    assert sorted(triton[6:]) == ["a begins", "a traced", "b begins", "b traced"]


class Silent(Traced):
    """A kernel that the compiler refuses before it is traced."""

    def warmup(self, *arguments: object, **options: object) -> Traced:
        time.sleep(0.05)  # the others wait by then
        raise SyntaxError("a kernel")


def test_kernels_that_do_not_say_it_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, triton: list[str]
) -> None:
    """Of the same name, in the portable edition: both are in the compiler before one leaves it."""
    named(monkeypatch, "long")
    together = threading.Barrier(2)
    kernels = [Traced(name, triton, together) for name in ("long", "a")]
    monkeypatch.setattr(compiling, "traced", lambda: None)
    for kernel in kernels:
        kernel.__module__ = "of.forward"
    compile_side_by_side([(kernel, (1,), (), {}) for kernel in kernels], torch.device("cuda"))
    assert len(triton) == 6


def test_an_error_lets_the_others_go_on(monkeypatch: pytest.MonkeyPatch, triton: list[str]) -> None:
    named(monkeypatch, "long")
    alone = threading.Barrier(1)
    kernels = [Traced("a", triton, alone), Silent("long", triton, alone)]
    with pytest.raises(SyntaxError, match="a kernel"):
        compile_side_by_side([(kernel, (1,), (), {}) for kernel in kernels], torch.device("cuda"))
    assert triton[2:] == ["a begins", "a traced"]


def test_triton_is_started_once_and_awaited(
    monkeypatch: pytest.MonkeyPatch, triton: list[str]
) -> None:
    let = threading.Event()
    monkeypatch.setattr(compiling, "_build_driver", lambda: let.wait(10) and triton.append("built"))
    compiling.start_triton()
    compiling.start_triton()
    assert "built" not in triton
    threading.Timer(0.02, let.set).start()
    compiling.await_triton()
    assert sorted(triton) == ["built", "hash"]


def test_a_driver_that_is_not_there_is_said_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(compiling, "_build_driver", fail)
    compiling.start_triton()
    compiling.await_triton()


def test_what_triton_does_once_has_the_names_that_are_called() -> None:
    pytest.importorskip("triton")
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    assert callable(triton_key)
    assert hasattr(type(driver), "active")
