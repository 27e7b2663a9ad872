"""The tile engine as operators of PyTorch, for compilers, which look at a call instead of running it.

An operator takes tensors, numbers and text.  `_spell` takes a pattern and a score apart into these while
the compiler reads along, so that it knows on what they depend; `_built` puts them together again where
the operator runs, and the plan is made there, as for any other call.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from foveal._errors import PatternError
from foveal._host import on_host
from foveal._problem import describe
from foveal.patterns.base import Pattern
from foveal.patterns.blocks import Blocks, BlockSelection
from foveal.scores.base import Score

if TYPE_CHECKING:
    from foveal._plan import Prepared

_CALL = "Tensor? cu_seqlens, Tensor[] tensors, str text, SymInt[]? integers, float[]? floats"
_LIBRARY = torch.library.Library("foveal", "DEF")
_LIBRARY.define(
    f"attend(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attend_backward(Tensor do, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"bool[] needed, {_CALL}) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


class _Call(NamedTuple):
    """A call but for q, k and v, in the order in which the operators take it."""

    cu_seqlens: Tensor | None
    tensors: Sequence[Tensor]
    text: str
    integers: Sequence[int | torch.SymInt] | None
    floats: Sequence[float] | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    score: Score,
    cu_seqlens: Tensor | None,
    return_lse: bool,
    implementation: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fv.attend` as one operator in the graph."""
    call = _spelled((pattern, score, return_lse, implementation), cu_seqlens)
    o, lse = torch.ops.foveal.attend(q, k, v, *call)
    return (o, lse.transpose(1, 2).unflatten(1, q.shape[1:-2])) if return_lse else o


def _spelled(value: Any, cu_seqlens: Tensor | None) -> _Call:
    tensors: list[Tensor] = []
    integers: list[int | torch.SymInt] = []
    floats: list[float] = []
    text = _spell(value, tensors, integers, floats)
    # PyTorch takes an empty list for a list of tensors.
    return _Call(cu_seqlens, tensors, text, integers or None, floats or None)


def _spell(
    value: Any, tensors: list[Tensor], integers: list[int | torch.SymInt], floats: list[float]
) -> str:
    """The value as text in which `t`, `i` and `f` stand for the next tensor, integer and float."""
    if value is None or isinstance(value, (bool, str, torch.dtype)):
        return repr(value)
    if isinstance(value, (int, torch.SymInt)):
        integers.append(value)
        return "i"
    if isinstance(value, float):
        floats.append(value)
        return "f"
    if isinstance(value, Tensor):
        tensors.append(value)
        return "t"
    if isinstance(value, tuple):
        inside = ""
        for item in value:
            inside += _spell(item, tensors, integers, floats) + ","
        return "(" + inside + ")"
    if isinstance(value, list):
        inside = ""
        for item in value:
            inside += _spell(item, tensors, integers, floats) + ","
        return "[" + inside + "]"
    kind = type(value)
    fields = getattr(kind, "__match_args__", None)
    if fields is None:
        raise PatternError("argument", kind.__name__, "a dataclass is needed under torch.compile")
    inside = ""
    for name in fields:
        inside += _spell(getattr(value, name), tensors, integers, floats) + ","
    return kind.__name__ + "(" + inside + ")"


def _built(call: _Call) -> Any:
    """What `_spell` took apart."""
    supply = {"t": iter(call.tensors), "i": iter(call.integers or ()), "f": iter(call.floats or ())}
    return _build(_parsed(call.text), supply)


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _build(node: ast.expr, supply: dict[str, Iterator[Any]]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return next(supply[node.id])
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return getattr(torch, name)
        case ast.Tuple():
            return tuple(_build(item, supply) for item in node.elts)
        case ast.List():
            return [_build(item, supply) for item in node.elts]
        case ast.Call(func=ast.Name(id=name), args=items):
            return _value(name, tuple(_build(item, supply) for item in items))
    raise AssertionError(f"not written by _spell: {ast.dump(node)}")


def _value(name: str, arguments: tuple[Any, ...]) -> Any:
    kind = _kind(name)
    if kind is BlockSelection:
        return _selection(*arguments)
    if kind is Blocks:
        return _blocks(*arguments)
    return kind(*arguments)


@functools.lru_cache(maxsize=256)
def _kind(name: str) -> type:
    """The class of arguments of this name."""
    known = [BlockSelection, Pattern, Score]
    found = _dataclasses(name, known) or _dataclasses(name, _others())
    if len(found) != 1:
        raise PatternError(
            "argument",
            name,
            f"one class of this name is needed under torch.compile, not {len(found)}",
        )
    return found[0]


def _dataclasses(name: str, known: list[type]) -> list[type]:
    """Those of this name among known classes and all that are derived from them."""
    for kind in known:
        known.extend(kind.__subclasses__())
    named = [kind for kind in known if kind.__name__ == name and hasattr(kind, "__match_args__")]
    # A dataclass with slots is made twice; the second is the one in use.
    return list({(kind.__module__, kind.__qualname__): kind for kind in named}.values())


def _others() -> list[type]:
    """What verbs other than `attend` take."""
    from foveal.caches.codec import Codec
    from foveal.caches.view import Columns, View
    from foveal.engines.convolution.strips_problem import Strips
    from foveal.engines.decode.problem import DecodeProblem, Terms
    from foveal.rules.base import Rule

    return [Codec, Columns, View, DecodeProblem, Terms, Strips, Rule]


# The same object for the same tensor: plans are kept for it.
@functools.lru_cache(maxsize=8)
def _selection(indices: Tensor, q_block: int, kv_block: int) -> BlockSelection:
    """Checked when the caller made it, so not once more: that would wait for the device."""
    selection = object.__new__(BlockSelection)
    for name, value in (("indices", indices), ("q_block", q_block), ("kv_block", kv_block)):
        object.__setattr__(selection, name, value)
    return selection


@functools.lru_cache(maxsize=8)
def _blocks(selection: BlockSelection) -> Blocks:
    return Blocks(selection)


def _prepared(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Prepared, Score]:
    from foveal._plan import prepare

    pattern, score, return_lse, implementation = _built(call)
    return prepare(q, k, v, pattern, score, call.cu_seqlens, return_lse, implementation), score


@torch.library.impl(_LIBRARY, "attend", "CompositeExplicitAutograd")
@on_host
def _attend(q: Tensor, k: Tensor, v: Tensor, *spelled: Any) -> tuple[Tensor, Tensor]:
    prepared, score = _prepared(q, k, v, _Call(*spelled))
    form = prepared.form(score)
    run = prepared.run(form)
    o, statistic = run.forward((q, k, v, *form.parameters))
    o = o.unflatten(1, prepared.problem.extent.q_grid)
    return o.contiguous(), (statistic * run.lse_unit).contiguous()


@torch.library.impl(_LIBRARY, "attend_backward", "CompositeExplicitAutograd")
@on_host
def _attend_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    needed: Sequence[bool],
    *spelled: Any,
) -> list[Tensor]:
    """Gradients of q, k, v and of the call's tensors; an empty tensor where none is needed."""
    call = _Call(*spelled)
    prepared, score = _prepared(q, k, v, call)
    form = prepared.form(score)
    run = prepared.run(form)
    places = [3 + _place(call.tensors, parameter) for parameter in form.parameters]
    found = run.backward(
        (q, k, v, *form.parameters),
        (o.flatten(1, -3), lse / run.lse_unit),
        (do.flatten(1, -3), dlse * run.lse_unit),
        [*needed[:3], *(needed[place] for place in places)],
    )
    totals: list[Tensor | None] = [None] * len(needed)
    for place, gradient in zip((0, 1, 2, *places), found, strict=True):
        before = totals[place]
        totals[place] = gradient if before is None or gradient is None else before + gradient
    inputs = (q, k, v, *call.tensors)
    return [
        (torch.zeros_like(x) if total is None else total.contiguous()) if wanted else x.new_empty(0)
        for x, total, wanted in zip(inputs, totals, needed, strict=True)
    ]


def _place(tensors: Sequence[Tensor], parameter: Tensor) -> int:
    return next(place for place, x in enumerate(tensors) if x is parameter)


# The backward of a score's terms is found by PyTorch, also where the operator runs.
_LIBRARY.impl("attend_backward", torch.library.fallthrough_kernel, "Autograd")


def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, *spelled: Any) -> tuple[Tensor, Tensor]:
    problem = describe(q, k, v, return_lse=True)
    rows = (problem.batch, problem.q_heads, problem.extent.Lq)
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(rows, dtype=problem.lse_dtype)


def _gradient_shapes(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    needed: Sequence[bool],
    *spelled: Any,
) -> list[Tensor]:
    inputs = (q, k, v, *_Call(*spelled).tensors)
    return [x.new_empty(x.shape if wanted else 0) for x, wanted in zip(inputs, needed, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, tensors, *ctx.rest = inputs
    ctx.packed = cu_seqlens is not None
    ctx.save_for_backward(q, k, v, *output, *([cu_seqlens] if ctx.packed else []), *tensors)


def _backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Any, ...]:
    q, k, v, o, lse, *tensors = ctx.saved_tensors
    cu_seqlens = tensors.pop(0) if ctx.packed else None
    needed = [x.requires_grad for x in (q, k, v, *tensors)]
    call = _Call(cu_seqlens, tensors, *ctx.rest)
    found = torch.ops.foveal.attend_backward(do, dlse, q, k, v, o, lse, needed, *call)
    dq, dk, dv, *rest = (d if n else None for d, n in zip(found, needed, strict=True))
    return dq, dk, dv, None, rest, None, None, None


torch.library.register_fake("foveal::attend", _attend_shapes, lib=_LIBRARY)
torch.library.register_fake("foveal::attend_backward", _gradient_shapes, lib=_LIBRARY)
torch.library.register_autograd("foveal::attend", _backward, setup_context=_keep, lib=_LIBRARY)
