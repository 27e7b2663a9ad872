"""A search as one HTML file, in the style of the benchmark: speed-up, niches, lineage, verdicts."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from pathlib import Path

from foveal.bench.figures import PALETTE, Axis, Cell, Data, Series, labelled_map, layout, lines
from foveal.bench.page import Page
from foveal.search.archive import Archive, Entry
from foveal.search.task import Task
from foveal.search.verify.judge import STAGES

_Labels = tuple[tuple[str, tuple[str, ...]], tuple[str, tuple[str, ...]]]
_CPU_LABELS: _Labels = (
    (
        "memory traffic over what is compulsory",
        ("under 2 times", "2 to 5 times", "5 to 12 times", "12 times and more"),
    ),
    ("number of operators", ("under 4", "4 to 11", "12 to 39", "40 and more")),
)
_GPU_LABELS: _Labels = (
    (
        "shared memory of a program",
        ("under a quarter", "to a half", "to three quarters", "over three quarters"),
    ),
    (
        "programs that a multiprocessor holds at once",
        ("1 program", "2 programs", "3 or 4 programs", "5 or more"),
    ),
)
_SHOWN = 60
_LONGEST = 160


def write(archive: Archive, task: Task, path: str | Path, command: str = "") -> Path:
    """Writes the report of an archive and returns its path."""
    entries = archive.entries(evaluated=True)
    champion = archive.champion()
    best = champion.evaluation.speedup if champion and champion.evaluation else None
    passed = sum(bool(e.evaluation and e.evaluation.ok) for e in entries)
    page = Page(
        f"Search: {task.name}",
        f"{len(entries)} candidates were judged and compared in {archive.spent:,.3g} s; {passed} passed "
        f"every stage. {_outcome(len(archive.accepted()) - 1, best)}",
    )
    _speed(page, archive, entries)
    _niches(page, archive)
    _lineage(page, archive, entries)
    _accepted(page, archive)
    _verdicts(page, entries)
    _operators(page, archive, entries)
    _champion(page, archive, task, champion)
    page.facts += [
        ("task", f"{task.name}, {len(task.cases)} cases, device {task.device}"),
        ("archive", archive.path.name),
        ("seed", str(archive.setting("seed"))),
    ]
    page.facts += [(str(k), str(v)) for k, v in (archive.setting("environment") or {}).items()]
    if command:
        page.facts.append(("command", f"`{command}`"))
    return page.write(path)


def _outcome(won: int, best: float | None) -> str:
    if best is None:
        return "Nothing was timed."
    pace = f"{best:.2f} times as fast as the reference"
    if won < 1:
        return f"None was faster than what the search began with, which is {pace}."
    return f"{won} in a row beat the champion before them; the last one is {pace}."


def _speed(page: Page, archive: Archive, entries: list[Entry]) -> None:
    compared: dict[str, float] = {}
    for race in archive.challenges():
        compared[race["candidate"]] = compared.get(race["candidate"], 0.0) + race["seconds"]
    spent, points, notes, clock = [], [], [], 0.0
    for entry in entries:
        assert entry.evaluation is not None
        clock += entry.evaluation.seconds + compared.get(entry.id, 0.0)
        if entry.evaluation.speedup:
            spent.append(clock)
            points.append(entry.evaluation.speedup)
            notes.append(f"{entry.operator} {entry.id[:6]}: {entry.note}")
    accepted = archive.accepted()
    best_x = [a["spent"] for a in accepted] + [archive.spent]
    best_y = [a["speedup"] for a in accepted] + [accepted[-1]["speedup"] if accepted else None]
    figure = lines(
        "Speed-up over the reference",
        [
            Series("accepted", best_x, best_y, colour=PALETTE[0]),
            Series("first timing of a candidate", spent, points, colour=PALETTE[3], notes=notes),
        ],
        Axis("time spent on judging", "s"),
        Axis("times as fast as the reference", "1"),
    )
    figure["data"][0]["line"]["shape"] = "hv"
    figure["data"][1] |= {"mode": "markers"}
    page.section(
        "Speed-up over time",
        "A first timing is short and decides nothing. A candidate is accepted when it beats the champion in "
        "samples of fresh processes that take turns, twice.",
    ).figure(figure)


def _niches(page: Page, archive: Archive) -> None:
    best: dict[tuple[int, int], tuple[float, Entry]] = {}
    for cell, entry in archive.elites().items():
        speedup = entry.evaluation.speedup if entry.evaluation else None
        if speedup and speedup > best.get(cell[:2], (0.0, entry))[0]:
            best[cell[:2]] = speedup, entry
    cells = []
    for first in range(4):
        row = []
        for second in range(4):
            found = best.get((first, second))
            if found is None:
                row.append(Cell(None, ""))
            else:
                note = f"{found[0]:.3f} times as fast: {found[1].operator} {found[1].note}"
                row.append(Cell(found[0], f"{found[0]:.2f}", note))
        cells.append(row)
    compiled = any(
        e.evaluation and "shared" in e.evaluation.facts for e in archive.elites().values()
    )
    rows, columns = _GPU_LABELS if compiled else _CPU_LABELS
    page.section(
        "Archive",
        f"The best of every niche. Rows: {rows[0]}; columns: {columns[0]}; both measured on "
        f"{'what was compiled' if compiled else 'the candidate'}. Niches that differ in the two other "
        f"measures only share a square: {len(archive.elites())} are filled in all.",
    ).figure(
        labelled_map(
            "times as fast as the reference",
            cells,
            Axis(""),
            Axis(""),
            "speed-up",
            x_labels=list(columns[1]),
            y_labels=list(rows[1]),
            height=330,
        )
    )


def _lineage(page: Page, archive: Archive, entries: list[Entry]) -> None:
    places = {
        e.id: (e.number, e.evaluation.speedup)
        for e in entries
        if e.evaluation is not None and e.evaluation.speedup
    }
    accepted = {a["candidate"] for a in archive.accepted()}
    edges_x: list[float | None] = []
    edges_y: list[float | None] = []
    for entry in entries:
        for parent in entry.parents:
            if entry.id in places and parent in places:
                edges_x += [places[parent][0], places[entry.id][0], None]
                edges_y += [places[parent][1], places[entry.id][1], None]
    data: list[Data] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": edges_x,
            "y": edges_y,
            "line": {"color": "#ced4da", "width": 1},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    ]
    operators = sorted({e.operator for e in entries if e.id in places})
    for index, operator in enumerate(operators):
        own = [e for e in entries if e.operator == operator and e.id in places]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": operator,
                "x": [places[e.id][0] for e in own],
                "y": [places[e.id][1] for e in own],
                "text": [f"{e.id[:6]} {e.note}"[:_LONGEST] for e in own],
                "hovertemplate": "%{text}<br>%{y:.3f}<extra>%{fullData.name}</extra>",
                "marker": {
                    "size": [13 if e.id in accepted else 7 for e in own],
                    "color": PALETTE[index % len(PALETTE)],
                    "line": {
                        "color": "#1d2330",
                        "width": [1.5 if e.id in accepted else 0 for e in own],
                    },
                },
            }
        )
    style = layout(
        "Who came from whom",
        Axis("candidate", "number"),
        Axis("times as fast as the reference", "1"),
    )
    page.section(
        "Lineage", "Lines lead from a parent to its child; large points with a rim were accepted."
    ).figure({"data": data, "layout": style})


def _accepted(page: Page, archive: Archive) -> None:
    rows = []
    for each in archive.accepted():
        entry = archive.entry(each["candidate"])
        races = [c for c in archive.challenges(entry.id) if c["verdict"] == "won"]
        rows.append(
            (
                f"{entry.id[:6]} {entry.operator}",
                entry.note[:_LONGEST] or _params(entry),
                f"{each['gain']:.1%}",
                f"{each['speedup']:.3f}",
                sum(c["count"] for c in races) or "first",
                f"{each['spent']:,.3g} s",
            )
        )
    page.section(
        "Accepted",
        "What the search began with, and every candidate that won a challenge and its confirmation.",
    ).table(
        ("candidate", "what it is", "gain", "speed-up", "samples", "after"), rows, text_columns=2
    )
    rejected = [c for c in archive.challenges() if c["verdict"] != "won" and c["kind"] != "elite"]
    if rejected:
        page.section("Timed and not accepted").table(
            ("candidate", "against", "decision"),
            [(c["candidate"][:6], c["incumbent"][:6], c["reason"]) for c in rejected[-_SHOWN:]],
            text_columns=3,
        )


def _verdicts(page: Page, entries: list[Entry]) -> None:
    failed = [e for e in entries if e.evaluation is not None and not e.evaluation.ok]
    counts = Counter(e.evaluation.stage for e in failed if e.evaluation is not None)
    stages = [*STAGES, *(stage for stage in counts if stage not in STAGES)]
    section = page.section(
        "Stages", f"{len(entries)} candidates entered; each column is how many a stage rejected."
    )
    section.table(stages, [[str(counts.get(stage, 0)) for stage in stages]], text_columns=0)
    if failed:
        page.section("Rejected").table(
            ("candidate", "what it is", "stage", "reason"),
            [
                (
                    f"{e.id[:6]} {e.operator}",
                    e.note[:_LONGEST] or _params(e),
                    e.evaluation.stage,
                    e.evaluation.reason[:_LONGEST],
                )
                for e in failed[-_SHOWN:]
                if e.evaluation is not None
            ],
            text_columns=4,
        )


def _operators(page: Page, archive: Archive, entries: list[Entry]) -> None:
    gains = {a["candidate"]: math.log1p(a["gain"]) for a in archive.accepted()}
    rows = []
    for operator in dict.fromkeys(e.operator for e in entries):
        own = [e for e in entries if e.operator == operator and e.evaluation is not None]
        passed = sum(e.evaluation.ok for e in own if e.evaluation)
        won = [e for e in own if (e.id in gains and e.parents != ()) or gains.get(e.id, 0.0) > 0]
        seconds = sum(e.evaluation.seconds for e in own if e.evaluation)
        rows.append(
            (
                operator,
                len(own),
                passed,
                len(won),
                f"{math.expm1(sum(gains.get(e.id, 0.0) for e in own)):.1%}",
                f"{seconds:,.3g} s",
            )
        )
    section = page.section("Operators")
    section.table(("operator", "judged", "passed", "accepted", "gain in all", "judging"), rows)
    calls = archive.calls()
    if calls:
        tokens = sum(c["tokens_in"] + c["tokens_out"] for c in calls)
        section.prose(
            f"{len(calls)} calls of a language model: {tokens:,} tokens, cost "
            f"{sum(c['cost'] for c in calls):.4g}, {sum(c['seconds'] for c in calls):,.0f} s."
        )
    lessons = archive.lessons()
    if lessons:
        page.section(
            "What helped",
            "Mean gain over the parent in first timings, which are short, by action and state: the niche of "
            "the parent (four digits, 0 to 3) and what seems to limit it.",
        ).table(
            ("state", "action", "times", "mean gain"),
            [(x.state, x.action, x.n, f"{math.expm1(x.mean):+.1%}") for x in lessons[:_SHOWN]],
            text_columns=2,
        )


def _champion(page: Page, archive: Archive, task: Task, champion: Entry | None) -> None:
    if champion is None:
        return
    section = page.section("Champion", _params(champion))
    begun = task.beginning
    if "text" in begun:
        before = str(begun["text"]).splitlines()
        after = str(task.program(champion.candidate)["text"]).splitlines()
        difference = "\n".join(
            difflib.unified_diff(before, after, "start", "champion", lineterm="")
        )
        section.listing(difference or str(begun["text"]))


def _params(entry: Entry) -> str:
    return ", ".join(f"{name} {value}" for name, value in entry.candidate.params.items())
