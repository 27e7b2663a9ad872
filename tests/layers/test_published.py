"""Weights of published layouts: names, shapes, and the same results as the library that has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import foveal as fv
from foveal.layers import load_gated_delta_net, load_kimi_delta_attention, load_latent_attention

pytest.importorskip(
    "transformers", reason="the published layers come with transformers, extra test"
)


def drawn(module: nn.Module, source: torch.Generator) -> dict[str, Tensor]:
    """Random weights for every parameter of a module, which gets them too."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fresh = torch.randn(parameter.shape, generator=source) / parameter.shape[-1] ** 0.5
            parameter.copy_(fresh.abs() if "norm" in name else fresh)
    return dict(module.named_parameters())


def close(got: Tensor, expected: Tensor) -> None:
    """The published layers add 1e-6 under the root of the norms of q and k and sum in float32."""
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4)


def kimi(**changes: object) -> object:
    from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig

    sizes = {
        "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 10,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5, "num_hidden_layers": 4,
        "linear_head_dim": 8, "linear_num_heads": 3, "linear_conv_kernel_dim": 4,
    }  # fmt: skip
    return KimiLinearConfig(**sizes | changes, attn_implementation="eager")


def test_kimi_delta_attention(source: torch.Generator) -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    module = KimiLinearDeltaAttention(kimi(), 0)
    weights = drawn(module, source)
    x = torch.randn(2, 9, 24, generator=source)
    close(load_kimi_delta_attention(weights)(x), module(x))
    stored = {name.replace("forget_gate.", ""): w for name, w in weights.items()}
    whole = stored.pop("conv1d.weight")
    for name, part in zip("qkv", whole.chunk(3), strict=True):
        stored[f"{name}_conv1d.weight"] = part
    close(load_kimi_delta_attention(stored)(x), module(x))


def test_latent_attention(source: torch.Generator) -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention

    module = KimiLinearAttention(kimi(), 3)
    weights = drawn(module, source)
    x = torch.randn(2, 9, 24, generator=source)
    mask = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)[None, None]
    close(load_latent_attention(weights, 2)(x), module(x, mask)[0])


def test_gated_delta_net_of_qwen(source: torch.Generator) -> None:
    from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    config = Qwen3NextConfig(
        hidden_size=24, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=5,
        linear_value_head_dim=3, num_hidden_layers=4, linear_conv_kernel_dim=4,
    )  # fmt: skip
    module = Qwen3NextGatedDeltaNet(config, 0)
    weights = drawn(module, source)
    x = torch.randn(2, 9, 24, generator=source)
    close(load_gated_delta_net(weights, key_heads=2)(x), module(x))
    with pytest.raises(fv.errors.ShapeError, match="in_proj_qkvz"):
        load_gated_delta_net(weights, key_heads=4)
    with pytest.raises(fv.errors.OptionError, match="key_heads: got None"):
        load_gated_delta_net(weights)


def test_gated_delta_net_of_olmo(source: torch.Generator) -> None:
    from transformers.models.olmo_hybrid.configuration_olmo_hybrid import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = OlmoHybridConfig(
        hidden_size=24, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=5,
        linear_value_head_dim=6, num_hidden_layers=4, linear_allow_neg_eigval=True,
    )  # fmt: skip
    module = OlmoHybridGatedDeltaNet(config, 0)
    weights = drawn(module, source)
    x = torch.randn(2, 9, 24, generator=source)
    close(load_gated_delta_net(weights, largest_write=2.0)(x), module(x))


def test_weights_that_do_not_fit_are_named(source: torch.Generator) -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    weights = drawn(KimiLinearDeltaAttention(kimi(), 0), source)
    missing = {name: w for name, w in weights.items() if name != "b_proj.weight"}
    with pytest.raises(fv.errors.ShapeError, match=r"no b_proj.weight"):
        load_kimi_delta_attention(missing)
    with pytest.raises(fv.errors.ShapeError, match=r"extra\.weight"):
        load_kimi_delta_attention(weights | {"extra.weight": torch.zeros(2)})
    with pytest.raises(fv.errors.ShapeError, match=r"o_proj.weight \[2, 2\]"):
        load_kimi_delta_attention(weights | {"o_proj.weight": torch.zeros(2, 2)})


def joint() -> dict[str, Tensor]:
    """The shapes of Qwen3-Next: 4 key heads of 4 look as 2 of 8 do, and as 8 value heads of 2 would."""
    return {
        "in_proj_qkvz.weight": torch.zeros(2 * 4 * 4 + 2 * 8 * 4, 8),
        "in_proj_ba.weight": torch.zeros(2 * 8, 8), "conv1d.weight": torch.zeros(64, 1, 4),
        "norm.weight": torch.zeros(4), "out_proj.weight": torch.zeros(8, 32),
        "A_log": torch.zeros(8), "dt_bias": torch.zeros(8),
    }  # fmt: skip


def test_key_heads_that_no_shape_shows_are_asked_for() -> None:
    assert load_gated_delta_net(joint(), key_heads=4).heads == 4
    with pytest.raises(fv.errors.OptionError, match="key_heads: got None"):
        load_gated_delta_net(joint())


@pytest.mark.parametrize("name", list(joint()))
def test_joint_weights_that_do_not_fit_are_named(name: str) -> None:
    weights = joint()
    short = {own: tensor for own, tensor in weights.items() if own != name}
    for given in (short, weights | {name: torch.zeros(())}, weights | {name: torch.zeros(3, 3)}):
        with pytest.raises(fv.errors.ShapeError, match=r"^weights: "):
            load_gated_delta_net(given, key_heads=4)
    with pytest.raises(fv.errors.DtypeError, match=f"^{name}: got a list"):
        load_gated_delta_net(weights | {name: [0.0]}, key_heads=4)
    with pytest.raises(fv.errors.ShapeError, match="key_heads: got 0"):
        load_gated_delta_net(weights, key_heads=0)
