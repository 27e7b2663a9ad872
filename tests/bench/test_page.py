"""The HTML builder: one file, no connection, data intact."""

import json
import math
import re
import shutil
import subprocess

import pytest

from foveal.bench.figures import Axis, Series, bars, heat_map, lines
from foveal.bench.page import Page

pytest.importorskip("plotly", reason="HTML plots need the report extra")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)


def _figures(text: str) -> list[dict]:
    return [
        json.loads(each)
        for each in re.findall(r'<script type="application/json">(.*?)</script>', text)
    ]


def test_page_names_no_external_resource() -> None:
    page = Page("Title", "Summary", facts=[("device", "a `cpu`")])
    page.section("Plots").figure(
        lines("time", [Series("a", [1], [2.0])], Axis("x"), Axis("y", "ms"))
    )
    page.section("Pictures").picture(("noisy", PNG))
    text = page.render()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert not re.search(r"(src|href)=\"(?!data:|#)", own)
    assert "default-src 'none'" in own


def test_plotly_is_inlined_once_and_only_when_needed() -> None:
    page = Page("Title")
    page.section("Words", "Only words.")
    assert len(page.render()) < 10_000
    figure = bars("bars", [Series("a", ["x"], [1.0])], Axis("case"), Axis("time", "ms"))
    page.section("Plots").figure(figure, figure)
    text = page.render()
    assert text.count("Plotly.newPlot(cell") == 1
    assert 4e6 < len(text) < 6e6
    assert len(_figures(text)) == 2


def test_every_axis_title_carries_its_unit() -> None:
    figure = lines(
        "t", [Series("a", [1, 2], [3.0, 4.0])], Axis("length", "tokens"), Axis("time", "ms")
    )
    assert figure["layout"]["xaxis"]["title"]["text"] == "length [tokens]"
    assert figure["layout"]["yaxis"]["title"]["text"] == "time [ms]"


def test_bars_lie_beside_their_names() -> None:
    names = [f"a case with a long name {index}" for index in range(13)]
    series = [Series("ours", names, [1.0] * 13, low=[0.5] * 13, high=[2.0] * 13)]
    figure = bars("bars", series, Axis(""), Axis("time", "ms", log=True))
    trace, style = figure["data"][0], figure["layout"]
    assert (trace["y"], trace["x"]) == (names, [1.0] * 13)
    assert trace["error_x"]["array"] == [1.0] * 13
    assert style["xaxis"]["title"]["text"] == "time [ms]"
    assert style["xaxis"]["type"] == "log"
    assert style["yaxis"]["autorange"] == "reversed"
    more = bars("bars", series * 6, Axis(""), Axis("time", "ms", log=True))
    assert more["layout"]["height"] > style["height"] > 13 * 30


def test_values_that_are_not_finite_become_gaps() -> None:
    page = Page("Title")
    page.section("Map").figure(heat_map("map", [[1.0, math.nan]], Axis("x"), Axis("y"), "share"))
    assert _figures(page.render())[0]["data"][0]["z"] == [[1.0, None]]


def test_text_is_escaped() -> None:
    page = Page("<b>")
    page.section("a & b", "if `x < 1`").table(("<i>",), [("</td>",), "a group"])
    text = page.render()
    assert "<b>" not in text
    assert "<i>" not in text
    assert "<code>x &lt; 1</code>" in text
    assert 'colspan="1">a group' in text


def test_script_ends_inside_figures_do_not_end_the_page() -> None:
    page = Page("Title")
    page.section("Plot").figure({"data": [], "layout": {"title": "</script><p>"}})
    assert "</script><p>" not in page.render()


def test_write_replaces_the_whole_file(tmp_path) -> None:
    target = tmp_path / "deep" / "report.html"
    Page("first").write(target)
    Page("second").write(target)
    assert "second" in target.read_text()
    assert [each.name for each in target.parent.iterdir()] == ["report.html"]


def test_unknown_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="PNG, JPEG or SVG is needed"):
        Page("t").section("s").picture(("x", b"GIF89a"))


def test_browser_draws_plots_without_console_message(tmp_path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium to open the page with")
    page = Page("Title")
    figure = lines("time", [Series("a", [1, 2], [2.0, 3.0])], Axis("x"), Axis("y", "ms", log=True))
    page.section("Plots").figure(figure, heat_map("map", [[1.0]], Axis("x"), Axis("y"), "share"))
    path = page.write(tmp_path / "report.html")
    options = "--headless --no-sandbox --disable-gpu --enable-logging=stderr"
    quiet = "--disable-background-networking --virtual-time-budget=5000"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(
        [browser, *options.split(), *quiet.split(), profile, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert shown.stdout.count('class="cell plot js-plotly-plot"') == 2
    assert "CONSOLE" not in shown.stderr
