#!/usr/bin/env python3
"""Regenerates the numbers of the README and of benchmarks/README.md from committed records and the catalogue.

python scripts/readme.py            # rewrite both and benchmarks/cpu.svg
python scripts/readme.py --check    # exit 1 when they are stale
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import foveal as fv
from foveal.bench.heat import CHOSEN, Heat, heats
from foveal.bench.measure import BACKWARD, FORWARD, ratio, summarise
from foveal.bench.record import ABSENT, MEASURED, Record, RecordFile
from foveal.bench.selection.markdown import markdown

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
CHART = ROOT / "benchmarks" / "cpu.svg"
RECORDS = ROOT / "benchmarks" / "cpu.jsonl"
RESULTS = ROOT / "benchmarks" / "README.md"
MASKS = ROOT / "benchmarks" / "masks_h100.jsonl"
TIMINGS = {
    name: ROOT / "benchmarks" / f"{name}_h100.jsonl"
    for name in ("tile", "locality", "state", "convolution")
}
POLICIES = ROOT / "benchmarks" / "policies.jsonl"
POLICIES_GPU = ROOT / "benchmarks" / "policies_h100.jsonl"
CONVERSIONS = ROOT / "benchmarks" / "conversions.jsonl"
CALLS = {
    name: ROOT / "benchmarks" / f"{name}_h100.jsonl" for name in ("entmax", "sparse", "decode")
}
FUZZ = ROOT / "benchmarks" / "fuzz_h100.jsonl"
SPARSE = ROOT / "benchmarks" / "sparse_quality.jsonl"
OURS = "foveal"
PASSES = ("forward", "forward+backward")
SHOWN = {
    "image 96x96, window 13x13": "2-D neighborhood 13x13 on 96x96, 4 heads of 64",
    "text 16384, causal window 512": "causal window 512, 16,384 tokens, 4 heads of 64",
}


# On a GPU: which record, which case, what it is called, and the peers' names.
GPU_SHOWN = {
    ("tile", "dense D128"): "dense attention, 16,384 tokens, 16 heads of 128",
    ("tile", "causal D128"): "causal, the same",
    ("tile", "window 1024"): "window of 1,024, 32,768 tokens",
    ("tile", "blocks 10 %"): "lists of blocks, 10 %, 32,768 tokens",
    ("tile", "64 documents causal"): "64 causal documents, 65,536 tokens",
    ("convolution", "31x31, bf16"): "depthwise 31x31, 64 images of 56x56, 128 channels",
    ("convolution", "7x7, bf16"): "depthwise 7x7, the same",
    ("convolution", "local_mix 7x7, bf16"): "`local_mix` 7x7, 8 images of 56x56, 8 heads of 32",
}
PEERS = {
    "cudnn": "cuDNN",
    "flash2": "FlashAttention-2",
    "flex": "FlexAttention",
    "torch": "PyTorch",
    "unfold and einsum": "unfold and einsum",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="exit 1 instead of writing")
    check = parser.parse_args().check
    records = [r for r in RecordFile(RECORDS).read() if r.name in SHOWN]
    text = README.read_text(encoding="utf-8")
    text = _between(text, "numbers", _table(records))
    text = _between(text, "gpu numbers", _gpu_table())
    text = _between(text, "families", _families())
    results = _between(RESULTS.read_text(encoding="utf-8"), "masks", _masks())
    for name, path in TIMINGS.items():
        results = _between(results, name, _timings(path))
    for name, path in CALLS.items():
        results = _between(results, f"{name} calls", _calls(path))
    results = _between(results, "fuzz", _fuzz())
    results = _between(results, "sparse", markdown(_lines(SPARSE)))
    results = _between(results, "policies", _policies())
    results = _between(results, "host caches", _host_caches())
    results = _between(results, "conversions", _conversions())
    stale = []
    for path, content in ((README, text), (CHART, _chart(records)), (RESULTS, results)):
        if path.exists() and path.read_text(encoding="utf-8") == content:
            continue
        stale.append(path.relative_to(ROOT))
        if not check:
            path.write_text(content, encoding="utf-8")
    if stale and check:
        print("stale, run scripts/readme.py:", *stale)
    return 1 if stale and check else 0


def _between(text: str, name: str, content: str) -> str:
    """The text with what stands between the two markers replaced."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(pattern, lambda found: found[1] + content + "\n" + found[2], text, flags=re.S)


def _table(records: Sequence[Record]) -> str:
    lines = ["| | pass | foveal | others in the same run |", "|---|---|---|---|"]
    for case, title in SHOWN.items():
        group = _timed(records, case)
        ours = next(r for r in group if r.competitor == OURS)
        for part in PASSES:
            if part not in ours.samples:
                continue
            others = [
                f"{r.title} {_ms(r, part)} ms ({ratio(r.samples[part], ours.samples[part]).median:.1f}x)"
                for r in group
                if r is not ours and r.run == ours.run and r.same_result and part in r.samples
            ]
            lines.append(f"| {title} | {part} | **{_ms(ours, part)} ms** | {', '.join(others)} |")
    facts = records[0].environment
    lines.append("")
    lines.append(
        f"{facts['device_name']}, {facts['threads']} threads, float32, PyTorch {facts['torch']}; "
        "medians; in brackets, how many times as long as foveal. `foveal bench --suite cpu --threads 2`"
    )
    return "\n".join(lines)


def _masks() -> str:
    """TFLOP/s of every implementation on every mask, forward / backward, one table per length."""
    records = RecordFile(MASKS).read()
    if not records:
        return "No records of the masks suite are committed yet."
    blocks = [
        f"`{MASKS.name}`: `foveal bench --suite masks --device cuda` ([what is measured]"
        "(../docs/guides/masks.md)); the `--out` folder was removed from the recorded commands."
    ]
    found = heats(records, (FORWARD, BACKWARD))
    for forward, backward in zip(found[::2], found[1::2], strict=True):
        rows = [
            row
            for row in forward.rows
            if any(forward.word(row, c) != _ABSENT for c in forward.columns)
        ]
        lines = [
            f"TFLOP/s forward / backward, {forward.length:,} tokens:",
            "",
            f"| mask | {' | '.join(rows)} |",
            "|---" * (len(rows) + 1) + "|",
        ]
        for column in forward.columns:
            cells = (_mask_cell(forward, backward, row, column) for row in rows)
            lines.append(f"| {column} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    facts, absent = records[0].environment, {r.title for r in records if r.status == ABSENT}
    ceilings = facts["ceilings"][records[0].case["dtype"]]
    missing = f" Not installed there: {', '.join(sorted(absent))}." if absent else ""
    products, copies = (ceilings[name] / 1e12 for name in ("flops_per_second", "bytes_per_second"))
    blocks.append(
        f"{facts['device_name']}, PyTorch {facts['torch']}, bfloat16, 64 heads of 128 on 8, FLOPs of "
        f"visible pairs; {CHOSEN} what the plan chooses; ceilings measured in the run: "
        f"{products:.0f} TFLOP/s, {copies:.2f} TB/s.{missing}"
    )
    return "\n\n".join(blocks)


def _newest(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by case, runner and pass; of several runs of a case the newest counts."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    newest: dict[str, int] = {}
    run = 0
    for line in _lines(path):
        run += "device" in line
        if "milliseconds" in line:
            if newest.get(line["case"]) != run:
                newest[line["case"]], found[line["case"]] = run, {}
            own = found[line["case"]].setdefault(line["runner"], {})
            own[line["pass"]] = line["milliseconds"]
    return found


def _gpu_table() -> str:
    """The fastest of ours and of every peer, whatever its layout, forward / backward."""
    lines = ["| ms forward / backward | foveal | others in the same run |", "|---|---|---|"]
    for (name, case), title in GPU_SHOWN.items():
        times: dict[str, list[float]] = {}
        for runner, passes in _newest(TIMINGS[name])[case].items():
            kind = runner.partition(",")[0]
            kind = OURS if kind in ("hopper", "triton") else kind
            if FORWARD in passes and BACKWARD in passes:
                own = [passes[FORWARD], passes[BACKWARD]]
                times[kind] = [min(pair) for pair in zip(own, times.get(kind, own), strict=True)]
        ours = times[OURS]
        cells = []
        for kind in (kind for kind in PEERS if kind in times):
            factors = " / ".join(f"{x / y:.3g}x" for x, y in zip(times[kind], ours, strict=True))
            cells.append(f"{PEERS[kind]} {_pair(times[kind])} ({factors})")
        lines.append(f"| {title} | **{_pair(ours)}** | {', '.join(cells)} |")
    facts = _lines(TIMINGS["tile"])[0]
    lines.append("")
    lines.append(
        f"{facts['device']}, bfloat16, PyTorch {facts['torch']}; medians of device time. "
        "[All records](benchmarks/README.md), what falls short among them"
    )
    return "\n".join(lines)


def _pair(times: Sequence[float]) -> str:
    return " / ".join(f"{time:#.3g}" for time in times)


def _timings(path: Path) -> str:
    """Milliseconds forward / backward of every runner."""
    lines, found = _lines(path), _newest(path)
    runners = list(dict.fromkeys(runner for case in found.values() for runner in case))
    table = [
        f"| ms forward / backward | {' | '.join(runners)} |",
        "|---" * (len(runners) + 1) + "|",
    ]
    for case, by_runner in found.items():
        cells = (
            " / ".join(
                f"{by_runner[runner][name]:.3f}" if name in by_runner[runner] else "-"
                for name in (FORWARD, BACKWARD)
            )
            if runner in by_runner
            else ""
            for runner in runners
        )
        table.append(f"| {case} | {' | '.join(cells)} |")
    facts = lines[0]
    types = "" if any("float32" in case for case in found) else " bfloat16,"
    return "\n".join(
        [*table, "", f"{facts['device']},{types} PyTorch {facts['torch']}, Triton 3.6."]
    )


def _calls(path: Path) -> str:
    """Milliseconds of records that hold one call, or a forward and a backward, in a line."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found: dict[str, str] = {}
    for line in lines:
        if "foveal forward ms" in line:
            times = [line["foveal forward ms"], line["foveal backward ms"]]
        elif "ms" in line:
            times = [line["ms"]]
        elif "samples_ms" in line:
            times = [statistics.median(line["samples_ms"])]
        else:
            continue
        shape = f", {line['length']:,} tokens" if "length" in line else ""
        shape += f", {line['heads']} heads on {line['kv_heads']}" if "kv_heads" in line else ""
        found[line["case"] + shape] = " / ".join(f"{time:.3f}" for time in times)
    rows = [f"| {case} | {times} |" for case, times in found.items()]
    facts = lines[0]
    device = f"{facts['device']}, bfloat16, PyTorch {facts['torch']}, Triton {facts['triton']}."
    return "\n".join(["| case | ms |", "|---|---|", *rows, "", device])


def _fuzz() -> str:
    """Random problems per implementation: how many agreed, and of which kinds."""
    lines = [
        "| implementation | agreed | failed | largest error, of what is allowed | data types |",
        "|---|---|---|---|---|",
    ]
    notes = []
    for line in FUZZ.read_text(encoding="utf-8").splitlines():
        count = json.loads(line)
        name, dtypes = count["implementation"], count["dtype"]
        types = ", ".join(f"{dtype} {number}" for dtype, number in dtypes.items())
        worst = f"{count['worst_error_of_allowed']:.2f}"
        lines.append(f"| `{name}` | {count['agreed']} | {count['failed']} | {worst} | {types} |")
        dims = sorted(int(dim) for dim in count["head_dim"])
        notes.append(
            f"`{name}`: {len(count['pattern'])} kinds of patterns, {len(count['score'])} of scores, "
            f"head_dim {', '.join(map(str, dims))}."
        )
    return "\n".join([*lines, "", *notes])


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines, none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def _policies() -> str:
    """Share of the bytes and divergence by budget, on a real model; share of a GPU's memory."""
    found: dict[tuple[str, float | None], dict[str, Any]] = {}
    for line in _lines(POLICIES):
        values = line["values"]
        if line["task"] == "loss":  # its bytes are those behind the tokens that were predicted
            values = {"divergence": values["divergence"]}
        found.setdefault((line["variant"], line["budget"]), {}).update(values)
    taken = {(x["policy"], x["budget"]): x["share"] for x in _lines(POLICIES_GPU) if "policy" in x}
    exact = found.get(("dense", None), {}).get("full_layer_bytes", math.nan)
    names = list(dict.fromkeys(name for name, budget in found if budget is not None))
    shares = (0.5, 0.25, 0.125)
    rows = [
        "| policy | written as exact at full budget | 1/2 | 1/4 | 1/8 | H100, memory at 1/2, 1/4, 1/8 |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        whole = found[name, 1.0]
        cells = [
            f"{found[name, b]['full_layer_bytes'] / exact:.3f} / {found[name, b]['divergence']:.3f}"
            for b in shares
        ]
        memory = ", ".join(f"{taken[name, b]:.3f}" for b in shares if (name, b) in taken)
        same = f"{whole['same_tokens']} of {whole['new_tokens']} tokens"
        rows.append(f"| `{name}` | {same} | {' | '.join(cells)} | {memory} |")
    return "\n".join(rows)


def _host_caches() -> str:
    """Caches with their old keys on the host: memory, bytes of a step, its time, by budget."""
    rows = [
        "| cache | budget | memory of the device | fetched in a step | append / decode, ms "
        "| median error, rows with other keys |",
        "|---|---|---|---|---|---|",
    ]
    for line in _lines(POLICIES_GPU):
        if "cache" not in line:
            continue
        cells = (
            f"`{line['cache']}`",
            f"{line['budget']:g}",
            f"{line['taken_bytes'] / line['whole_bytes']:.3f}",
            f"{line['fetched_bytes'] / line['whole_bytes']:.3f}",
            f"{line['append_seconds'] * 1e3:.1f} / {line['step_seconds'] * 1e3:.1f}",
            f"{line['error']:.4f}, {line['rows_elsewhere']} of {line['rows']}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _conversions() -> str:
    """Losses of held-out text by stage of a conversion."""
    rows = [
        "| kind | layers | as it was | new layers | layers taught | logits taught | "
        "error of the layers, first and last step |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in _lines(CONVERSIONS):
        v = line["values"]
        losses = " | ".join(f"{v[x]:.3f}" for x in ("teacher", "untrained", "layers", "logits"))
        curves = list(v["layer_curves"].values())
        first, last = (sum(c[at] for c in curves) / len(curves) for at in (0, -1))
        numbers = ", ".join(map(str, v["numbers"]))
        rows.append(f"| `{line['variant']}` | {numbers} | {losses} | {first:.2f}, {last:.3f} |")
    return "\n".join(rows)


_ABSENT = "absent"


def _mask_cell(forward: Heat, backward: Heat, row: str, column: str) -> str:
    if forward.value(row, column) is None:
        return forward.word(row, column)
    passes = []
    for heat in (forward, backward):
        value = heat.value(row, column)
        text = heat.word(row, column) if value is None else f"{value / 1e12:.0f}"
        passes.append(
            f"**{text}**" if value is not None and value == heat.fastest(column) else text
        )
    return " / ".join(passes) + (f" {CHOSEN}" if forward.chosen(row, column) else "")


def _families() -> str:
    counts = Counter(system.family for system in fv.systems())
    lines = ["| family | systems | names |", "|---|---|---|"]
    for family, count in counts.items():
        names = ", ".join(f"`{system.name}`" for system in fv.systems(family))
        lines.append(f"| {family} | {count} | {names} |")
    return "\n".join(lines)


def _timed(records: Sequence[Record], case: str) -> list[Record]:
    return [r for r in records if r.name == case and r.status == MEASURED]


def _ms(record: Record, part: str) -> str:
    return f"{summarise(record.samples[part]).median * 1e3:,.0f}"


def _chart(records: Sequence[Record]) -> str:
    """Forward times as bars on a logarithmic scale, one group per case."""
    rows: list[tuple[str, float | None, bool]] = []
    for case, title in SHOWN.items():
        rows.append((title, None, False))
        group = [r for r in _timed(records, case) if "forward" in r.samples and r.same_result]
        for record in sorted(group, key=lambda r: summarise(r.samples["forward"]).median):
            seconds = summarise(record.samples["forward"]).median
            rows.append((record.title, seconds * 1e3, record.competitor == OURS))
    times = [time for _, time, _ in rows if time is not None]
    low, high = 10 ** math.floor(math.log10(min(times))), 10 ** math.ceil(math.log10(max(times)))
    left, width, line, top = 250, 430, 26, 34

    def x(time: float) -> float:
        return left + width * math.log10(time / low) / math.log10(high / low)

    bottom = top + line * len(rows)
    parts = []
    tick = low
    while tick <= high:
        parts.append(
            f'<path d="M{x(tick):.1f} {top - 6}V{bottom}" stroke="#d5dae2"/>'
            f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:,g} ms</text>'
        )
        tick *= 10
    for index, (label, time, ours) in enumerate(rows):
        y = top + line * index
        if time is None:
            parts.append(f'<text x="8" y="{y + 15}" font-weight="600">{escape(label)}</text>')
            continue
        fill = "#0b6e99" if ours else "#b5bdc9"
        parts.append(
            f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{left}" y="{y}" width="{x(time) - left:.1f}" height="19" fill="{fill}"/>'
            f'<text x="{x(time) + 6:.1f}" y="{y + 14}">{time:,.0f} ms</text>'
        )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {bottom + 28}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1d2733">\n'
        f'<rect width="760" height="{bottom + 28}" fill="#ffffff"/>\n'
        '<text x="8" y="18" fill="#5a6675">Forward on a CPU, logarithmic scale, less is better</text>\n'
        f"{body}\n</svg>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
