"""Edits of a program's syntax tree that keep what it computes, and say how exactly.

BITWISE edits give the same bits, REASSOCIATED ones sum in another order, SAME_MATH ones round elsewhere.
What an edit presumes and cannot see in the text (ranks, independence of rows) the judge decides.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from foveal.search.archive import Entry
from foveal.search.candidate import Candidate, Proposal
from foveal.search.operators.base import View

BITWISE, REASSOCIATED, SAME_MATH = "bitwise", "reassociated", "same math"
_LOG2_E = 1.4426950408889634
_ROWS = (8, 32, 128, 512)
_TRIES = 12
_MOST_TEXT = 60_000

Replace = Callable[[ast.AST], ast.AST | None]
"""Another node for a node, None where the edit does not apply."""


@dataclass(frozen=True)
class Rewrite:
    """An edit by name; `replace` is tried on every node, and one place that it fits is changed."""

    name: str
    exactness: str
    replace: Replace

    def places(self, tree: ast.AST) -> int:
        """Where it applies."""
        return sum(self.replace(node) is not None for node in ast.walk(tree))

    def apply(self, tree: ast.Module, place: int) -> ast.Module:
        """A tree with the edit made at one place."""
        editor = _Editor(self.replace, place)
        found = editor.visit(copy.deepcopy(tree))
        assert isinstance(found, ast.Module)
        return ast.fix_missing_locations(found)


class _Editor(ast.NodeTransformer):
    def __init__(self, replace: Replace, place: int) -> None:
        self.replace = replace
        self.left = place
        self.order: list[int] = []

    def visit(self, node: ast.AST) -> ast.AST:
        found = self.replace(node)
        if found is not None:
            if self.left == 0:
                self.left = -1
                return ast.copy_location(found, node)
            self.left -= 1
        return self.generic_visit(node)


def _call(node: ast.AST, name: str) -> list[ast.expr] | None:
    """Arguments of a call of torch.NAME, F.NAME or .NAME(...), the object first."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    if node.func.attr != name:
        return None
    owner = node.func.value
    if isinstance(owner, ast.Name) and owner.id in ("torch", "F"):
        return list(node.args)
    return [owner, *node.args]


def _torch(name: str, *arguments: ast.expr, **named: ast.expr) -> ast.Call:
    function = ast.Attribute(ast.Name("torch", ast.Load()), name, ast.Load())
    return ast.Call(
        function, list(arguments), [ast.keyword(key, value) for key, value in named.items()]
    )


def _number(node: ast.AST, value: float) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


def _exp2(node: ast.AST) -> ast.AST | None:
    arguments = _call(node, "exp")
    if arguments is None or len(arguments) != 1:
        return None
    return _torch("exp2", ast.BinOp(arguments[0], ast.Mult(), ast.Constant(_LOG2_E)))


def _square(node: ast.AST) -> ast.AST | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and _number(node.right, 2):
        return _torch("square", node.left)
    arguments = _call(node, "pow")
    if arguments is not None and len(arguments) == 2 and _number(arguments[1], 2):
        return _torch("square", arguments[0])
    return None


def _reciprocal(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
        return None
    if isinstance(node.right, ast.Constant) or isinstance(node.left, ast.Constant):
        return None
    return ast.BinOp(node.left, ast.Mult(), _torch("reciprocal", node.right))


def _root(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
        return None
    inner = _call(node.right, "sqrt")
    if inner is None or len(inner) != 1:
        return None
    return ast.BinOp(node.left, ast.Mult(), _torch("rsqrt", inner[0]))


def _add_product(node: ast.AST) -> ast.AST | None:
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Add):
        return None
    for product, other in ((node.left, node.right), (node.right, node.left)):
        if isinstance(product, ast.BinOp) and isinstance(product.op, ast.MatMult):
            return _torch("addmm", other, product.left, product.right)
    return None


def _drop_copy(node: ast.AST) -> ast.AST | None:
    for name in ("contiguous", "clone"):
        arguments = _call(node, name)
        if arguments is not None and len(arguments) == 1:
            return arguments[0]
    return None


def _one_softmax(node: ast.AST) -> ast.AST | None:
    """E / E.sum(d, keepdim=True), E = exp(X - X.amax(d, keepdim=True)) written out, as one softmax."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Div):
        return None
    total = _call(node.right, "sum")
    if not total or len(total) < 2 or ast.dump(total[0]) != ast.dump(node.left):
        return None
    inner = _call(node.left, "exp")
    if inner is None or not isinstance(inner[0], ast.BinOp) or not isinstance(inner[0].op, ast.Sub):
        return None
    return _torch("softmax", inner[0].left, total[1])


def _fused_attention(node: ast.AST) -> ast.AST | None:
    """softmax(Q @ K.transpose(-2, -1) * scale, -1) @ V as one operator."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.MatMult):
        return None
    weights = _call(node.left, "softmax")
    if not weights or not isinstance(weights[0], ast.BinOp):
        return None
    scores, scale = weights[0], None
    if isinstance(scores.op, (ast.Mult, ast.Div)):
        scale = (
            scores.right
            if isinstance(scores.op, ast.Mult)
            else ast.BinOp(ast.Constant(1.0), ast.Div(), scores.right)
        )
        if not isinstance(scores.left, ast.BinOp):
            return None
        scores = scores.left
    if not isinstance(scores.op, ast.MatMult):
        return None
    keys = _call(scores.right, "transpose")
    if keys is None:
        return None
    function = ast.parse("torch.nn.functional.scaled_dot_product_attention", mode="eval").body
    named = [ast.keyword("scale", scale or ast.Constant(1.0))]
    return ast.Call(function, [scores.left, keys[0], node.right], named)


_IN_PLACE = {ast.Add: "add_", ast.Sub: "sub_", ast.Mult: "mul_", ast.Div: "div_"}
_FRESH = (ast.BinOp,)


def _in_place(node: ast.AST) -> ast.AST | None:
    """(A op B) op C with a fresh left side writes over it."""
    if not isinstance(node, ast.BinOp) or type(node.op) not in _IN_PLACE:
        return None
    fresh = isinstance(node.left, ast.BinOp) or (
        isinstance(node.left, ast.Call)
        and isinstance(node.left.func, ast.Attribute)
        and node.left.func.attr in ("exp", "exp2", "matmul", "relu", "sigmoid", "tanh", "square")
    )
    if not fresh or isinstance(node.left, ast.Constant):
        return None
    method = ast.Attribute(node.left, _IN_PLACE[type(node.op)], ast.Load())
    return ast.Call(method, [node.right], [])


def _swap_loops(node: ast.AST) -> ast.AST | None:
    """for i: for j: body, where the inner range does not name i, with the loops exchanged."""
    if not isinstance(node, ast.For) or len(node.body) != 1 or node.orelse:
        return None
    inner = node.body[0]
    if not isinstance(inner, ast.For) or inner.orelse or not isinstance(node.target, ast.Name):
        return None
    used = {n.id for n in ast.walk(inner.iter) if isinstance(n, ast.Name)}
    if node.target.id in used:
        return None
    swapped = ast.For(node.target, node.iter, inner.body, [])
    return ast.For(inner.target, inner.iter, [swapped], [])


REWRITES = (
    Rewrite("one softmax", SAME_MATH, _one_softmax),
    Rewrite("fused attention", SAME_MATH, _fused_attention),
    Rewrite("base-2 exponential", SAME_MATH, _exp2),
    Rewrite("square", BITWISE, _square),
    Rewrite("reciprocal once per row", SAME_MATH, _reciprocal),
    Rewrite("reciprocal root", SAME_MATH, _root),
    Rewrite("product and sum in one", REASSOCIATED, _add_product),
    Rewrite("no copy", BITWISE, _drop_copy),
    Rewrite("in place", BITWISE, _in_place),
    Rewrite("loops exchanged", REASSOCIATED, _swap_loops),
)


def stored(function: ast.FunctionDef) -> ast.FunctionDef | None:
    """A function whose first call that stands in it twice, with the same arguments, is made once.

    None where there is no such call, or a name in it is assigned more than once.
    """
    assigned: dict[str, int] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            assigned[node.id] = assigned.get(node.id, 0) + 1
    calls: dict[str, list[ast.Call]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            calls.setdefault(ast.dump(node), []).append(node)
    for key, found in calls.items():
        names = {n.id for n in ast.walk(found[0]) if isinstance(n, ast.Name)}
        if len(found) < 2 or any(assigned.get(name, 0) > 1 for name in names):
            continue
        changed = copy.deepcopy(function)
        for place, statement in enumerate(changed.body):
            if any(ast.dump(n) == key for n in ast.walk(statement) if isinstance(n, ast.Call)):
                editor = _Stored(key)
                changed.body = [editor.visit(s) for s in changed.body]
                keep = ast.Assign([ast.Name("kept", ast.Store())], copy.deepcopy(found[0]))
                changed.body.insert(place, keep)
                return ast.fix_missing_locations(changed) if "kept" not in assigned else None
    return None


class _Stored(ast.NodeTransformer):
    def __init__(self, key: str) -> None:
        self.key = key

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if ast.dump(node) == self.key:
            return ast.Name("kept", ast.Load())
        return self.generic_visit(node)


def in_rows(tree: ast.Module, entry: str, rows: int) -> ast.Module | None:
    """The program applied to `rows` rows of its first input at a time, so that what it makes stays in caches.

    None where the entry is no function with parameters, or is split already.
    """
    function = next(
        (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry), None
    )
    if function is None or not function.args.args:
        return None
    whole = f"{entry}_of_rows"
    if any(isinstance(n, ast.FunctionDef) and n.name == whole for n in tree.body):
        return None
    found = copy.deepcopy(tree)
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == entry:
            node.name = whole
    first, *others = [a.arg for a in function.args.args]
    passed = ", ".join(["rows", *others])
    text = (
        f"def {entry}({ast.unparse(function.args)}):\n"
        f"    return torch.cat([{whole}({passed}) for rows in {first}.split({rows})])\n"
    )
    found.body += ast.parse(text).body
    return ast.fix_missing_locations(found)


class Rewrites:
    """One edit of a parent's program."""

    name = "rewrite"

    def propose(self, view: View, source: random.Random) -> Proposal | None:
        begun = view.task.beginning
        if begun["kind"] == "template":
            return None
        for _ in range(_TRIES):
            parent = view.parent(source)
            if parent is None:
                return None
            made = list(_edits(parent, begun))
            source.shuffle(made)
            for name, text in made:
                candidate = Candidate(parent.candidate.params, text)
                if len(text) < _MOST_TEXT and view.new(candidate):
                    return Proposal(candidate, self.name, (parent.id,), name)
        return None


def _edits(parent: Entry, begun: dict[str, object]) -> Iterator[tuple[str, str]]:
    text = parent.candidate.text or str(begun["text"])
    tree = ast.parse(text)
    for rewrite in REWRITES:
        for place in range(rewrite.places(tree)):
            yield rewrite.name, ast.unparse(rewrite.apply(tree, place))
    for number, node in enumerate(tree.body):
        if isinstance(node, ast.FunctionDef):
            kept = stored(node)
            if kept is not None:
                changed = copy.copy(tree)
                changed.body = [*tree.body[:number], kept, *tree.body[number + 1 :]]
                yield "kept in place of computed twice", ast.unparse(changed)
    for rows in _ROWS:
        split = in_rows(tree, str(begun["entry"]), rows)
        if split is not None:
            yield f"{rows} rows at a time", ast.unparse(split)
