import pytest
import torch
from torch.utils import deterministic

from foveal.testing import poisoned_allocations


def uninitialised() -> dict[str, torch.Tensor]:
    x = torch.zeros(3, 4)
    grown = torch.zeros(2).resize_(9)
    return {
        "empty": torch.empty(5),
        "new_empty": x.new_empty(5),
        "empty_like": torch.empty_like(x),
        "empty_strided": torch.empty_strided((2, 3), (3, 1)),
        "new_empty_strided": x.new_empty_strided((2, 3), (3, 1)),
        "empty_permuted": torch.empty_permuted((2, 3), (1, 0)),
        "resize_": grown[2:],
        "Tensor": torch.Tensor(5),
        "half": torch.empty(5, dtype=torch.float16),
        "bfloat16": torch.empty(5, dtype=torch.bfloat16),
        "double": torch.empty(5, dtype=torch.float64),
    }


@pytest.mark.parametrize("name", uninitialised())
def test_every_kind_of_allocation_is_filled(name: str) -> None:
    with poisoned_allocations():
        assert bool(uninitialised()[name].isnan().all())


def test_integers_are_filled_with_the_largest() -> None:
    with poisoned_allocations():
        for dtype in (torch.int32, torch.int64, torch.uint8):
            assert bool((torch.empty(5, dtype=dtype) == torch.iinfo(dtype).max).all())


def test_also_inside_autograd_functions() -> None:
    class Leaky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx, dx):
            return torch.empty_like(dx)

    x = torch.zeros(4, requires_grad=True)
    with poisoned_allocations():
        y = Leaky.apply(x)
        assert bool(y.isnan().all())
        assert bool(torch.autograd.grad(y.sum(), x)[0].isnan().all())


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_settings_come_back(before: tuple[bool, bool]) -> None:
    enabled, warn_only = before
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    filled = deterministic.fill_uninitialized_memory
    try:
        with pytest.raises(ZeroDivisionError), poisoned_allocations():
            raise ZeroDivisionError
        assert torch.are_deterministic_algorithms_enabled() == enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
        assert deterministic.fill_uninitialized_memory == filled
    finally:
        torch.use_deterministic_algorithms(False)


def test_written_memory_is_left_alone() -> None:
    with poisoned_allocations():
        assert bool((torch.ones(3) + torch.zeros(3) == 1).all())
