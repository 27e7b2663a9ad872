"""Layers from the weights of published models, by the names that their checkpoints use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from foveal._arguments import need_tensors
from foveal._errors import OptionError, ShapeError
from foveal.layers.causal import LatentAttention
from foveal.layers.delta import GatedDeltaNet, KimiDeltaAttention

_Layer = TypeVar("_Layer", KimiDeltaAttention, GatedDeltaNet, LatentAttention)
Weights = Mapping[str, Tensor]
"""The tensors of one layer by their names in the checkpoint, without what stands before them."""


def load_kimi_delta_attention(
    weights: Weights, *, eps: float = 1e-5, dtype: torch.dtype | None = None
) -> KimiDeltaAttention:
    """A `KimiDeltaAttention` with the weights of one linear layer of a Kimi Linear checkpoint.

    Names: {q,k,v,b,o}_proj.weight, {q,k,v}_conv1d.weight (or one conv1d.weight), f_{a,b}_proj.weight,
    A_log, dt_bias (also below forget_gate.), g_{a,b}_proj.weight with or without bias, o_norm.weight;
    also f_proj.{0,1} and g_proj.{0,1}.  Sizes follow from the shapes.
    Options: eps of the norm; dtype None keeps that of q_proj.
    Limits: raises ShapeError where a name is missing, left over, or has another shape.
    """
    taken = _Taken(weights, {"forget_gate.": "", "f_proj.0.": "f_a_proj.", "f_proj.1.": "f_b_proj.",
                             "g_proj.0.": "g_a_proj.", "g_proj.1.": "g_b_proj."})  # fmt: skip
    heads = taken["A_log"].numel()
    value_dim = taken.matrix("g_a_proj.weight").shape[0]
    head_dim = taken.matrix("f_b_proj.weight").shape[0] // max(heads, 1)
    rows, dim = taken.matrix("q_proj.weight").shape
    q_heads = rows // max(head_dim, 1)
    layer = KimiDeltaAttention(
        dim,
        q_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        value_heads=heads,
        conv=taken.convolution_size(),
    )
    taken.fill(layer, "q", "k", "v", out="o_proj.weight")
    taken.convolutions(layer.q_conv.filter, layer.k_conv.filter, layer.v_conv.filter)
    taken.copy(layer.write.weight, "b_proj.weight")
    _linear(layer.decay, 0, taken, "f_a_proj")
    _linear(layer.decay, 1, taken, "f_b_proj")
    _linear(layer.read, 0, taken, "g_a_proj")
    _linear(layer.read, 1, taken, "g_b_proj")
    taken.copy(layer.rate, "A_log")
    taken.copy(layer.step, "dt_bias")
    taken.copy(layer.norm.weight, "o_norm.weight")
    return _done(layer, taken, eps, dtype)


def load_gated_delta_net(
    weights: Weights,
    *,
    key_heads: int | None = None,
    eps: float | None = None,
    largest_write: float = 1.0,
    dtype: torch.dtype | None = None,
) -> GatedDeltaNet:
    """A `GatedDeltaNet` with the weights of one linear layer of a published checkpoint.

    Names: either {q,k,v,a,b,g,o}_proj.weight, {q,k,v}_conv1d.weight (or one conv1d.weight), A_log,
    dt_bias, o_norm.weight; or, as in Qwen3-Next, in_proj_qkvz.weight and in_proj_ba.weight, whose
    rows come group by group of the key heads, conv1d.weight, norm.weight and out_proj.weight.
    Options: key_heads None is the number of value heads, which A_log has; the second form needs it, as
    no shape shows it there; eps None is 1e-5, or 1e-6 in the second form; largest_write 2 for models
    that allow negative eigenvalues; dtype None keeps that of the projections.
    Limits: as for `load_kimi_delta_attention`.
    """
    if key_heads is not None and key_heads < 1:
        raise ShapeError("key_heads", key_heads, "at least 1 is needed")
    if isinstance(weights, Mapping) and "in_proj_qkvz.weight" in weights:
        weights = _split_groups(_Taken(weights, {}), key_heads)
        eps = 1e-6 if eps is None else eps
    taken = _Taken(weights, {})
    value_heads = taken["A_log"].numel()
    key_heads = value_heads if key_heads is None else key_heads
    rows, dim = taken.matrix("q_proj.weight").shape
    layer = GatedDeltaNet(
        dim,
        key_heads,
        head_dim=rows // key_heads,
        value_dim=taken["o_norm.weight"].numel(),
        value_heads=value_heads,
        conv=taken.convolution_size(),
        largest_write=largest_write,
    )
    taken.fill(layer, "q", "k", "v", out="o_proj.weight")
    taken.convolutions(layer.q_conv.filter, layer.k_conv.filter, layer.v_conv.filter)
    taken.copy(layer.write.weight, "b_proj.weight")
    taken.copy(layer.decay.weight, "a_proj.weight")
    taken.copy(layer.read.weight, "g_proj.weight")
    taken.copy(layer.rate, "A_log")
    taken.copy(layer.step, "dt_bias")
    taken.copy(layer.norm.weight, "o_norm.weight")
    return _done(layer, taken, 1e-5 if eps is None else eps, dtype)


def load_latent_attention(
    weights: Weights, heads: int, *, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> LatentAttention:
    """A `LatentAttention` with the weights of one full layer of a Kimi Linear checkpoint.

    Names: q_proj.weight, kv_a_proj_with_mqa.weight, kv_a_layernorm.weight, kv_b_proj.weight,
    o_proj.weight.  Options: heads; eps of the norm; dtype None keeps that of q_proj.
    Limits: as for `load_kimi_delta_attention`.
    """
    if heads < 1:
        raise ShapeError("heads", heads, "at least 1 is needed")
    taken = _Taken(weights, {})
    latent_dim = taken["kv_a_layernorm.weight"].numel()
    shared_dim = taken.matrix("kv_a_proj_with_mqa.weight").shape[0] - latent_dim
    rows, dim = taken.matrix("q_proj.weight").shape
    head_dim = rows // heads - shared_dim
    value_dim = taken.matrix("o_proj.weight").shape[1] // heads
    layer = LatentAttention(
        dim,
        heads,
        latent_dim=latent_dim,
        head_dim=head_dim,
        shared_dim=shared_dim,
        value_dim=value_dim,
    )
    taken.fill(layer, "q", out="o_proj.weight")
    taken.copy(layer.down.weight, "kv_a_proj_with_mqa.weight")
    taken.copy(layer.norm.weight, "kv_a_layernorm.weight")
    taken.copy(layer.up.weight, "kv_b_proj.weight")
    return _done(layer, taken, eps, dtype)


class _Taken:
    """Weights under one spelling of their names, and which were copied."""

    def __init__(self, weights: Weights, spellings: Mapping[str, str]) -> None:
        if not isinstance(weights, Mapping):
            raise OptionError(
                "weights", f"a {type(weights).__name__}", "tensors by name are needed"
            )
        need_tensors(**weights)
        self.weights: dict[str, Tensor] = {}
        self.left = set()
        for name, tensor in weights.items():
            for old, new in spellings.items():
                name = name.replace(old, new)
            self.weights[name] = tensor
            self.left.add(name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.weights:
            raise ShapeError("weights", f"no {name}", "every weight of the layer is needed")
        return self.weights[name]

    def matrix(self, name: str, rank: int = 2) -> Tensor:
        """A weight of so many axes, whose sizes tell those of the layer."""
        found = self[name]
        if found.dim() != rank:
            raise ShapeError("weights", f"{name} {list(found.shape)}", f"{rank} axes are needed")
        return found

    def copy(self, parameter: Tensor, name: str, tensor: Tensor | None = None) -> None:
        """Fills a parameter; sizes of 1 do not count (A_log is [1, 1, H, 1] in some checkpoints)."""
        tensor = self[name] if tensor is None else tensor
        shapes = [[n for n in x.shape if n != 1] for x in (tensor, parameter)]
        if shapes[0] != shapes[1]:
            needed = f"{list(parameter.shape)} is needed"
            raise ShapeError("weights", f"{name} {list(tensor.shape)}", needed)
        with torch.no_grad():
            parameter.copy_(tensor.reshape(parameter.shape))
        self.left.discard(name)

    def fill(self, layer: nn.Module, *maps: str, out: str) -> None:
        """The linear maps of a layer with the names of the checkpoint."""
        for name in maps:
            self.copy(layer.get_submodule(name).weight, f"{name}_proj.weight")  # type: ignore[arg-type]
        self.copy(layer.get_submodule("out").weight, out)  # type: ignore[arg-type]

    def convolution_size(self) -> int:
        name = "conv1d.weight" if "conv1d.weight" in self.weights else "q_conv1d.weight"
        found = self[name]
        if found.dim() < 2:
            needed = "[channels, 1, size] is needed"
            raise ShapeError("weights", f"{name} {list(found.shape)}", needed)
        return int(found.shape[-1])

    def convolutions(self, *filters: Tensor) -> None:
        """The filters of q, k and v, which lie one behind the other in some checkpoints."""
        if "conv1d.weight" not in self.weights:
            for name, parameter in zip("qkv", filters, strict=True):
                self.copy(parameter, f"{name}_conv1d.weight")
            return
        whole = self["conv1d.weight"]
        if len(whole) != sum(len(parameter) for parameter in filters):
            needed = f"{sum(len(parameter) for parameter in filters)} channels are needed"
            raise ShapeError("weights", f"conv1d.weight {list(whole.shape)}", needed)
        parts = whole.split([len(parameter) for parameter in filters])
        for parameter, part in zip(filters, parts, strict=True):
            self.copy(parameter, "conv1d.weight", part)


def _linear(maps: nn.Sequential, place: int, taken: _Taken, name: str) -> None:
    """A linear map with its bias; a checkpoint without the bias means zeros."""
    layer = maps.get_submodule(str(place))
    assert isinstance(layer, nn.Linear)
    taken.copy(layer.weight, f"{name}.weight")
    if layer.bias is not None and f"{name}.bias" in taken.weights:
        taken.copy(layer.bias, f"{name}.bias")
    elif layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _split_groups(taken: _Taken, key_heads: int | None) -> dict[str, Tensor]:
    """The joint projections of Qwen3-Next as single ones, under the names of the other form."""
    if key_heads is None:
        # Twice as many heads of half the size have the same shapes: a guess would load another layer.
        raise OptionError("key_heads", None, "the number of key heads is needed for this form")
    value_heads = taken["A_log"].numel()
    value_dim, groups = taken["norm.weight"].numel(), value_heads // key_heads
    joint, pairs = taken.matrix("in_proj_qkvz.weight"), taken.matrix("in_proj_ba.weight")
    rows, rest = divmod(len(joint), key_heads)
    head_dim = rows // 2 - groups * value_dim
    channels = key_heads * 2 * head_dim + value_heads * value_dim
    if rest or head_dim < 1 or channels != len(taken.matrix("conv1d.weight", 3)):
        needed = f"the sizes of {key_heads} key heads are needed; is key_heads right?"
        raise ShapeError("weights", f"in_proj_qkvz.weight {list(joint.shape)}", needed)
    sizes = [head_dim, head_dim, groups * value_dim, groups * value_dim]
    parts = joint.unflatten(0, (key_heads, rows)).split(sizes, dim=1)
    if len(pairs) != 2 * value_heads or value_heads % key_heads:
        needed = f"{2 * value_heads} rows in groups of {key_heads} key heads are needed"
        raise ShapeError("weights", f"in_proj_ba.weight {list(pairs.shape)}", needed)
    b, a = pairs.unflatten(0, (key_heads, 2, groups)).unbind(1)
    q, k, v, z = (part.flatten(0, 1) for part in parts)
    renamed = {"in_proj_qkvz.weight", "in_proj_ba.weight", "norm.weight", "out_proj.weight"}
    single = {name: tensor for name, tensor in taken.weights.items() if name not in renamed}
    return single | {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "g_proj.weight": z,
        "a_proj.weight": a.flatten(0, 1),
        "b_proj.weight": b.flatten(0, 1),
        "o_norm.weight": taken["norm.weight"],
        "o_proj.weight": taken["out_proj.weight"],
    }


def _done(layer: _Layer, taken: _Taken, eps: float, dtype: torch.dtype | None) -> _Layer:
    if taken.left:
        needed = "weights of this layer only are needed"
        raise ShapeError("weights", ", ".join(sorted(taken.left)), needed)
    layer.norm.eps = eps
    return layer.to(taken["q_proj.weight"].dtype if dtype is None else dtype)
