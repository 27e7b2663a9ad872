"""The map of implementations and patterns, and the rates in it."""

from __future__ import annotations

from typing import Any

import pytest

from foveal.bench.heat import figure, heats
from foveal.bench.measure import BACKWARD, FORWARD, WARM
from foveal.bench.rates import rate, roofline
from foveal.bench.record import ABSENT, MEASURED, OUT_OF_MEMORY, REFUSED, WRONG, Record
from foveal.bench.report import html, terminal

WORK = {
    "pairs": 10,
    "flops": {FORWARD: 2e12, BACKWARD: 5e12},
    "bytes": {FORWARD: 1e9, BACKWARD: 2e9},
}
CEILINGS = {"bfloat16": {"flops_per_second": 1e15, "bytes_per_second": 1e12}}


def _record(column: str, competitor: str, status: str = MEASURED, **more: Any) -> Record:
    case = {
        **{"name": f"{column}, 64", "grid": [8, 8], "dtype": "bfloat16", "column": column},
        **{"q_heads": 4, "kv_heads": 4, "head_dim": 8},
    }
    return Record(
        run="r",
        case=case,
        key=column,
        competitor=competitor,
        title="foveal, triton" if competitor == "foveal-triton" else competitor,
        status=status,
        reason="" if status == MEASURED else f"the sentence of {competitor}",
        work=WORK,
        environment={"ceilings": CEILINGS, "device_name": "x"},
        **more,
    )


def _timed(column: str, competitor: str, forward: float, **more: Any) -> Record:
    samples = {FORWARD: [forward] * 3, WARM[FORWARD]: [forward / 2]}
    return _record(column, competitor, samples=samples, **more)


HOPPER = {"plan": {"implementation": "hopper"}}
TRITON = {"plan": {"implementation": "triton"}}
RECORDS = [
    _timed("full", "foveal", 0.004, **HOPPER),
    _timed("full", "foveal-triton", 0.008),
    _timed("full", "flex", 0.01, pass_reasons={BACKWARD: "it has no backward"}),
    _record("full", "absent", ABSENT),
    _timed("window", "foveal", 0.02, **TRITON),
    _record("window", "flex", WRONG),
    _record("window", "absent", ABSENT),
    _record("window", "cudnn", REFUSED),
    _record("window", "masked", OUT_OF_MEMORY),
]


def test_rates_count_visible_pairs_only() -> None:
    record = RECORDS[0]
    assert rate(record, FORWARD) == pytest.approx(2e12 / 0.004)
    assert rate(record, WARM[FORWARD]) == pytest.approx(2e12 / 0.002)
    assert rate(record, BACKWARD) is None
    assert roofline(record, FORWARD) == pytest.approx(0.002 / 0.004)
    assert rate(RECORDS[3], FORWARD) is None


def test_what_computes_another_result_has_no_rate() -> None:
    yardstick = _timed("full", "dense", 0.001, same_result=False)
    assert rate(yardstick, FORWARD) is None
    assert roofline(yardstick, FORWARD) is None


def test_rows_are_implementations_also_where_the_plan_chose_them() -> None:
    forward, backward = heats(RECORDS, (FORWARD, BACKWARD))
    assert forward.length == 64
    assert forward.columns == ("full", "window")
    assert forward.rows[:2] == ("foveal, hopper", "foveal, triton")
    assert forward.value("foveal, triton", "window") == pytest.approx(1e14)
    assert forward.chosen("foveal, triton", "window")
    assert not forward.chosen("foveal, triton", "full")
    assert forward.fastest("full") == forward.value("foveal, hopper", "full")
    assert backward.word("flex", "full") == "no pass"
    assert backward.reason("flex", "full") == "it has no backward"


def test_every_status_is_a_word_and_its_sentence() -> None:
    (heat,) = heats(RECORDS, (FORWARD,))
    words = {row: heat.word(row, "window") for row in ("flex", "absent", "cudnn", "masked")}
    assert words == {"flex": "WRONG", "absent": "absent", "cudnn": "refused", "masked": "memory"}
    assert heat.reason("cudnn", "window") == "the sentence of cudnn"
    assert heat.word("foveal, hopper", "window") == ""


def test_the_figure_shows_numbers_words_and_units() -> None:
    (heat,) = heats(RECORDS, (FORWARD,))
    plot = figure(heat)
    texts = [each["text"] for each in plot["layout"]["annotations"]]
    assert "<b>500</b>\N{BULLET}" in texts
    assert {"250", "200", "WRONG", "refused", "memory", "absent"} <= set(texts)
    assert plot["data"][0]["colorbar"]["title"]["text"] == "TFLOP/s of visible pairs"
    assert "50% of the roofline" in plot["data"][0]["text"][0][0].replace("<br>", " ")


def test_the_page_and_the_terminal_hold_map_rates_and_sentences() -> None:
    page = html(RECORDS)
    titles = [section.title for section in page.sections]
    assert {"Implementations and patterns", "Rates", "Not measured"} <= set(titles)
    assert "out of memory, the sentence of masked" in terminal(RECORDS)


def test_records_without_columns_make_no_map() -> None:
    assert heats([_timed("", "foveal", 1.0)], (FORWARD,)) == []
