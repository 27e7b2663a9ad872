"""What can be said about a program without running it: its size, whether it parses, what a body names."""

from __future__ import annotations

import ast

from foveal.search.isolate.channel import Message

LONGEST = 64 << 10
"""Bytes of the longest program that is looked at."""

_NODES = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Expr, ast.Assign, ast.AugAssign,
    ast.AnnAssign, ast.Name, ast.Load, ast.Store, ast.Constant, ast.Attribute, ast.Call, ast.keyword,
    ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.If, ast.For, ast.While, ast.Tuple,
    ast.Subscript, ast.Slice, ast.Return, ast.Pass, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip
_NAMESPACES = ("tl", "gl")
_BUILT_IN = ("range", "min", "max", "float", "int")
_FORBIDDEN = (
    "inline_asm_elementwise", "static_print", "device_print", "device_assert", "static_assert",
    "extra", "core", "math", "language", "call_extern", "constexpr_function",
)  # fmt: skip


class StaticError(Exception):
    """A program that is not even started: the sentence."""


def check(program: Message) -> None:
    """Raises StaticError for a program that cannot be one, or a kernel body that names what it must not."""
    text = program.get("text")
    if text is None:
        return
    if len(text.encode()) > LONGEST:
        raise StaticError(
            f"its text has {len(text.encode())} bytes; at most {LONGEST} are looked at"
        )
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise StaticError(f"it does not parse: {error}") from None
    if program["kind"] == "template":
        check_body(tree, tuple(program["signature"]))


def check_body(tree: ast.Module, signature: tuple[str, ...]) -> None:
    """Whether a kernel body keeps to the language: functions of names, products, sums, loads and loops.

    One function must be `kernel` with exactly the parameters of `signature`.  Only names from `tl` and `gl`,
    parameters and own variables; no import, decorator, default value, global, class, text formatting,
    comprehension, or attribute that starts with an underscore.
    """
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if len(functions) != len(tree.body):
        raise StaticError("a body consists of functions only")
    own = {function.name for function in functions}
    if "kernel" not in own:
        raise StaticError("a body defines a function kernel")
    for function in functions:
        _function(function, own, signature if function.name == "kernel" else None)


def _function(function: ast.FunctionDef, own: set[str], signature: tuple[str, ...] | None) -> None:
    arguments = function.args
    names = [each.arg for each in arguments.args]
    extra = arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg
    if function.decorator_list or arguments.defaults or extra:
        raise StaticError(
            f"{function.name} has a decorator, a default or a parameter that is not plain"
        )
    if signature is not None and tuple(names) != tuple(signature):
        raise StaticError(f"kernel takes {', '.join(names)}; {', '.join(signature)} are needed")
    known = {*names, *_NAMESPACES, *_BUILT_IN, *own}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            if node.id in (*_NAMESPACES, *own) or node.id.startswith("_"):
                raise StaticError(f"line {node.lineno}: {node.id} must not be assigned")
            known.add(node.id)
    for node in ast.walk(function):
        if not isinstance(node, _NODES):
            line = getattr(node, "lineno", function.lineno)
            raise StaticError(f"line {line}: {type(node).__name__} is not part of the language")
        if isinstance(node, ast.Name) and node.id not in known:
            raise StaticError(f"line {node.lineno}: {node.id} is no parameter and no own variable")
        if isinstance(node, ast.Attribute) and (
            node.attr.startswith("_") or node.attr in _FORBIDDEN
        ):
            raise StaticError(f"line {node.lineno}: .{node.attr} must not be used")
