"""Operands and options that do not fit a system by name: an error of the library that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import foveal as fv
from foveal import layers
from foveal.errors import FovealError


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


Q, V = zeros(1, 6, 2, 4), zeros(1, 6, 2, 3)
IMAGE, SCALAR = zeros(1, 6, 7, 3), zeros(1)
LINEAR = (
    "performer", "cosformer", "cottention", "dijiang", "fastmax", "based", "kernelized_transformer",
    "ff_kernel_attention", "nprf_rpe", "kernel_attention_advisor", "nala", "l2vit", "transnormer_llm",
    "tlinformer",
)  # fmt: skip
MADE: dict[str, Any] = {"tlinformer": {"window": 2, "observed": 2}}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(
    "operands",
    [
        (Q, zeros(1, 5, 2, 4), V),
        (Q, Q, zeros(1, 1, 2, 3)),
        (Q, Q, zeros(1, 6, 1, 3)),
        (Q, zeros(2, 6, 2, 4), zeros(2, 6, 2, 3)),
        (Q, zeros(1, 6, 2, 1), V),
        (Q, Q.long(), V),
        (Q, Q.float(), V),
        (Q[0], Q[0], V[0]),
        (Q.tolist(), Q, V),
    ],
)
def test_linear_attention_names_the_operand(name: str, operands: tuple[Any, ...]) -> None:
    with pytest.raises(FovealError, match=r"^[qkv]: "):
        fv.system(name).op(*operands, **MADE.get(name, {}))


def by_name(name: str, *operands: Any, **options: Any) -> Callable[[], Any]:
    return lambda: fv.system(name).op(*operands, **options)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (by_name("performer", Q, Q, V, implementation="triton"), "implementation: got 'triton'"),
        (by_name("transnormer", Q, Q, V, causal=False, implementation="x"), "implementation: got"),
        (by_name("performer", Q, Q, V, projection=zeros(5, 3)), "projection: got [5, 3]; [m, 4]"),
        (by_name("dijiang", Q, Q, V, weights=zeros(1)), "weights: got [1]; [4]"),
        (by_name("cottention", Q, Q, V, zeros(1)), "power: got [1]; [2]"),
        (by_name("transnormer_llm", Q, Q, V, zeros(1, 4)), "angles: got [1, 4]; [2, 4]"),
        (by_name("kernel_attention_advisor", Q, Q, V, zeros(3, 2, 4)), "advisor_k"),
        (by_name("fastmax", Q, Q, V, causal="no"), "causal: got 'no'; True or False"),
        (by_name("cosformer", Q, Q, V, limit=-3), "limit: got -3"),
        (by_name("kda", Q.long(), Q, V), "q: got torch.int64"),
        (by_name("set_transformer", Q, Q, V), "v: got [1, 6, 2, 3]; the head_dim of q, 4"),
        (by_name("set_transformer", Q, Q, Q, key_mask=zeros(1, 5) > 0), "key_mask: got [1, 5]"),
        (by_name("soft", IMAGE[..., None], IMAGE[..., None, :2]), "x: got [1, 6, 7, 3, 1]"),
        (by_name("ponet", Q, Q, Q, Q, zeros(1, 6, 2, 1)), "local: got [1, 6, 2, 1]"),
        (by_name("sparse_transformer", Q, Q, V, kind="foo"), "kind: got 'foo'"),
        (by_name("sparse_transformer", Q, Q, V, arrangement="foo"), "arrangement: got 'foo'"),
        (by_name("sparse_transformer", Q, Q, V, stride=0), "stride: got 0"),
        (by_name("s2_attention", Q, Q, V, dense_heads=3), "dense_heads: got 3; 0 to 2"),
        (by_name("s2_attention", Q, Q, V, local_blocks=0), "local_blocks: got 0"),
        (by_name("ht_demucs", Q, Q, V, window=1.5), "window: got 1.5"),
        (by_name("hdt", Q, Q, V, sentence=0), "sentence: got 0"),
        (by_name("hdt", Q, Q, V, groups=[[0]]), "groups: got a list"),
        (by_name("local_window", Q, Q, V, window=0), "window: got 0"),
        (by_name("local_window", Q, Q, V, look_backward=-1), "look_backward: got -1"),
        (by_name("tkl_local_attention", Q, Q, V, overlap=-1), "overlap: got -1"),
        (by_name("swin_windows", Q, Q, V, window=0), "window: got 0"),
        (by_name("dilated_window_3d", *[zeros(1, 4, 4, 4, 2, 4)] * 3, scope="foo"), "scope: got"),
        (by_name("dilated_window_3d", *[zeros(1, 4, 4, 4, 2, 4)] * 3, group=2), "group: got 2"),
        (by_name("box_attention", Q, Q, V, zeros(6, 4)), "coordinates: got torch.float64"),
        (by_name("cross_axis_attention", *[zeros(1, 4, 5, 2, 3)] * 3, axis=2), "axis: got 2"),
        (by_name("cross_axis_attention", *[zeros(4, 5, 2, 3)] * 3), "q: got [4, 5, 2, 3]"),
        (by_name("ifactformer", (Q,), (Q,), V, form="foo"), "form: got 'foo'"),
        (by_name("ifactformer", (Q,), (zeros(1, 6, 2, 5),), V), "k[0]: got [1, 6, 2, 5]"),
        (by_name("ifactformer", (Q,), (Q,), zeros(2, 6, 2, 3)), "q[0]: got [1, 6, 2, 4]"),
        (by_name("escaip", Q, Q, V, zeros(1, 6), cutoff=0.0), "cutoff: got 0.0"),
        (by_name("escaip", Q, Q, V, zeros(1, 6), directions=zeros(1, 6, 3)), "directions"),
    ],
)
def test_attention_names_the_argument(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(FovealError) as raised:
        call()
    assert said in str(raised.value)


FILTERS = zeros(3, 5, 5), zeros(3, 7, 7)
MIX = zeros(2, 7, 9, 2, 4), zeros(2, 5, 2, 4), zeros(2, 7, 9, 2, 3), zeros(9, 5), zeros(2, 9)
SELECTED = zeros(3, 3, 3), zeros(3, 5, 5), zeros(4, 3), zeros(2, 3, 4)
DEFORMED = zeros(4, 3, 3, 3), zeros(1, 6, 7, 9, 2), zeros(1, 6, 7, 9)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            by_name("lkca", zeros(1, 6, 7, 2, 3), zeros(3, 5, 5)),
            "filter: got [3, 5, 5]; [H, *window]",
        ),
        (by_name("light_conv", zeros(2, 8, 2, 3), zeros(3, 5)), "logits: got [3, 5]; [2, any]"),
        (by_name("lka", IMAGE, *FILTERS, zeros(4, 3)), "mixing: got [4, 3]; [3, 3]"),
        (by_name("lka", IMAGE, *FILTERS, zeros(3, 3), dilation=1.5), "dilation: got 1.5"),
        (by_name("unireplk", IMAGE, *FILTERS), "dilations: got (1, 2, 3, 4, 5)"),
        (by_name("unireplk", IMAGE, *FILTERS, dilations=(0,)), "dilations: got (0,)"),
        (by_name("inception_dwconv", IMAGE, *[zeros(2, 3, 3)] * 3), "[2, 2, 2] channels"),
        (
            by_name("parc_oversized", IMAGE, zeros(3, 10), zeros(3, 13)),
            "column: got [3, 10]; [3, 11]",
        ),
        (by_name("spartan_multiorder", IMAGE, zeros(1), *[zeros(3, 3, 3)] * 3), "gamma: got [1]"),
        (
            by_name("contmix", *MIX[:3], zeros(1, 5), MIX[4], window=3),
            "to_taps: got [1, 5]; [9, 5]",
        ),
        (by_name("contmix", MIX[0], zeros(1, 5, 2, 4), *MIX[2:], window=3), "k: got [1, 5, 2, 4]"),
        (by_name("atconv", IMAGE, zeros(1, 6, 7, 1), zeros(9, 9), zeros(3)), "features: got"),
        (
            by_name("hyper_zzw", zeros(1, 4, 4, 3), zeros(4, 4, 1)),
            "weight: got [4, 4, 1]; [4, 4, 3]",
        ),
        (
            by_name("selective_kernel_attention", IMAGE, *SELECTED[:3], zeros(1, 3, 4)),
            "expand: got",
        ),
        (
            by_name("deformable_conv_transformer", IMAGE, *DEFORMED[:2], zeros(1, 6, 7, 1)),
            "modulation",
        ),
        (
            by_name("flash_butterfly", zeros(2, 8, 3), zeros(3, 8), zeros(3), squash=-1.0),
            "squash: got",
        ),
        (by_name("aff", IMAGE, *[zeros(2, 3, 1, 1), zeros(2, 3)] * 2), "first_bias: got [2, 3]"),
        (by_name("fourier_mixer_3d", IMAGE, zeros(3, 6, 4, 1)), "weight: got torch.float64"),
    ],
)
def test_convolution_names_the_argument(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(FovealError) as raised:
        call()
    assert said in str(raised.value)


def test_a_filter_of_zeros_is_a_mean() -> None:
    logits = torch.randn(1, 7, 7, 2, dtype=torch.float64)
    found = fv.system("slash_ark").op(logits, zeros(3, 3))
    torch.testing.assert_close(found[0, 3, 3], logits[0, 2:5, 2:5].mean((0, 1)))


EMPTY = "cosformer", "cottention", "nprf_rpe", "performer", "l2vit", "nala"


@pytest.mark.parametrize("name", EMPTY)
def test_empty_operands_give_an_empty_output(name: str) -> None:
    op = fv.system(name).op
    assert op(Q[:, :0], Q[:, :0], V[:, :0]).shape == (1, 0, 2, 3)
    assert op(Q[:0], Q[:0], V[:0]).shape == (0, 6, 2, 3)


@pytest.mark.parametrize(
    "kind",
    [
        layers.KimiDeltaAttention,
        layers.LightningAttention,
        layers.RATAttention,
        layers.CosFormerAttention,
        layers.LocalLinearAttention,
    ],
)
def test_layers_with_a_state_name_what_does_not_fit(kind: Callable[..., Any]) -> None:
    layer, x = kind(8, 2), torch.zeros(2, 5, 8)
    _, state = layer(x, return_state=True)
    for given, said in (
        ((x[0],), "x: got [5, 8]; [B, L, 8]"),
        ((x[..., :3],), "x: got [2, 5, 3]"),
        (([1.0],), "x: got a list"),
        ((x[:1], state), "state: got one of 2 sequences; the state of 1"),
    ):
        with pytest.raises(FovealError) as raised:
            layer(*given)
        assert said in str(raised.value)
    for cuts in ([0, 4], [0, 3, 2, 5], [1, 5]):
        with pytest.raises(fv.errors.PackingError, match="cu_seqlens"):
            layer(x[:1], cu_seqlens=torch.tensor(cuts, dtype=torch.int32))
