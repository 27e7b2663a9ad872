"""A whole run: refusals, gates, resumption, reports, the command line."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveal._errors import UnknownNameError
from foveal.bench import cases as cases_module
from foveal.bench.baselines import Competitor, baselines
from foveal.bench.cases import SUITES, Case, suite, system_suite
from foveal.bench.measure import BOTH, FORWARD, Budget
from foveal.bench.ours import Foveal
from foveal.bench.record import (
    ABSENT,
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    REFUSED,
    WRONG,
    Record,
    RecordFile,
)
from foveal.bench.report import html, judge, terminal, terminal_judgements
from foveal.bench.requirements import AtMostGrows, AtMostTakes, FasterThan, Judgement
from foveal.bench.run import Job
from foveal.cli import main
from foveal.patterns import Neighborhood
from foveal.scores import RelativeBias, Softmax
from foveal.systems import system
from foveal.systems.base import Claim

CPU = torch.device("cpu")
TINY = Case("tiny", Neighborhood(window=3), (6, 5), q_heads=2, kv_heads=2, head_dim=4, value_dim=4)
FAST = Budget(seconds=0.0, rounds=(2, 2), warm_up=0.0)


class Absent(Competitor):
    name, title, package = "absent", "Absent", "a_package_that_is_not_there"


class Refusing(Competitor):
    name, title = "refusing", "Refusing"

    def refuses(self, case: Case, device: torch.device) -> str | None:
        return "it never wants to"


class Failing(Competitor):
    name, title = "failing", "Failing"

    def prepare(self, case, inputs):
        raise RuntimeError("no luck\nat all")


class Wrong(Competitor):
    name, title = "wrong", "Wrong"

    def prepare(self, case, inputs):
        good = baselines(["masked"])[0].prepare(case, inputs)
        return replace(good, attend=lambda q, k, v: good.attend(q, k, v) * 1.01)


class ForwardOnly(Competitor):
    name, title = "forward_only", "Forward only"

    def refuses_backward(self, case, device):
        return "it has no backward"

    def prepare(self, case, inputs):
        return baselines(["masked"])[0].prepare(case, inputs)


PEERS = (Absent(), Refusing(), Failing(), Wrong(), ForwardOnly(), *baselines(["dense"]))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    file = RecordFile(tmp_path_factory.mktemp("run") / "records.jsonl")
    return next(Job((TINY,), PEERS, CPU, file, FAST).run())


def _status(records: list[Record]) -> dict[str, str]:
    return {record.competitor: record.status for record in records}


def test_every_outcome_has_its_status(records: list[Record]) -> None:
    assert _status(records) == {
        "foveal": MEASURED,
        "absent": ABSENT,
        "refusing": REFUSED,
        "failing": FAILED,
        "wrong": WRONG,
        "forward_only": MEASURED,
        "dense": MEASURED,
    }


def test_what_is_wrong_is_never_timed(records: list[Record]) -> None:
    wrong = next(record for record in records if record.status == WRONG)
    assert not wrong.samples
    assert "o: error" in wrong.reason
    assert any(not verdict["ok"] for verdict in wrong.gate)


def test_record_holds_plan_samples_and_environment(records: list[Record]) -> None:
    ours = records[0]
    assert ours.plan["implementation"] in ("cpu", "reference")
    assert {part: len(values) for part, values in ours.samples.items()}.keys() >= {FORWARD, BOTH}
    assert {len(values) for values in ours.samples.values()} == {2}
    assert ours.environment["threads"] >= 1


def test_yardstick_is_known_to_compute_something_else(records: list[Record]) -> None:
    assert [r.competitor for r in records if not r.same_result] == ["dense"]


def test_missing_pass_keeps_its_sentence(records: list[Record]) -> None:
    partial = next(record for record in records if record.competitor == "forward_only")
    assert list(partial.samples) == [FORWARD]
    assert partial.pass_reasons[BOTH] == "it has no backward"


def test_killed_run_continues_with_what_is_missing(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    cases = (TINY, replace(TINY, name="second"))
    first = next(Job(cases, (), CPU, file, FAST).run())
    continued = list(Job(cases, (), CPU, file, FAST).run())
    assert [records[0].name for records in continued] == ["second"]
    assert file.read()[0] == first[0]
    more = list(Job(cases, baselines(["dense"]), CPU, file, FAST).run())
    assert [len(records) for records in more] == [2, 2]


def test_terminal_says_each_status_in_words(records: list[Record]) -> None:
    text = terminal(records)
    for words in (
        "absent, the package",
        "refused, it never",
        "failed, RuntimeError: no luck",
        "wrong, ",
    ):
        assert words in text
    assert "SDPA, dense (another result)" in text
    assert all(len(line) < 130 for line in text.splitlines())


@pytest.mark.parametrize("columns", [80, 100])
def test_terminal_fits_and_says_the_same(records: list[Record], columns: int) -> None:
    text = terminal(records, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert set(text.split()) == set(terminal(records).split())
    judged = Judgement("a claim of " + 12 * "many words ", ">= 2x", "3.0x (2.9 to 3.1)", True)
    narrow = terminal_judgements([judged], columns)
    assert max(map(len, narrow.splitlines())) <= columns
    for part in (judged.verdict, judged.needed, judged.measured):
        assert part in " ".join(narrow.split())


def test_a_sweep_of_one_point_is_no_figure() -> None:
    pytest.importorskip("plotly", reason="HTML plots need the report extra")
    records = [_fake(str(window), "foveal", 0.1, 10) for window in (3, 7)]
    for window, record in zip((3, 7), records, strict=True):
        record.case["dtype"] = "float32"
        record.case["points"] = [{"axis": "window", "line": "image", "x": window}]
    records[0].samples[BOTH] = [0.3] * 3
    text = html(records).render()
    assert f"image: {FORWARD}" in text
    assert f"image: {BOTH}" not in text


def test_page_can_be_made_from_an_old_file(records: list[Record], tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="HTML plots need the report extra")
    file = RecordFile(tmp_path / "records.jsonl")
    file.append(records)
    text = html(file.read()).render()
    assert "Not measured" in text
    assert "it never wants to" in text


def _fake(name: str, competitor: str, seconds: float, peak: int) -> Record:
    return Record(
        run="r",
        case={"name": name},
        key=name,
        competitor=competitor,
        title=competitor,
        status=MEASURED,
        samples={FORWARD: [seconds] * 3},
        peak_bytes={FORWARD: peak},
    )


@pytest.mark.parametrize(
    ("requirement", "met"),
    [
        (FasterThan("peer", "a", FORWARD, at_least=10), True),
        (FasterThan("peer", "a", FORWARD, at_least=11), False),
        (FasterThan("peer", "a", BOTH, at_least=1), None),
        (AtMostTakes("peer", "a", FORWARD, share=0.1), False),
        (AtMostTakes("peer", "a", FORWARD, share=0.2), True),
        (AtMostGrows("a", "b", FORWARD, factor=4.6), True),
        (AtMostGrows("a", "b", FORWARD, factor=4.4), False),
    ],
)
def test_requirements_judge(requirement: FasterThan, met: bool | None) -> None:
    records = [
        _fake("a", "foveal", 0.1, 10),
        _fake("a", "peer", 1.0, 100),
        _fake("b", "foveal", 0.45, 10),
    ]
    judgements = judge(records, [requirement])
    assert [each.met for each in judgements] == [met]
    assert judgements[0].verdict in terminal_judgements(judgements)


def test_requirements_of_other_cases_are_left_out() -> None:
    assert judge([_fake("a", "foveal", 1.0, 1)], [FasterThan("peer", "z", FORWARD, 2)]) == []


@pytest.mark.parametrize("each", SUITES, ids=lambda each: each.name)
def test_suites_are_sound(each) -> None:
    names = [case.name for case in each.cases]
    assert len(set(names)) == len(names)
    assert {peer.name for peer in baselines(each.against)} == set(each.against)
    for requirement in each.requirements:
        mentioned = {getattr(requirement, f, None) for f in ("case", "smaller", "larger")} - {None}
        assert mentioned <= set(names)
    for case in each.cases:
        case.pattern.validate(case.extent)
        assert json.dumps(case.describe())


def test_reference_shapes_of_a_system_become_cases() -> None:
    found = system_suite(system("neighborhood_attention"), CPU)
    assert [case.grid for case in found.cases] == [(56, 56), (28, 28)]
    assert isinstance(found.cases[0].pattern, Neighborhood)


def test_shapes_too_large_for_a_cpu_are_timed_on_fewer_heads() -> None:
    here = system_suite(system("gna"), CPU).cases[0]
    there = system_suite(system("gna"), torch.device("cuda")).cases[0]
    assert (here.q_heads, there.q_heads) == (2, 24)
    assert "2 of its 24 heads" in here.name


def test_unknown_names_are_answered_with_the_known() -> None:
    with pytest.raises(UnknownNameError, match="cpu, demo, smoke"):
        suite("nothing")
    with pytest.raises(UnknownNameError, match="masked, dense"):
        baselines(["nothing"])


Call = Callable[..., int]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(["bench", *words])


QUICK = ("--suite", "smoke", "--against", "none", "--budget", "0.01", "--passes", "forward")


def test_command_measures_resumes_renders_and_compares(
    call: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert call(*QUICK, "--out", "one") == 0
    assert "image 12x10, window 5x5" in capsys.readouterr().out
    assert call(*QUICK, "--out", "one") == 2
    assert "--resume continues it" in capsys.readouterr().err
    size = (tmp_path / "one" / "records.jsonl").stat().st_size
    assert call(*QUICK, "--out", "one", "--resume", "--json") == 0
    assert (tmp_path / "one" / "records.jsonl").stat().st_size == size
    answer = json.loads(capsys.readouterr().out)
    assert [record["status"] for record in answer["records"]] == [MEASURED] * 3
    assert call("--render", "one") == 0
    assert call("--compare", "one", "one") == 0
    assert "1.00x" in capsys.readouterr().out


def test_interrupted_command_keeps_what_was_measured(
    call: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Job.run

    def stop_after_one(self, progress):
        yield next(whole(self, progress))
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "run", stop_after_one)
    assert call(*QUICK, "--out", "one") == 130
    assert "--resume continues it" in capsys.readouterr().err
    assert len(RecordFile(tmp_path / "one" / "records.jsonl").read()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("--suite", "nothing"),
        ("smoke", "--suite", "smoke"),
        ("smoke", "--against", "nothing"),
        ("smoke", "--resume"),
        ("--render", "nowhere"),
    ],
)
def test_bad_usage_is_status_two(call: Call, words: tuple[str, ...]) -> None:
    assert call(*words) == 2


@pytest.mark.parametrize("name", ["cross_axis_attention", "ifactformer"])
def test_operators_without_a_pattern_are_gated_and_timed(name: str, tmp_path: Path) -> None:
    found = system_suite(system(name), CPU)
    small = replace(system(name), reference_shapes=({"grid": (3, 4), "heads": 2, "head_dim": 5},))
    cases = system_suite(small, CPU).cases
    assert [case.name.split()[0] for case in found.cases] == [name]
    file = RecordFile(tmp_path / "records.jsonl")
    (record,) = next(Job(cases, (), CPU, file, FAST).run())
    assert record.status == MEASURED
    assert {FORWARD, BOTH} <= set(record.samples)
    names = [verdict["name"] for verdict in record.gate]
    assert "o" in names
    assert "gradient 0" in names
    assert any(name.startswith(system(small.name).identities[0].name) for name in names)
    assert "3x4, 2 heads" in terminal([record])
    assert html([record]).sections


def test_an_operator_that_breaks_its_identity_is_red(tmp_path: Path) -> None:
    entry = system("cross_axis_attention")
    broken = replace(
        entry.identities[0], draw=lambda draw: Claim((draw.normal(3),), torch.sin, torch.cos)
    )
    shapes = ({"grid": (3, 4), "heads": 2, "head_dim": 5},)
    cases = system_suite(replace(entry, identities=(broken,), reference_shapes=shapes), CPU).cases
    file = RecordFile(tmp_path / "records.jsonl")
    (record,) = next(Job(cases, (), CPU, file, FAST).run())
    assert record.status == WRONG
    assert broken.name in record.reason


def test_a_reference_shape_is_timed_with_its_options() -> None:
    first = system_suite(system("gna"), torch.device("cuda")).cases[0]
    assert first.pattern == Neighborhood(80, stride=16)
    assert "window 80, stride 16" in first.name


def test_scores_are_moved_to_the_device_of_the_run() -> None:
    bias = RelativeBias(torch.zeros(2, 5))
    moved = cases_module.score_on(Softmax() + bias, torch.device("meta"))
    assert moved.members[1].table.device.type == "meta"
    plain = Softmax()
    assert cases_module.score_on(plain, torch.device("meta")) is plain


class Exhausted(Competitor):
    name, title = "exhausted", "Exhausted"

    def prepare(self, case, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB")


def test_a_score_with_tensors_is_planned_without_any() -> None:
    case = system_suite(system("sphere_attention"), CPU).cases[0]
    assert isinstance(case, Case)
    assert "KeyBias" in case.score.key
    assert Foveal().refuses(case, CPU) is None


def test_named_implementations_are_measured_or_say_why_not(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    job = Job((TINY,), (Exhausted(),), CPU, file, FAST, implementations=("triton", "sdpa", "cpu"))
    records = next(job.run())
    assert {r.competitor: r.status for r in records} == {
        "foveal": MEASURED,
        "foveal-triton": REFUSED,
        "foveal-sdpa": REFUSED,
        "exhausted": OUT_OF_MEMORY,
    }
    assert records[0].plan["implementation"] == "cpu"
    assert "it runs on CUDA tensors" in records[1].reason
    assert list(job.run()) == []


def test_records_count_the_work_of_the_case(records: list[Record]) -> None:
    work, tiles = records[0].work, records[0].plan["tiles"]
    assert work["pairs"] == tiles["pairs"] == int(TINY.pattern.dense_mask((6, 5), (6, 5)).sum())
    assert work["flops"][FORWARD] == 4 * 4 * 2 * work["pairs"]
    assert work["flops"][BOTH] == 3.5 * work["flops"][FORWARD]
    assert {"visited", "skipped", "full", "partial", "speedup_bound"} <= set(tiles)
    assert set(records[0].environment["ceilings"]) == {"float32"}


def test_everything_wrong_is_a_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "_competitors", lambda self, case: (None, (Wrong(),)))
    file = RecordFile(tmp_path / "records.jsonl")
    (record,) = next(Job((TINY,), (), CPU, file, FAST).run())
    assert record.status == WRONG


def test_masks_suite_runs_at_the_lengths_that_are_asked_for(
    call: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    masks = ("--suite", "masks", "--against", "none", "--budget", "0.01", "--passes", "forward")
    lengths = ("--lengths", "32,64", "--max-tokens", "40", "--only", "window")
    assert call(*masks, *lengths, "--out", "run") == 0
    names = [record.name for record in RecordFile(tmp_path / "run" / "records.jsonl").read()]
    assert set(names) == {
        f"{mask}, 32 tokens" for mask in ("window", "causal window", "global window")
    }
    assert "Implementations and patterns" in (tmp_path / "run" / "report.html").read_text()
    assert call("--compare", "run", "run") == 0
    assert call(*QUICK, "--lengths", "64") == 2
    assert "only masks has lengths" in capsys.readouterr().err
