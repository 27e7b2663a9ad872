"""`python -m examples.first_hour`: runs every stage that is not finished, then writes the report."""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from examples.first_hour import heads, image, language_model, report, speed
from examples.first_hour.folder import Result, RunFolder
from foveal.bench.record import RecordFile, environment
from foveal.cli._progress import Progress

_INTERRUPTED = 130

Step = Callable[[str, float], None]
Facts = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A piece of the job: its result is kept under `name`; `seconds` is what to expect of it.

    `settings`: what the result depends on; another value of any of these makes it stale.
    """

    name: str
    seconds: float
    settings: Facts
    run: Callable[[Step], Result]


class Bar:
    """One progress bar over all stages, that also moves while a stage says nothing."""

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0.0
        self._stage, self._start, self._text, self._share = 0.0, time.monotonic(), "", 0.0
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._progress = Progress("demo")

    def begin(self, stage: Stage) -> None:
        self._start, self._share, self._stage = time.monotonic(), 0.0, stage.seconds
        self._text = stage.name

    def end(self) -> None:
        self.done, self._stage = self.done + self._stage, 0.0

    def __call__(self, text: str, share: float) -> None:
        self._text, self._share = text, share

    def __enter__(self) -> Bar:
        self._ticker.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._ticker.join()
        self._progress.clear()

    def _tick(self) -> None:
        while not self._ended.wait(0.5):
            waited = (time.monotonic() - self._start) / max(self._stage, 1.0)
            share = max(self._share, min(waited, 0.95))
            self._progress(self._text, (self.done + share * self._stage) / self.total)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demonstration; returns its exit status."""
    parser = argparse.ArgumentParser(prog="first_hour", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget the results of earlier runs")
    folder = RunFolder.default()
    if parser.parse_args(arguments).fresh:
        folder.clear()
    start = time.monotonic()
    try:
        results = _run(folder)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
    path = report.build(folder, results).write(folder.path / "report.html")
    print(f"done in {time.monotonic() - start:.0f} s; the report is {path.resolve()}")
    return 0


def _run(folder: RunFolder) -> report.Results:
    facts = environment(torch.device("cpu"))
    settings = {name: facts[name] for name in ("python", "torch", "commit", "threads")}
    measured = RecordFile(folder.path / f"speed-{settings['torch']}-{settings['commit']}.jsonl")

    def measure(step: Step) -> Result:
        speed.run(measured, step)
        return {"file": measured.path.name}

    stages = [Stage("image", 40, settings, lambda step: image.run(folder, step))]
    skipped = language_model.absent()
    if skipped is None:
        stages += _model_stages(folder, settings)
    else:
        print(skipped, file=sys.stderr)
    stages.append(Stage("speed", 150, settings, measure))
    results = _finish(folder, stages)
    layers = [result for name, result in results.items() if name.startswith("heads-")]
    return report.Results(
        facts,
        results["image"],
        results.get("capture"),
        layers,
        speed.records(measured),
        skipped,
    )


def _model_stages(folder: RunFolder, settings: Facts) -> list[Stage]:
    def study(index: int, step: Step) -> Result:
        step(f"heads of layer {index}", 0.0)
        return heads.study(language_model.Layer.load(language_model.layer_file(folder, index)))

    # The model and the text are what they are: new code of ours does not make them stale.
    lasting = {name: value for name, value in settings.items() if name != "commit"}
    stages = [
        Stage("capture", 100, lasting, lambda step: language_model.capture(folder, step)),
    ]
    for index in range(language_model.LAYERS):
        run = functools.partial(study, index)
        stages.append(Stage(f"heads-{index:02d}", 5, settings, run))
    return stages


def _finish(folder: RunFolder, stages: list[Stage]) -> dict[str, Result]:
    results = {stage.name: folder.finished(stage.name, stage.settings) for stage in stages}
    pending = [stage for stage in stages if results[stage.name] is None]
    with Bar(sum(stage.seconds for stage in pending)) as bar:
        for stage in pending:
            bar.begin(stage)
            results[stage.name] = folder.finish(stage.name, stage.settings, stage.run(bar))
            bar.end()
    return {name: result for name, result in results.items() if result is not None}


if __name__ == "__main__":
    sys.exit(main())
