"""Arguments that steer another library's kernels, and what is said when somebody sets one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from foveal._errors import UnknownNameError
from foveal._plan import TILE_IMPLEMENTATIONS

_THEIRS = ("cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna", "flash-fna")
_THEIRS_DENSE = ("cutlass-fmha", "hopper-fmha", "blackwell-fmha", "flex-fmha", "flash-fmha")


class IgnoredArgumentWarning(UserWarning):
    """An argument that was accepted and means nothing here."""


# What each argument is for there, and its default; here tiles and kernels come from the plan.
_STEERING: dict[str, tuple[object, str]] = {
    "q_tile_shape": (None, "tiles are chosen by the plan"),
    "kv_tile_shape": (None, "tiles are chosen by the plan"),
    "backward_q_tile_shape": (None, "tiles are chosen by the plan"),
    "backward_kv_tile_shape": (None, "tiles are chosen by the plan"),
    "q_tile_size": (None, "tiles are chosen by the plan"),
    "kv_tile_size": (None, "tiles are chosen by the plan"),
    "backward_q_tile_size": (None, "tiles are chosen by the plan"),
    "backward_kv_tile_size": (None, "tiles are chosen by the plan"),
    "backward_kv_splits": (None, "how gradients are split belongs to the kernels of the plan"),
    "backward_use_pt_reduction": (False, "the product dO * O has one implementation"),
    "run_persistent_kernel": (True, "schedules belong to the kernels of the plan"),
    "kernel_schedule": (None, "schedules belong to the kernels of the plan"),
    "torch_compile": (False, "nothing is compiled by PyTorch inside the operator"),
    "use_autograd_fix": (True, "gradients flow through outputs and lses as they are"),
}


def ignore(arguments: Mapping[str, object]) -> None:
    """Warns about every argument that has another value than its default."""
    for name, value in arguments.items():
        default, reason = _STEERING[name]
        if value is not None and value != default:
            warnings.warn(
                f"{name}={value!r} is accepted and means nothing here: {reason}",
                IgnoredArgumentWarning,
                stacklevel=4,
            )


def implementation_of(backend: str | None) -> str | None:
    """The implementation that `backend` names; names of the other library leave the plan free."""
    if backend is None or backend in TILE_IMPLEMENTATIONS:
        return backend
    if backend in (*_THEIRS, *_THEIRS_DENSE):
        warnings.warn(
            f"backend={backend!r} names a kernel of another library: the plan chooses here, "
            f"unless it is one of {', '.join(TILE_IMPLEMENTATIONS)}",
            IgnoredArgumentWarning,
            stacklevel=4,
        )
        return None
    raise UnknownNameError("backend", backend, (*TILE_IMPLEMENTATIONS, *_THEIRS))
