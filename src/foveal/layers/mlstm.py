"""The layer around the matrix memory of xLSTM."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foveal._errors import OptionError
from foveal._scan import scan
from foveal.layers.state import LayerState, StateLayer
from foveal.rules import MLSTM


class MLSTMLayer(StateLayer):
    """y = W_o [sigmoid(W_r x) * RMSNorm_head(o)], o by `MLSTM` with gates linear in x.

    Shapes: x and y [B, L, dim]; packed and in pieces as for `StateLayer`.
    Options: head_dim of q and k, None is half of dim / heads; rule, `MLSTM()` by default.
    Equals: any cut of x in two calls that pass the state.
    Paper: xLSTM (2405.04517); Tiled Flash Linear Attention (2503.14376).
    """

    def __init__(
        self, dim: int, heads: int, *, head_dim: int | None = None, rule: MLSTM | None = None
    ) -> None:
        super().__init__(dim, heads)
        head_dim = max(dim // (2 * heads), 1) if head_dim is None else head_dim
        self.rule = MLSTM() if rule is None else rule
        if not isinstance(self.rule, MLSTM):
            raise OptionError("rule", repr(rule), "an MLSTM is needed")
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.k = nn.Linear(dim, heads * head_dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.forget = nn.Linear(dim, heads)
        self.write = nn.Linear(dim, heads)
        self.read = nn.Linear(dim, dim, bias=False)
        self.norm = nn.RMSNorm(dim // heads, eps=1e-6)
        self.out = nn.Linear(dim, dim, bias=False)

    def mix(
        self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        o, memory = scan(
            self.split(self.q(x)),
            self.split(self.k(x)),
            self.split(self.v(x)),
            self.rule,
            log_decay=F.logsigmoid(self.forget(x)),
            write_gate=self.write(x),
            initial_state=None if state is None else state.memory,
            return_state=True,
            cu_seqlens=cu_seqlens,
        )
        y = self.out(torch.sigmoid(self.read(x)) * self.norm(o).flatten(-2))
        return y, LayerState((), memory)
