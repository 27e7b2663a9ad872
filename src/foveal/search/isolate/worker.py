"""What runs inside a confined process: loads a program, applies it to tensors in shared memory.

The judge believes nothing that this process says.  It looks at the bytes of the outputs and at its own
clock; whatever a program does to this module, it has to leave the right bytes there in time.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import mmap
import os
import socket
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveal.search.isolate import measure_ops
from foveal.search.isolate.channel import Message, dtype_name, dtype_of, receive, regions, send

SOURCE, MODEL, TEMPLATE = "source", "model", "template"
_LONGEST_REASON = 1500


class RefusedError(Exception):
    """What the program returned cannot be an output."""


def serve(channel: socket.socket, memory: mmap.mmap) -> None:
    """Answers the judge until it goes away."""
    bench = _Bench(memory)
    while True:
        request = receive(channel)
        try:
            answer = getattr(bench, "do_" + request.pop("do"))(**request)
        except BaseException as error:  # whatever a program raises is an answer
            text = f"{type(error).__name__}: {error}"
            answer = {"error": text[:_LONGEST_REASON]}
        send(channel, answer or {})


@dataclass
class _Set:
    """One set of tensors to compute with."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    cotangents: list[Tensor] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)


class _Bench:
    """A program, and the tensors it is applied to."""

    def __init__(self, memory: mmap.mmap) -> None:
        self.memory = memory
        self.program: _Program | None = None
        self.sets: list[_Set] = []
        self.device = torch.device("cpu")

    @property
    def loaded(self) -> _Program:
        if self.program is None:
            raise RefusedError("no program was loaded")
        return self.program

    def do_load(self, program: Message, threads: int = 1, device: str = "cpu") -> Message:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.program = load(program, self.device)
        return {"loaded": True}

    def do_compile(self, program: Message, inputs: Sequence[Message], target: str) -> Message:
        """Compiles the kernels of a template for a class of devices, and says what they are."""
        from foveal.search.compiling import compiled_facts

        shapes = [(tuple(each["shape"]), str(each["dtype"])) for each in inputs]
        return {"facts": compiled_facts(program, shapes, target)}

    def do_describe(self, seed: int = 0) -> Message:
        return self.loaded.describe(seed)

    def do_draw(self, seed: int, outputs: Sequence[Message], **case: Any) -> Message:
        """Writes the inputs that the program itself makes."""
        made = self.loaded.draw(seed, **case)
        for region, x in zip(regions(outputs), made, strict=True):
            region.view(self.memory).copy_(x)
        return {}

    def do_outline(self, inputs: Sequence[Message], **call: Any) -> Message:
        """Shapes and element types of what the program returns."""
        tensors = [region.view(self.memory).to(self.device) for region in regions(inputs)]
        found = self._outputs(tensors, call)
        return {"outputs": [{"shape": list(x.shape), "dtype": dtype_name(x.dtype)} for x in found]}

    def do_state(self, outputs: Sequence[Message] = ()) -> Message:
        """Names and sizes of the parameters of a model, or their values."""
        named = self.loaded.state()
        for region, x in zip(regions(outputs), named.values(), strict=False):
            region.view(self.memory).copy_(x.detach())
        return {
            "state": [
                {
                    "name": name,
                    "shape": list(x.shape),
                    "dtype": dtype_name(x.dtype),
                    "learned": isinstance(x, nn.Parameter) or "running_" in name,
                }
                for name, x in named.items()
            ]
        }

    def do_take_state(self, state: Sequence[Message], dtype: str | None = None) -> Message:
        """Copies the judge's parameters into a model."""
        found = {
            each.pop("name"): region.view(self.memory)
            for each, region in zip(state, regions(state), strict=True)
        }
        self.loaded.take_state(found, None if dtype is None else dtype_of(dtype))
        return {}

    def do_run(
        self,
        inputs: Sequence[Message],
        outputs: Sequence[Message],
        cotangents: Sequence[Message] = (),
        leaves: Sequence[int] = (),
        dtype: str | None = None,
        poison: bool = False,
        **call: Any,
    ) -> Message:
        """Computes once and writes the outputs, then the gradients of the leaves.

        With `poison` new memory is full of NaN: `torch.use_deterministic_algorithms` would do the same, after
        importing the compiler.
        """
        wide = None if dtype is None else dtype_of(dtype)
        tensors = [_as(region.view(self.memory), wide, self.device) for region in regions(inputs)]
        weights = [_as(each.view(self.memory), wide, self.device) for each in regions(cotangents)]
        torch._C._set_deterministic_algorithms(poison, warn_only=True)
        found = self._outputs(tensors, call, weights, leaves)
        _write(found, [region.view(self.memory) for region in regions(outputs)], self.device)
        return {}

    def do_arrange(self, sets: Sequence[Message]) -> Message:
        """Prepares the tensors of a timed run."""
        self.sets = [
            _Set(
                [region.view(self.memory) for region in regions(each["inputs"])],
                [region.view(self.memory) for region in regions(each["outputs"])],
                [region.view(self.memory) for region in regions(each.get("cotangents", ()))],
                list(each.get("leaves", ())),
            )
            for each in sets
        ]
        return {}

    def do_go(self, **call: Any) -> Message:
        """Computes all sets; the judge holds the clock."""
        for each in self.sets:
            tensors = [x.to(self.device) for x in each.inputs]
            weights = [x.to(self.device) for x in each.cotangents]
            found = self._outputs(tensors, call, weights, each.leaves)
            _write(found, each.outputs, self.device)
        return {}

    def do_profile(self, inputs: Sequence[Message], **call: Any) -> Message:
        """Operators, bytes and FLOPs of one call."""
        tensors = [region.view(self.memory).to(self.device) for region in regions(inputs)]
        itemsize = max((x.element_size() for x in tensors), default=4)
        return measure_ops.facts_of(lambda: self._outputs(tensors, call), itemsize)

    def _outputs(
        self,
        tensors: list[Tensor],
        call: Mapping[str, Any],
        weights: Sequence[Tensor] = (),
        leaves: Sequence[int] = (),
    ) -> list[Tensor]:
        if not leaves:
            with torch.no_grad():
                return _tensors(self.loaded.call(tensors, **call))
        tensors = [x.detach().requires_grad_() if i in leaves else x for i, x in enumerate(tensors)]
        with torch.enable_grad():
            found = _tensors(self.loaded.call(tensors, **call))
        pairs = [(o, w) for o, w in zip(found, weights, strict=True) if o.requires_grad]
        if not pairs:
            raise RefusedError("its output does not depend on its inputs as autograd sees it")
        # A weighted sum: weights given to autograd itself make it import a compiler first.
        loss = torch.stack([(o * w).sum().double() for o, w in pairs]).sum()
        wanted = [tensors[i] for i in leaves]
        found_or_none = torch.autograd.grad(loss, wanted, allow_unused=True)
        gradients = [
            torch.zeros_like(x) if g is None else g
            for x, g in zip(wanted, found_or_none, strict=True)
        ]
        return [*(o.detach() for o in found), *gradients]


def _as(x: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    x = x.to(device)
    return x.to(dtype) if dtype is not None and x.is_floating_point() else x


def _tensors(found: object) -> list[Tensor]:
    outputs: list[Tensor] = []
    for x in found if isinstance(found, (tuple, list)) else [found]:
        if type(x) is not Tensor:
            raise RefusedError(f"it returned a {type(x).__name__}; tensors are needed")
        outputs.append(x)
    return outputs


def _write(found: Sequence[Tensor], outputs: Sequence[Tensor], device: torch.device) -> None:
    if len(found) != len(outputs):
        raise RefusedError(f"it returned {len(found)} tensors; {len(outputs)} are needed")
    for x, out in zip(found, outputs, strict=True):
        if x.shape != out.shape or x.dtype != out.dtype:
            needed = f"{list(out.shape)} {dtype_name(out.dtype)}"
            raise RefusedError(
                f"it returned {list(x.shape)} {dtype_name(x.dtype)}; {needed} is needed"
            )
        out.copy_(x)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Program(ABC):
    """What a judge can ask of a program: `call`, and for the one of a task also what to call it with."""

    @abstractmethod
    def call(self, tensors: list[Tensor], **call: Any) -> object: ...

    def describe(self, seed: int) -> Message:
        raise RefusedError("it describes no task")

    def draw(self, seed: int, **case: Any) -> Sequence[Tensor]:
        raise RefusedError("it makes no inputs")

    def state(self) -> dict[str, Tensor]:
        return {}

    def take_state(self, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        return None


def load(program: Message, device: torch.device) -> _Program:
    """Runs the text of a program, or imports a template of the library."""
    if program["kind"] == TEMPLATE:
        os.environ.update(program.get("environment", {}))
        module = importlib.import_module(program["module"])
        body = {"text": program["text"]} if "text" in program else {}
        return _Function(module.build(**program["options"], **body), {})
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    tree = _with_settings(ast.parse(program["text"]), dict(program.get("settings", {})))
    exec(compile(tree, "<candidate>", "exec"), module.__dict__)
    found = getattr(module, program["entry"], None)
    if found is None:
        raise RefusedError(f"it does not define {program['entry']}")
    if program["kind"] == MODEL:
        return _Model(module, found, program, device)
    return _Function(found, module.__dict__, program.get("options", {}))


def _with_settings(tree: ast.Module, settings: dict[str, Any]) -> ast.Module:
    """The program with other values for those constants that it sets at its top level."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in settings:
                node.value = ast.copy_location(ast.Constant(settings[name]), node.value)
    return tree


class _Function(_Program):
    def __init__(
        self,
        function: Callable[..., object],
        names: Mapping[str, Any],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.names = names
        self.function = functools.partial(function, **options) if options else function

    def call(self, tensors: list[Tensor], **call: Any) -> object:
        return self.function(*tensors)

    def describe(self, seed: int) -> Message:
        wanted = inspect.signature(self.function).parameters
        shapes = self.names.get("SHAPES")
        if not isinstance(shapes, (list, tuple)) or not shapes:
            raise RefusedError("a list SHAPES of {input name: shape} is needed")
        cases = []
        for entry in shapes:
            if set(entry) - {"role"} != set(wanted):
                raise RefusedError(
                    f"SHAPES must name the inputs {', '.join(wanted)}; got {list(entry)}"
                )
            cases.append(
                {
                    "role": entry.get("role", ""),
                    "inputs": [{"name": name, **_spec(entry[name])} for name in wanted],
                }
            )
        options = ("DTYPE", "TOLERANCE", "GRADIENTS", "DETERMINISTIC", "SPACE")
        facts = {name.lower(): self.names[name] for name in options if name in self.names}
        return {"cases": cases, **facts}

    def draw(self, seed: int, **case: Any) -> Sequence[Tensor]:
        maker = self.names.get("make_inputs")
        if maker is None:
            raise RefusedError("integer inputs need a function make_inputs(shapes, source)")
        source = torch.Generator().manual_seed(seed)
        made = maker({name: tuple(shape) for name, shape in case["shapes"].items()}, source)
        return [made[name] for name in case["shapes"]]


def _spec(entry: Any) -> Message:
    """A shape, or (shape, dtype name)."""
    if entry and isinstance(entry[-1], str):
        return {"shape": list(entry[0]), "dtype": entry[-1]}
    return {"shape": list(entry)}


class _Model(_Program):
    """A class of a problem file with `get_inputs` and `get_init_inputs`."""

    def __init__(
        self, module: types.ModuleType, kind: type, program: Message, device: torch.device
    ) -> None:
        self.module = module
        self.device = device
        torch.manual_seed(0)
        initial = program.get("initial")
        if initial is None:
            initial = list(getattr(module, "get_init_inputs", list)())
        self.initial = initial
        self.model: nn.Module = _constructed(kind, initial).to(device)

    def call(self, tensors: list[Tensor], arguments: Sequence[Message] = (), **call: Any) -> object:
        given = [tensors[a["tensor"]] if "tensor" in a else a["value"] for a in arguments]
        return self.model(*given)

    def describe(self, seed: int) -> Message:
        torch.manual_seed(seed)
        try:
            with torch.device("meta"):  # sizes alone: problems of many gigabytes can be read too
                made = self.module.get_inputs()
        except (RuntimeError, NotImplementedError):
            made = self.module.get_inputs()
        arguments: list[Message] = []
        inputs: list[Message] = []
        for each in made:
            if isinstance(each, Tensor):
                arguments.append({"tensor": len(inputs)})
                spec = {"shape": list(each.shape), "dtype": dtype_name(each.dtype)}
                inputs.append({"name": f"input {len(inputs)}", **spec})
            else:
                arguments.append({"value": each})
        case = {"role": "", "inputs": inputs, "arguments": arguments}
        return {"cases": [case], "initial": self.initial}

    def draw(self, seed: int, **case: Any) -> Sequence[Tensor]:
        torch.manual_seed(seed)
        return [x for x in self.module.get_inputs() if isinstance(x, Tensor)]

    def state(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict(keep_vars=True))

    def take_state(self, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
        if dtype is not None:
            self.model.to(dtype)
        own = self.model.state_dict()
        if set(own) != set(state):
            raise RefusedError(
                f"its parameters are {', '.join(own) or 'none'}; {', '.join(state)} are needed"
            )
        with torch.no_grad():
            for name, x in state.items():
                own[name].copy_(x)


def _constructed(kind: type, initial: Any) -> nn.Module:
    built = kind(**initial) if isinstance(initial, dict) else kind(*initial)
    if not isinstance(built, nn.Module):
        raise RefusedError(f"{kind.__name__} is no torch.nn.Module")
    return built
