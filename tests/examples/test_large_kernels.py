"""Networks of large filters: their shapes, that they learn, and what their textures hide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.large_kernels import __main__ as large_kernels
from examples.large_kernels.__main__ import Learn
from examples.large_kernels.networks import BLOCKS, Backbone, train
from examples.large_kernels.tasks import PERIODS, accuracy, coins, crops, overlap, textures
from foveal.layers import merge


@pytest.mark.parametrize("block", BLOCKS)
def test_a_network_learns_bright_from_dark(block: str, source: torch.Generator) -> None:
    torch.manual_seed(0)
    classes = torch.arange(16) % 2
    images = torch.randn(16, 6, 6, 1, generator=source) * 0.1 + classes[:, None, None, None]
    network = Backbone(block, 1, 2, dim=8, depth=1)
    losses = train(network, ((images, classes) for _ in range(30)), rate=1e-2)
    assert losses[-1] < losses[0]
    assert accuracy(network, images, classes) > 0.9
    torch.testing.assert_close(merge(network)(images), network(images), rtol=1e-3, atol=1e-3)


def test_pixels_keep_their_grid() -> None:
    network = Backbone("unireplk", 1, 2, dim=8, depth=1, window=5, pooled=False)
    assert network(torch.zeros(1, 5, 7, 1)).shape == (1, 5, 7, 2)


def test_textures_repeat_at_their_distance_only(source: torch.Generator) -> None:
    images, classes = textures(200, 40, source)
    pixels = images[..., 0]
    for number, period in enumerate(PERIODS):
        own = pixels[classes == number]
        for distance in (1, 2, 5, *PERIODS):
            product = float((own[:, :, distance:] * own[:, :, :-distance]).mean())
            assert abs(product - (0.5 if distance == period else 0.0)) < 0.05


def test_half_of_the_photograph_is_cut_in_squares(source: torch.Generator) -> None:
    picture, truth = coins()
    assert picture.shape[:-1] == truth.shape
    x, y = next(crops(picture, truth, 32, 1, source))
    assert x.shape == (4, 32, 32, 1)
    assert y.shape == (4, 32, 32)

    class Bright(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([0.5 - x, x - 0.5], dim=-1)

    assert 0.2 < overlap(Bright(), picture, truth) < 0.9


def test_a_record_says_what_was_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks: dict[str, Learn] = {
        "digits, a": lambda steps, device: {"right": steps / 8},
        "coins, a": lambda steps, device: {"overlap": 0.25},
    }
    monkeypatch.setattr(large_kernels, "TASKS", tasks)
    out = tmp_path / "new" / "records.jsonl"
    for only in ("digits", "digits|coins"):
        chosen = ["--steps", "4", "--device", "cpu", "--only", only, "--out", str(out)]
        assert large_kernels.main(chosen) == 0
    records = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert [record["task"] for record in records] == ["digits, a", "digits, a", "coins, a"]
    assert records[0]["scores"] == {"right": 0.5}
    assert records[0]["command"] == "python -m examples.large_kernels --steps 4 --device cpu"
    assert "0.250 overlap" in capsys.readouterr().out
