"""The file of records: append-only, torn lines, concurrent writers."""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch

from foveal.bench.record import MEASURED, REFUSED, Record, RecordFile, environment

RECORD = Record(
    run="r",
    case={"name": "a case"},
    key="k",
    competitor="foveal",
    title="foveal",
    status=MEASURED,
    samples={"forward": [0.1, 0.2]},
)


def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "run" / "records.jsonl")
    file.append([RECORD, replace(RECORD, competitor="masked", status=REFUSED, reason="no")])
    first, second = file.read()
    assert first == RECORD
    assert second.reason == "no"


def test_torn_last_line_is_stepped_over_and_the_next_line_is_whole(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append([RECORD])
    whole = file.path.read_bytes()
    file.path.write_bytes(whole + whole[: len(whole) // 2])
    assert file.read() == [RECORD]
    file.append([replace(RECORD, key="other")])
    assert [each.key for each in file.read()] == ["k", "other"]


def test_latest_record_of_a_competitor_wins(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append([RECORD])
    file.append([replace(RECORD, run="later")])
    assert [each.run for each in file.read()] == ["later"]


def test_lines_of_another_schema_and_unknown_fields_are_tolerated(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl")
    file.append([RECORD])
    values = json.loads(file.path.read_text())
    lines = [values | {"schema": 99}, values | {"unknown": 1}, "text", {}]
    file.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert file.read() == [RECORD]


def _append(path: Path, name: str) -> None:
    for index in range(20):
        RecordFile(path).append([replace(RECORD, competitor=name, key=str(index))] * 2)


def test_concurrent_writers_do_not_mix_lines(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(path, name)) for name in ("a", "b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(path.read_text().splitlines()) == 80
    assert len(RecordFile(path).read()) == 40


def test_environment_is_json_and_names_the_machine() -> None:
    facts = environment(torch.device("cpu"))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["threads"] == torch.get_num_threads()
    assert facts["device_name"]
