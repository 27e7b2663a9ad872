"""How fast a measurement is: FLOP/s of visible pairs, and the share of what the device allows.

    FLOP/s   = 2 (D + Dv) x batch x query heads x visible pairs / median time;  backward: 2.5 times that
    roofline = max(FLOPs / ceiling of products, bytes / ceiling of copies) / median time

Pairs are counted from the pattern that was computed; ceilings are measured on the device at the start
of the run.  What a competitor computes beside visible pairs counts as nothing.
"""

from __future__ import annotations

from foveal.bench.measure import summarise
from foveal.bench.record import Record


def rate(record: Record, part: str) -> float | None:
    """FLOP/s of a pass (cold or warm); None where it was not timed or computes another result."""
    seconds = _seconds(record, part)
    flops = record.work.get("flops", {}).get(_plain(part))
    return flops / seconds if seconds and flops is not None else None


def roofline(record: Record, part: str) -> float | None:
    """Share of the bound that the device sets, 1 at best; None where no ceiling was measured."""
    seconds = _seconds(record, part)
    known = record.environment.get("ceilings", {}).get(record.case.get("dtype"))
    if not seconds or not known or not record.work:
        return None
    products = record.work["flops"][_plain(part)] / known["flops_per_second"]
    copies = record.work["bytes"][_plain(part)] / known["bytes_per_second"]
    return float(max(products, copies) / seconds)


def _seconds(record: Record, part: str) -> float | None:
    samples = record.samples.get(part)
    return summarise(samples).median if samples and record.same_result else None


def _plain(part: str) -> str:
    return part.removesuffix(", warm")
