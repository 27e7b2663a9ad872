"""Other attention in a trained model: each layer learns its teacher's output, then the logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveal._arguments import finite, need_tensors
from foveal._errors import DtypeError, RefusedError, ShapeError, UnknownNameError
from foveal.hf.use import Layers, attention_layers, chosen_layers, need_model, undo

Progress = Callable[[str, float], None]


@dataclass
class Conversion:
    """What a conversion did: losses of the next token on held-out text, and the curves of training.

    teacher: the model as it was; untrained: new layers as they began; layers: after each has learned
    its teacher's output; logits: after learning the logits.  layer_curves: relative squared error by
    step, one list per layer; logit_curve: KL(teacher, student) by step.
    """

    kind: str
    numbers: tuple[int, ...]
    teacher: float
    untrained: float
    layers: float = float("nan")
    logits: float = float("nan")
    layer_curves: dict[int, list[float]] = field(default_factory=dict)
    logit_curve: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: steps per layer, steps on logits, rows per step, learning rates.

    Layers that start from the weights of the old ones learn at a tenth of `layer_rate`.
    """

    layer_steps: int = 200
    logit_steps: int = 50
    rows: int = 2
    layer_rate: float = 1e-3
    logit_rate: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("layer_steps", "logit_steps", "rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ShapeError(name, value, "an integer is needed")
        for name in ("layer_rate", "logit_rate"):
            if not finite(getattr(self, name)):
                raise ShapeError(name, getattr(self, name), "a number is needed")
        if min(self.layer_steps, self.logit_steps) < 0 or self.rows < 1:
            raise ShapeError(
                "schedule", self, "steps of at least 0 and rows of at least 1 are needed"
            )


def convert(
    model: Any,
    kind: str,
    *,
    data: Tensor,
    layers: Layers = "full",
    schedule: Schedule = Schedule(),
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Replaces attention layers of a causal model and teaches them, layer by layer, then as a whole.

    kind: "gated_swa" (a window with a gate, from the weights of the layer; window=256), "kda",
    "lightning", "mla" (latent_dim=...); `options` go to the layer.
    Shapes: data int64 [N, L], rows of tokens without padding, N >= 2; the last row is held out.
    First every new layer learns the output that the old one gives on what the old one reads; then all new
    layers together learn the logits of the model as it was.  Weights of the model itself stay as they are;
    `restore(model)` puts the old layers back.
    Limits: new layers read no padding; generation keeps their state in the cache of the call.
    Paper: Attention Editing (2604.05688), MiniCPM-SALA (2602.11761).
    """
    need_model(model)
    if not isinstance(kind, str) or kind not in _BUILDERS:
        raise UnknownNameError("kind", kind, tuple(_BUILDERS))
    need_tensors(data=data)
    if data.dtype not in (torch.int64, torch.int32):
        raise DtypeError("data", data.dtype, "token numbers, int64, are needed")
    if not isinstance(schedule, Schedule):
        raise DtypeError("schedule", type(schedule).__name__, "a foveal.hf.Schedule is needed")
    if data.dim() != 2 or len(data) < 2:
        raise ShapeError("data", list(data.shape), "[rows, tokens], at least 2 rows, is needed")
    if "_foveal_replaced" in model.__dict__:
        raise RefusedError(
            "convert", "the model has converted layers already; restore(model) first"
        )
    if not hasattr(model, "config") or not attention_layers(model):
        raise RefusedError("convert", f"{type(model).__name__} has no attention layers to replace")
    builder = _BUILDERS[kind]
    known = _option_names(kind)
    if unknown := sorted(set(options) - set(known)):
        raise UnknownNameError(f"option of {kind}", unknown[0], known)
    undo(model)
    tell = progress or (lambda text, share: None)
    held, rows = data[-1:], data[:-1]
    places = _places(model, chosen_layers(model, layers))
    teacher = _held_out(model, held)
    heard = _heard(model, [old for _, _, _, old in places], rows)
    students = {
        number: Converted(builder(old, model.config, **options), old.layer_idx)
        for number, _, _, old in places
    }
    _replace(model, places, students)
    done = Conversion(kind, tuple(students), teacher, _held_out(model, held))
    own = schedule
    if kind == "gated_swa":
        own = replace(schedule, layer_rate=schedule.layer_rate / 10)
    for index, (number, _, _, old) in enumerate(places):
        tell(f"layer {number}", 0.7 * index / len(places))
        student = students[number].to(device=held.device)
        done.layer_curves[number] = _learn_layer(student, *heard[old], own)
    done.layers = _held_out(model, held)
    done.logit_curve = _learn_logits(model, places, students, rows, schedule, tell)
    done.logits = _held_out(model, held)
    return done


def restore(model: Any) -> None:
    """Puts the layers back that `convert` replaced; nothing happens where there are none."""
    need_model(model)
    for parent, name, old in model.__dict__.pop("_foveal_replaced", ()):
        setattr(parent, name, old)
    hook = model.__dict__.pop("_foveal_padding_hook", None)
    if hook is not None:
        hook.remove()


class Converted(nn.Module):
    """A layer of this library where a model expects its own attention."""

    def __init__(self, layer: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.layer, self.layer_idx = layer, layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        cache = kwargs.get("past_key_values")
        if cache is None:
            return self.layer(hidden_states), None
        while len(cache.layers) <= self.layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
        entry = cache.layers[self.layer_idx]
        if not isinstance(entry, state_entry()):
            entry = cache.layers[self.layer_idx] = state_entry()()
        y, entry.state = self.layer(hidden_states, entry.state, return_state=True)
        entry.seen += hidden_states.shape[1]
        return y, None


@functools.cache
def state_entry() -> type[Any]:
    """The layer of a transformers cache that holds the state of a converted layer."""
    from transformers.cache_utils import CacheLayerMixin

    class StateEntry(CacheLayerMixin):  # type: ignore[no-untyped-call]
        """State in the place of keys and values."""

        is_sliding = False
        is_croppable = False

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.state: Any = None
            self.seen = 0

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.is_initialized = True

        def update(
            self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            raise RefusedError("convert", "a converted layer keeps a state, not keys and values")

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.seen + query_length, 0

        def get_seq_length(self) -> int:
            return self.seen

        def get_max_length(self) -> int:
            return -1

        def reset(self) -> None:
            self.state, self.seen = None, 0

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if self.state is not None:
                self.state = self.state.map(lambda x: x[beam_idx.to(x.device)])

    return StateEntry


def _places(model: Any, chosen: Sequence[Any]) -> list[tuple[int, Any, str, Any]]:
    """(number, parent, name in the parent, layer) of the layers to replace."""
    found = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if any(child is layer for layer in chosen):
                found.append((attention_layers(model).index(child), parent, name, child))
    return sorted(found, key=lambda place: place[0])


def _replace(model: Any, places: Sequence[Any], students: dict[int, Converted]) -> None:
    for number, parent, name, old in places:
        like = next(old.parameters())
        setattr(parent, name, students[number].to(like.device, like.dtype))
    model._foveal_replaced = [(parent, name, old) for _, parent, name, old in places]
    model._foveal_padding_hook = model.register_forward_pre_hook(_no_padding, with_kwargs=True)


def _no_padding(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all()):
        raise RefusedError(
            "convert", "converted layers read no padding; call with rows of one length"
        )


def _heard(model: Any, layers: Sequence[Any], rows: Tensor) -> dict[Any, tuple[Tensor, Tensor]]:
    """What every layer read and answered: [N, L, dim] each."""
    kept: dict[Any, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}

    def keep(layer: Any, args: Any, kwargs: Any, answer: Any) -> None:
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        kept[layer][0].append(x.detach())
        kept[layer][1].append(answer[0].detach())

    hooks = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            for row in rows:
                model(row[None], use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: (torch.cat(x), torch.cat(y)) for layer, (x, y) in kept.items()}


def _learn_layer(student: Converted, x: Tensor, y: Tensor, schedule: Schedule) -> list[float]:
    """Adam on |student(x) - y|^2 / |y|^2; the curve."""
    _fit_size(student, x[:1], y[:1])
    optimiser = torch.optim.Adam(student.parameters(), schedule.layer_rate)
    curve = []
    for step in range(schedule.layer_steps):
        _anneal(optimiser, schedule.layer_rate, step, schedule.layer_steps)
        chosen = (torch.arange(schedule.rows) + step * schedule.rows) % len(x)
        out = student(x[chosen])[0]
        loss = (out - y[chosen]).square().sum() / y[chosen].square().sum().clamp(min=1e-20)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        curve.append(float(loss.detach()))
    return curve


@torch.no_grad()
def _fit_size(student: Converted, x: Tensor, y: Tensor) -> None:
    """Outputs as large as the teacher's, where a fresh layer begins with larger ones."""
    out = student(x)[0]
    if float((out - y).norm()) > float(y.norm()):
        projection: Any = student.layer.out
        projection.weight.mul_(y.norm() / out.norm().clamp(min=1e-20))


def _learn_logits(
    model: Any,
    places: Sequence[Any],
    students: dict[int, Converted],
    rows: Tensor,
    schedule: Schedule,
    tell: Progress,
) -> list[float]:
    """Adam on KL(teacher, student) of the logits, over the new layers alone; the curve."""
    if not schedule.logit_steps:
        return []
    own = [p for student in students.values() for p in student.parameters()]
    optimiser = torch.optim.Adam(own, schedule.logit_rate)
    frozen = [p for p in model.parameters() if p.requires_grad and not any(p is o for o in own)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    curve = []
    try:
        for step in range(schedule.logit_steps):
            tell("logits", 0.7 + 0.3 * step / schedule.logit_steps)
            _anneal(optimiser, schedule.logit_rate, step, schedule.logit_steps)
            row = rows[step % len(rows)][None]
            theirs = _as_it_was(model, places, students, row).log_softmax(-1)
            ours = model(row, use_cache=False).logits.log_softmax(-1)
            loss = (theirs.exp() * (theirs - ours)).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimiser.step()
            curve.append(float(loss.detach()))
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return curve


@torch.no_grad()
def _as_it_was(
    model: Any, places: Sequence[Any], students: dict[int, Converted], row: Tensor
) -> Tensor:
    """Logits of the model with its old layers: those of all rows would take [N, L, vocabulary] numbers."""
    for _, parent, name, old in places:
        setattr(parent, name, old)
    try:
        logits: Tensor = model(row, use_cache=False).logits
    finally:
        for number, parent, name, _ in places:
            setattr(parent, name, students[number])
    return logits


def _anneal(optimiser: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """Full rate for the first half, then linearly to a tenth."""
    left = min(1.0, 2.0 * (steps - step) / steps)
    for group in optimiser.param_groups:
        group["lr"] = rate * max(left, 0.1)


@torch.no_grad()
def _held_out(model: Any, tokens: Tensor) -> float:
    """Mean loss of the next token in nat."""
    rows = model(tokens, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(rows, tokens[0, 1:]))


def _sizes(old: Any, config: Any) -> tuple[int, int, int, int]:
    """dim, heads, kv_heads, head_dim"""
    text = config.get_text_config()
    dim, heads = text.hidden_size, text.num_attention_heads
    return dim, heads, text.num_key_value_heads, old.q_proj.out_features // heads


def _gated_swa(old: Any, config: Any, *, window: int = 256) -> nn.Module:
    """The weights of the layer, its norms and its rotations, on a window."""
    from foveal.layers.gated_window import GatedWindowAttention

    dim, heads, kv_heads, head_dim = _sizes(old, config)
    layer = GatedWindowAttention(
        dim,
        heads,
        window=window,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary_base=_rotary_base(old, config),
        norm=hasattr(old, "q_norm"),
        scale=old.scaling,
    ).to(old.q_proj.weight)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            getattr(layer, name).weight.copy_(getattr(old, f"{name}_proj").weight)
        layer.out.weight.copy_(old.o_proj.weight)
        for name in ("q_norm", "k_norm"):
            norm = getattr(layer, name)
            if norm is not None:
                # Gemma keeps the factor less 1.
                shift = 1.0 if type(old.q_norm).__name__.startswith("Gemma") else 0.0
                norm.weight.copy_(getattr(old, name).weight + shift)
    return layer


def _rotary_base(old: Any, config: Any) -> float:
    rotation = config.get_text_config().rope_parameters
    kind = getattr(old, "layer_type", None)
    return float((rotation.get(kind, rotation))["rope_theta"])


def _kda(old: Any, config: Any, **options: Any) -> nn.Module:
    from foveal.layers import KimiDeltaAttention

    dim, heads, _, head_dim = _sizes(old, config)
    return KimiDeltaAttention(dim, heads, **{"head_dim": min(head_dim, 128)} | options)


def _lightning(old: Any, config: Any, **options: Any) -> nn.Module:
    from foveal.layers import LightningAttention

    dim, heads, _, _ = _sizes(old, config)
    return LightningAttention(dim, heads, **options)


def _mla(old: Any, config: Any, **options: Any) -> nn.Module:
    from foveal.layers import LatentAttention

    dim, heads, kv_heads, head_dim = _sizes(old, config)
    given = {"latent_dim": kv_heads * head_dim, "head_dim": head_dim} | options
    return LatentAttention(dim, heads, **given)


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "gated_swa": _gated_swa,
    "kda": _kda,
    "lightning": _lightning,
    "mla": _mla,
}


def _option_names(kind: str) -> tuple[str, ...]:
    """What a kind of layer can be told beside the sizes of the layer that was there."""
    from foveal.layers import KimiDeltaAttention, LatentAttention, LightningAttention

    layers = {"kda": KimiDeltaAttention, "lightning": LightningAttention, "mla": LatentAttention}
    parameters = inspect.signature(layers.get(kind, _gated_swa)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
