"""Where a run keeps its results, so that an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class RunFolder:
    """One JSON file per finished stage, written whole or not at all.

    A stage is finished when its file exists, is not torn and was made with the same settings.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def default(cls) -> RunFolder:
        """`first_hour` in $FOVEAL_CACHE_DIR, or in `runs` of the working directory."""
        return cls(Path(os.environ.get("FOVEAL_CACHE_DIR", "runs")) / "first_hour")

    def finished(self, stage: str, settings: Mapping[str, Any]) -> Result | None:
        """The result of a stage, or None when it has to run."""
        try:
            content = json.loads((self.path / f"{stage}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(content, dict) or content.get("settings") != _plain(settings):
            return None
        return dict(content["result"])

    def finish(self, stage: str, settings: Mapping[str, Any], result: Result) -> Result:
        """Keeps the result of a stage and returns it as it will be read again."""
        content = {"settings": settings, "result": result}
        self.write(f"{stage}.json", json.dumps(content, indent=1).encode("utf-8"))
        return dict(_plain(result))

    def write(self, name: str, content: bytes) -> Path:
        """A file of the folder, replaced in one step."""
        partial = self.path / f"{name}.part"
        partial.write_bytes(content)
        return partial.replace(self.path / name)

    def clear(self) -> None:
        """Forgets every result."""
        for file in self.path.iterdir():
            if file.is_file():
                file.unlink()


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))
