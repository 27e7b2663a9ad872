"""Tiny models of random weights, built from their configurations."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="fv.hf needs transformers, extra hf")

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tokens(rows: int = 2, length: int = 60, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def gemma(kv_heads: int = 1, window: int = 24) -> Any:
    config = transformers.Gemma3TextConfig(
        **_SIZES
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": kv_heads,
            "head_dim": 16,
            "sliding_window": window,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "query_pre_attn_scalar": 16,
        }
    )
    return _built(transformers.Gemma3ForCausalLM, config)


def llama(**sizes: Any) -> Any:
    return _built(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_SIZES | sizes))


def qwen3() -> Any:
    config = transformers.Qwen3Config(**_SIZES, head_dim=16)
    return _built(transformers.Qwen3ForCausalLM, config)


def mistral() -> Any:
    config = transformers.MistralConfig(**_SIZES, sliding_window=16)
    return _built(transformers.MistralForCausalLM, config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(**_SIZES, num_local_experts=4, sliding_window=None)
    return _built(transformers.MixtralForCausalLM, config)


def phi() -> Any:
    config = transformers.PhiConfig(**_SIZES)
    return _built(transformers.PhiForCausalLM, config)


def jamba() -> Any:
    """A layer of states and one of attention."""
    config = transformers.JambaConfig(
        **_SIZES,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
    )
    return _built(transformers.JambaForCausalLM, config)


def bart() -> Any:
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        forced_eos_token_id=None,
    )
    return _built(transformers.BartForConditionalGeneration, config)


def modern_bert() -> Any:
    """Looks both ways, in windows of 8 tokens on each side and everywhere."""
    config = transformers.ModernBertConfig(
        **_SIZES | {"num_hidden_layers": 4, "num_key_value_heads": 4}, local_attention=16
    )
    return _built(transformers.ModernBertModel, config)


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    return _built(transformers.ViTModel, config)


def _built(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():  # sharper than the usual start: tokens that differ
        if parameter.dim() == 2:
            parameter.data.mul_(3.0)
    return model


TEXT_MODELS = {
    "gemma": gemma,
    "llama": llama,
    "qwen3": qwen3,
    "mistral": mistral,
    "mixtral": mixtral,
    "phi": phi,
}
