"""The Triton edition with the shares of LeanAttention: the larger ones go to the first programs."""

from __future__ import annotations

from torch import Tensor

from foveal.caches.view import View
from foveal.engines.decode import triton
from foveal.engines.decode.problem import DecodeProblem, Terms


def refuses(problem: DecodeProblem, terms: Terms) -> str | None:
    if "channels" in problem.kinds:
        return "entries with channels have shares in one order"
    return triton.refuses(problem, terms)


def decode(view: View, terms: Terms, q: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, Lq, Hq, Dv] in the dtype of q and lse [B, Lq, Hq]."""
    from foveal.engines.decode.launch import decode_on_device

    return decode_on_device(view, terms, q, lean=True)
