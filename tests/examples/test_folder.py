"""Results survive an interruption, and only results that are whole and still valid."""

from pathlib import Path

from examples.first_hour.folder import RunFolder


def test_a_finished_stage_is_found_again(tmp_path: Path) -> None:
    RunFolder(tmp_path).finish("image", {"torch": "2"}, {"psnr": 1.5})
    assert RunFolder(tmp_path).finished("image", {"torch": "2"}) == {"psnr": 1.5}


def test_other_settings_make_a_result_stale(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.finish("image", {"torch": "2"}, {"psnr": 1.5})
    assert folder.finished("image", {"torch": "3"}) is None


def test_a_torn_file_is_ignored(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.finish("image", {}, {"psnr": 1.5})
    whole = (tmp_path / "image.json").read_bytes()
    (tmp_path / "image.json").write_bytes(whole[:-9])
    assert folder.finished("image", {}) is None


def test_clear_forgets_everything(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.finish("image", {}, {})
    folder.clear()
    assert list(tmp_path.iterdir()) == []
