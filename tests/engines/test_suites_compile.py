"""Every kernel that the timed suites launch compiles, with their real shapes, for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.engines import suites

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
Outcome = tuple[set[str], int, list[str]]
Run = Callable[..., Outcome]
# What a group is there for; the other kernels that it launches are compiled as well.
KERNELS = {
    "columns": {"column_kernel.column_attend_forward"},
    "estimates": {"low_bit_kernels.low_bit_rows", "low_bit_kernels.low_bit_tiles"},
    "prefill": {
        "antidiagonal_kernels.antidiagonal_levels",
        "antidiagonal_kernels.antidiagonal_shares",
        "column_kernel.column_attend_forward",
        "hopper_forward.tile_attend_forward",
        "merge_kernel.compose_merge_forward",
        "row_kernels.row_best",
        "row_kernels.row_places",
        "row_kernels.row_walk",
    },
    "native": {
        "cell_kernels.token_cells",
        "cell_kernels.token_order",
        "gate_kernel.compose_gate_backward",
        "gate_kernel.compose_gate_forward",
        "select_kernel.token_best",
        "select_kernel.token_scores",
        "token_kernels.token_attend_backward",
        "token_kernels.token_attend_by_key",
        "token_kernels.token_attend_shift",
        "token_kernels.token_attend_sum_kv",
        "token_kernels.token_attend_sum_near",
        "token_kernels.token_attend_sum_q",
    },
    "tiles": set(),
    "pages": {"attend.decode_attend_forward", "merge.decode_merge_forward"},
    "quality": {"column_kernel.column_attend_forward", "token_kernels.token_attend_by_key"},
}
# Tokens beside each other walk together on Hopper, and one by one elsewhere.
TILES = {"token_tile_kernels.token_attend_by_tile", "token_tile_kernels.token_unions"}
TOKENS = {"token_kernels.token_attend_by_token", "token_kernels.token_attend_sum_near"}
HERE = {"native": TILES, "tiles": TILES}
ELSEWHERE = {"native": TOKENS, "tiles": TOKENS}


# These kernels are compiled by the tests of their engines.
REACHED = {
    "masks, hopper": {"hopper_backward_joint.tile_attend_backward_joint", "row_kernels.row_walk"},
    "masks, triton": {"forward.tile_attend_forward", "backward.tile_attend_backward_kv"},
    "decode": {"attend.decode_attend_forward", "merge_kernel.compose_merge_forward"},
    "entmax": {"threshold.entmax_threshold", "gathered.entmax_values_gathered"},
}
# For other devices: kernels that no test of their own compiles.
OTHERS = [
    ("columns", "sm_80"),
    ("columns", "sm_100"),
    ("columns", "gfx942"),
    ("estimates", "sm_80"),
    ("estimates", "sm_100"),
    ("estimates", "gfx942"),
    ("native", "sm_80"),
    ("tiles", "sm_80"),
    ("tiles", "sm_100"),
    ("tiles", "gfx942"),
]


@pytest.fixture
def process() -> Iterator[Run]:
    """Runs a group in a new process, whose kept plans hold tensors that are nowhere."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=suites.start) as pool:
        yield lambda *arguments: pool.submit(suites.outcome, *arguments).result()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "device"),
    [*((group, "sm_90") for group in KERNELS), *OTHERS],
)
def test_what_the_suites_launch_compiles(group: str, device: str, process: Run) -> None:
    from triton.backends import backends

    if ("amd" if device == "gfx942" else "nvidia") not in backends:
        pytest.skip(f"this Triton has no backend for {device}")
    names, compiled, wrong = process(group, device)
    assert wrong == []
    expected = KERNELS[group] | (HERE if device == "sm_90" else ELSEWHERE).get(group, set())
    assert names >= expected
    assert compiled >= len(expected)


@pytest.mark.slow
@pytest.mark.parametrize("group", REACHED)
def test_the_suites_reach_their_kernels(group: str, process: Run) -> None:
    names, _, wrong = process(group, "sm_90", False)
    assert wrong == []
    assert names >= REACHED[group]
