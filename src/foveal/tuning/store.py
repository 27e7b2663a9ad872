"""Sizes measured on one device, in a file that survives restarts and concurrent writers.

The folder is $FOVEAL_CACHE_DIR, else $XDG_CACHE_HOME/foveal, else ~/.cache/foveal; in it, `tuning/` has one
JSON file per device.  A file is replaced as a whole, so readers see the old one or the new one; a
writer holds a lock, reads what is there and adds to it, so that no writer's results are lost.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveal.tuning.config import Config

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

_VERSION = 1


@dataclass(frozen=True)
class Measured:
    """The sizes that one kernel runs with on a device, and what every candidate took, in seconds.

    `seconds` holds those tried so far, inf where one does not run; `config` is None until all were.
    """

    config: Config | None
    seconds: Mapping[Config, float]


def folder() -> Path:
    """Where foveal keeps what it measured on this machine."""
    named = os.environ.get("FOVEAL_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "foveal"


class Store:
    """The measurements of one device, by kernel name such as "forward/128/half".

    `conditions` names what results depend on besides the device, such as versions; results taken under
    other conditions are not read, and replaced at the next `add`.
    """

    def __init__(self, device: str, conditions: str, path: Path | None = None) -> None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
        self.path = path or folder() / "tuning" / f"{name}.json"
        self.device = device
        self.conditions = conditions

    def read(self) -> dict[str, Measured]:
        """All results; none, with a warning, where the file cannot be understood."""
        try:
            return self._parse(self.path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(
                f"{self.path} is not read, the shipped sizes are used ({error}); "
                f"`foveal tune` replaces it",
                stacklevel=2,
            )
            return {}

    def add(self, kernel: str, seconds: Mapping[Config, float], config: Config | None) -> None:
        """Adds candidates of a kernel to what is stored, and the choice when it is made."""
        with self._lock():
            try:
                results = self._parse(self.path.read_bytes())
            except FileNotFoundError:
                results = {}
            except (OSError, ValueError):
                results = {}
                with contextlib.suppress(OSError):
                    os.replace(self.path, self.path.with_suffix(".unreadable"))
            before = results.get(kernel, Measured(None, {}))
            results[kernel] = Measured(config or before.config, {**before.seconds, **seconds})
            self._write(results)

    def _parse(self, content: bytes) -> dict[str, Measured]:
        data = json.loads(content)
        if not isinstance(data, dict) or data.get("version") != _VERSION:
            raise ValueError(f"it is not of version {_VERSION}")
        if data.get("conditions") != self.conditions:
            return {}
        try:
            return {kernel: _measured(entry) for kernel, entry in data["kernels"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it lacks a part: {error!r}") from None

    def _write(self, results: dict[str, Measured]) -> None:
        data = {
            "version": _VERSION,
            "device": self.device,
            "conditions": self.conditions,
            "kernels": {name: _written(found) for name, found in sorted(results.items())},
        }
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time; a writer that dies leaves no lock behind.

        Where the system has no such locks files are still replaced as a whole.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _measured(entry: dict[str, Any]) -> Measured:
    chosen = None if entry["config"] is None else Config.parse(entry["config"])
    seconds = {
        Config.parse(text): math.inf if value is None else float(value)
        for text, value in entry["seconds"].items()
    }
    return Measured(chosen, seconds)


def _written(found: Measured) -> dict[str, Any]:
    return {
        "config": None if found.config is None else str(found.config),
        "seconds": {
            str(config): seconds if math.isfinite(seconds) else None
            for config, seconds in found.seconds.items()
        },
    }
