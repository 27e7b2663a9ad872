"""What a trained model is converted to: a window with a gate, in the place of a layer that sees all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from foveal._attend import attend
from foveal._judged import judged, need_shape
from foveal.layers.causal import rotary
from foveal.layers.gated_window import GatedWindowAttention
from foveal.patterns import Causal, Sliding
from foveal.systems.base import Claim, Draw, Identity, System


@judged
def attention_editing(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, window: int = 256
) -> Tensor:
    """o = 2 sigmoid(gate) * attention to the last `window` keys; a gate of 0 changes nothing.

    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv], gate [B, L, Hq, Dv].
    `fv.hf.convert(model, "gated_swa", data=tokens)` puts it into a trained model and teaches it there; the
    other target of the paper, "mla", is `foveal.layers.LatentAttention`.
    """
    need_shape("gate", gate, (*q.shape[:3], v.shape[3]), like=q)
    return 2 * torch.sigmoid(gate) * attend(q, k, v, Sliding(window - 1))


class _Attention(nn.Module):
    """Causal attention with the parts and names of a layer of transformers."""

    is_causal, layer_idx, scaling = True, 0, 2**-0.5

    def __init__(self, maps: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = map(_linear, maps)

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, None]:
        x = hidden_states
        each = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (-1, 2)) for project in each)
        places = torch.arange(x.shape[1]).expand(len(x), -1)
        q, k = (rotary(y, places, 10000.0) for y in (q, k))
        return self.o_proj(attend(q, k, v, Causal()).flatten(-2)), None


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    made.weight.data = weight
    return made


class _Model(nn.Module):
    """A causal model of one layer: dim 6, 4 heads of 2, 2 of keys, 5 tokens."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        sizes = {"hidden_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
        self.config = SimpleNamespace(**sizes, rope_parameters={"rope_theta": 10000.0})
        self.config.get_text_config = lambda: self.config
        shapes = ((8, 6), (4, 6), (4, 6), (6, 8))
        self.attention = _Attention(tuple(draw.normal(*shape) for shape in shapes))
        self.tokens = nn.Parameter(draw.normal(5, 6))

    def forward(self, ids: Tensor, **options: Any) -> SimpleNamespace:
        x = self.tokens[ids]
        y, _ = self.attention(hidden_states=x)
        return SimpleNamespace(logits=(x + y) @ self.tokens.T)


def _gate(draw: Draw, window: int) -> tuple[Tensor, ...]:
    q, k, v = draw.qkv((draw.integer(2, 9),), heads=4, kv_heads=2)
    return q, k, v, draw.normal(*q.shape[:3], v.shape[3])


def _covered(draw: Draw) -> Claim:
    q, k, v, gate = _gate(draw, 9)
    return Claim(
        (q, k, v),
        lambda q, k, v: attention_editing(q, k, v, 0 * gate, window=9),
        lambda q, k, v: attend(q, k, v, Causal()),
    )


def _alone(draw: Draw) -> Claim:
    q, k, v, gate = _gate(draw, 1)
    return Claim(
        (v, gate),
        lambda v, gate: attention_editing(q, k, v, gate, window=1),
        lambda v, gate: 2 * torch.sigmoid(gate) * v.repeat_interleave(2, dim=2),
    )


def _begins(draw: Draw) -> Claim:
    """A conversion that has not learned yet, with a window that covers the text."""
    from foveal.hf import Schedule, convert

    model, length = _Model(draw), draw.integer(2, 9)
    ids = torch.randint(5, (2, length), generator=draw.generator)
    old = model.attention
    convert(model, "gated_swa", data=ids, window=length, schedule=Schedule(0, 0))
    new = model.attention

    def answer(layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer(hidden_states=x)[0]
        return y

    return Claim((draw.normal(2, length, 6),), lambda x: answer(new, x), lambda x: answer(old, x))


def _operands(shape: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    L, H, D = shape["grid"][0], shape["heads"], shape["head_dim"]
    K = math.gcd(H, shape["kv_heads"])
    return tuple((1, L, heads, D) for heads in (H, K, K, H))


ATTENTION_EDITING = System(
    name="attention_editing",
    title="Attention Editing: A Versatile Framework for Cross-Architecture Attention Conversion",
    year=2026,
    paper="Cheng et al.; arXiv 2604.05688. Its gate is not established, this one is ours",
    kind="model",
    summary="A window with a gate, which a layer of a trained model is replaced by and taught.",
    op=attention_editing,
    identities=(
        Identity("covered", "A gate of 0 and a window over all: causal attention.", _covered),
        Identity("alone", "A window of one token: the values times their gates.", _alone),
        Identity("begins", "Before it learns, `convert` leaves the layer as it was.", _begins),
    ),
    reference_shapes=({"grid": (8192,), "heads": 32, "kv_heads": 8, "head_dim": 128},),
    layer=GatedWindowAttention,
    family="cache",
    engine="tile",
    operands=_operands,
)
