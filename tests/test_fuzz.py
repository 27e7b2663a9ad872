"""Random problems: pattern, score, shape, layout and dtype drawn anew in every run."""

import random

import pytest
import torch

import foveal as fv
from foveal.testing import check_attend, packed_lengths, qkv
from tests.problems import random_layout, random_pattern, random_score, random_sizes

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_random_problem(seed: int) -> None:
    chance, source = random.Random(seed), torch.Generator().manual_seed(seed)
    sizes = random_sizes(chance)
    pattern = random_pattern(chance, sizes)
    q, k, v = qkv(sizes, source, chance.choice(DTYPES), random_layout(chance))
    score = random_score(chance, sizes, pattern, source)
    cu_seqlens = None
    if len(sizes.q_grid) == 1 and sizes.q_grid == sizes.kv_grid and chance.random() < 0.3:
        cu_seqlens = packed_lengths(sizes.q_grid[0], chance.randint(1, 4), source)
        try:
            fv.attend(q, k, v, pattern, score, cu_seqlens=cu_seqlens)
        except (fv.errors.PatternError, fv.errors.PackingError, fv.errors.ScoreError):
            cu_seqlens = None  # a document shorter than the window, or lists in a union
    check_attend(q, k, v, pattern, score, cu_seqlens=cu_seqlens, implementation="cpu")


@pytest.mark.parametrize("part", range(15))
def test_random_problems(part: int, source: torch.Generator) -> None:
    for number in range(10):
        check_random_problem(source.initial_seed() + number)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_many_random_problems(part: int, source: torch.Generator) -> None:
    for number in range(50):
        check_random_problem(source.initial_seed() + number)
