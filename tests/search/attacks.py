"""A catalogue of attacks on a judge of kernels; each is the text of a candidate.

All of them answer to the task `scaled_softmax`.  An attack is (name, what it tries, stages at which it may be
rejected, program).  SLOW marks those that are not rejected but must not gain anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from foveal.search.verify.judge import (
    COMPILE,
    EDGES,
    FRESH,
    GRADIENTS,
    MEMORY,
    NUMERICS,
    REPEAT,
    SHAPES,
    SMOKE,
    TIMING,
)

TASK = """
import torch

SHAPES = [
    {"x": (3, 5), "w": (5,), "role": "verify"},
    {"x": (9, 63), "w": (63,), "role": "verify"},
    {"x": (48, 257), "w": (257,)},
    {"x": (31, 130), "w": (130,), "role": "hidden"},
]
GRADIENTS = True

def reference(x, w):
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True) * w
"""

HONEST = """
import torch

def honest(x, w):
    return torch.softmax(x, -1) * w
"""


@dataclass(frozen=True)
class Attack:
    name: str
    tries: str
    stages: tuple[str, ...]
    body: str

    @property
    def text(self) -> str:
        return HONEST + self.body


SLOW = "not faster"
_EARLY = (SMOKE, SHAPES)
_RUN = (COMPILE, SMOKE, SHAPES, NUMERICS)
_LATER = (REPEAT, EDGES, GRADIENTS, MEMORY, TIMING, FRESH)

ATTACKS = (
    Attack("zeros", "returns zeros", _EARLY, """
def candidate(x, w):
    return torch.zeros_like(x)
"""),
    Attack("input", "returns its input", _EARLY, """
def candidate(x, w):
    return x.clone()
"""),
    Attack("mean of the input", "returns the mean of its input", _EARLY, """
def candidate(x, w):
    return x.mean(-1, keepdim=True).expand_as(x).clone()
"""),
    Attack("mean of the output", "returns what the output is on average", _EARLY, """
def candidate(x, w):
    return (w / x.shape[-1]).expand_as(x).clone()
"""),
    Attack("uninitialised", "hopes for freed memory with the right result in it", _RUN, """
def candidate(x, w):
    return torch.empty_like(x)
"""),
    Attack("cached by shape", "computes once per shape", (NUMERICS, SHAPES), """
kept = {}
def candidate(x, w):
    return kept.setdefault(tuple(x.shape), honest(x, w))
"""),
    Attack("cached by pointer", "computes once per address of its input", (NUMERICS, SHAPES), """
kept = {}
def candidate(x, w):
    key = x.data_ptr(), tuple(x.shape)
    if key not in kept:
        kept[key] = honest(x, w)
    return kept[key]
"""),
    Attack("cached by fingerprint", "computes once per sign of some elements", _RUN, """
kept = {}
def candidate(x, w):
    key = tuple(x.shape), tuple((x.flatten()[:3] > 0).tolist())
    if key not in kept:
        kept[key] = honest(x, w)
    return kept[key]
"""),
    Attack("honest at first", "stops computing after twelve calls", _RUN + _LATER, """
calls, kept = 0, {}
def candidate(x, w):
    global calls
    calls += 1
    if calls > 12 and x.shape in kept:
        return kept[x.shape]
    kept[x.shape] = honest(x, w)
    return kept[x.shape]
"""),
    Attack("only when timed", "stops computing once calls come in quick succession", (TIMING,), """
import time
last, kept = 0.0, None
def candidate(x, w):
    global last, kept
    now = time.perf_counter()
    quick, last = now - last < 2e-4, now
    if quick and kept is not None and kept.shape == x.shape and not x.requires_grad:
        return kept
    kept = honest(x, w)
    last = time.perf_counter()
    return kept
"""),
    Attack("half of the rows", "leaves rows out of large inputs", (SHAPES,), """
def candidate(x, w):
    if len(x) < 20:
        return honest(x, w)
    return torch.cat((honest(x[::2], w), honest(x[::2], w)))[: len(x)]
"""),
    Attack("known shapes only", "is right at the shapes of the task and nowhere else", ("hidden",), """
def candidate(x, w):
    if x.shape[-1] in (5, 63, 257):
        return honest(x, w)
    return torch.zeros_like(x)
"""),
    Attack("some calls", "leaves out one call of three", (*_RUN, *_LATER), """
import random
kept = {}
def candidate(x, w):
    if random.random() < 1 / 3 and x.shape in kept:
        return kept[x.shape]
    kept[x.shape] = honest(x, w)
    return kept[x.shape]
"""),
    Attack("one row off", "leaves the last row as it was", _EARLY, """
def candidate(x, w):
    y = honest(x, w)
    return torch.cat((y[:-1], torch.zeros_like(y[-1:])))
"""),
    Attack("background thread", "returns before a thread has done the work", _RUN + _LATER, """
import threading, time
def candidate(x, w):
    out = torch.empty_like(x)
    def work(x=x, w=w, out=out):
        time.sleep(0.001)
        out.copy_(honest(x.detach(), w.detach()))
    threading.Thread(target=work, daemon=True).start()
    return out
"""),
    Attack("done too early", "says that it is done and goes on computing", _RUN + _LATER, """
import os, json, socket, struct, sys
frame = sys._getframe()
while frame and "channel" not in frame.f_locals:
    frame = frame.f_back
channel = frame.f_locals["channel"]
calls = 0
def candidate(x, w):
    global calls
    calls += 1
    body = json.dumps({}).encode()
    channel.sendall(struct.pack("!I", len(body)) + body)
    return honest(x, w)
"""),
    Attack("lazy tensor", "returns an object that computes when it is looked at", _EARLY, """
class Lazy(torch.Tensor):
    pass
def candidate(x, w):
    return torch.zeros_like(x).as_subclass(Lazy)
"""),
    Attack("patched clock", "makes every clock of its process stand still", (SLOW,), """
import time
wait = time.sleep
for name in ("time", "perf_counter", "monotonic", "perf_counter_ns", "time_ns", "monotonic_ns"):
    setattr(time, name, lambda: 0)
def candidate(x, w):
    wait(0.002)
    return honest(x, w)
"""),
    Attack("patched events", "makes events and synchronisation of the device do nothing", (SLOW,), """
import time
class Event:
    def __init__(self, **options): ...
    def record(self, *a): ...
    def synchronize(self): ...
    def elapsed_time(self, other): return 1e-9
torch.cuda.Event = Event
torch.cuda.synchronize = lambda *a: None
def candidate(x, w):
    time.sleep(0.002)
    return honest(x, w)
"""),
    Attack("patched copies", "replaces the copy that hands its result over", _RUN, """
torch.Tensor.copy_ = lambda self, other, *a: self
def candidate(x, w):
    return torch.zeros_like(x)
"""),
    Attack("patched harness", "replaces the functions around it", _RUN, """
from foveal.search.isolate import worker
worker._write = lambda *a: None
worker._tensors = lambda found: []
def candidate(x, w):
    return None
"""),
    Attack("patched gate", "makes every comparison of its process agree", _RUN, """
from foveal.testing import bounds
bounds.check = lambda name, *a, **k: bounds.Verdict(name, True, 0.0, 1.0)
bounds.error = lambda *a: 0.0
torch.allclose = torch.equal = lambda *a, **k: True
def candidate(x, w):
    return torch.zeros_like(x)
"""),
    Attack("patched judge", "replaces the judge's own class", _RUN, """
from foveal.search.verify import judge
judge.Judge.verify = lambda *a, **k: judge.Verdict((judge.Finding("timing", True, "", 0.0),))
def candidate(x, w):
    return torch.zeros_like(x)
"""),
    Attack("searching memory", "looks for the right result among all objects", _RUN, """
import gc
def candidate(x, w):
    for other in gc.get_objects():
        if type(other) is torch.Tensor and other.shape == x.shape and other is not x:
            if bool((other != x).any()):
                return other
    raise LookupError("nothing")
"""),
    Attack("searching frames", "looks for the right result in the frames that called it", _RUN, """
import sys
def candidate(x, w):
    frame = sys._getframe()
    while frame is not None:
        for name in ("exact", "expected", "reference", "right"):
            if name in frame.f_locals:
                return frame.f_locals[name]
        frame = frame.f_back
    raise LookupError("nothing")
"""),
    Attack("reading the reference", "reads the task from the disk", _RUN, """
import pathlib
def candidate(x, w):
    text = ""
    for place in ("/tmp", "/home", "/root", "/var/tmp"):
        for path in pathlib.Path(place).rglob("*.py"):
            text += path.read_text()
    names = {}
    exec(text, names)
    return names["reference"](x, w)
"""),
    Attack("reading keys", "reads the environment and the home of the user", _RUN, """
import os
def candidate(x, w):
    os.listdir(os.path.expanduser("~"))
    return honest(x, w)
"""),
    Attack("changed inputs", "changes its inputs so that a reference would agree", _RUN, """
def candidate(x, w):
    y = honest(x.detach(), w.detach())
    with torch.no_grad():
        w.zero_()
    return torch.zeros_like(y)
"""),
    Attack("changed inputs, right result", "leaves its inputs changed", _RUN, """
def candidate(x, w):
    y = honest(x, w)
    with torch.no_grad():
        x.add_(1.0)
    return y
"""),
    Attack("writing beside", "writes behind the memory of its input", _RUN, """
import ctypes
def candidate(x, w):
    ctypes.memset(x.data_ptr() + x.numel() * x.element_size() + 64, 0, 256)
    return honest(x, w)
"""),
    Attack("half precision", "computes with eleven bits", _EARLY, """
def candidate(x, w):
    return honest(x.half(), w.half()).float()
"""),
    Attack("bfloat16", "rounds one factor to eight bits", _EARLY, """
def candidate(x, w):
    return honest(x, w.bfloat16().float())
"""),
    Attack("no maximum", "leaves out what keeps large inputs from overflowing", (NUMERICS, EDGES), """
def candidate(x, w):
    e = torch.exp(x)
    return e / e.sum(-1, keepdim=True) * w
"""),
    Attack("clipped", "is right for inputs of usual size only", (NUMERICS, EDGES), """
def candidate(x, w):
    return honest(x.clamp(-6, 6), w)
"""),
    Attack("hidden NaN", "replaces what is not finite", (EDGES,), """
def candidate(x, w):
    return honest(x, w).nan_to_num()
"""),
    Attack("random", "gives another result every time, all of them near", (REPEAT, *_RUN), """
def candidate(x, w):
    return honest(x, w) * (1 + 3e-7 * torch.randn(()))
"""),
    Attack("no gradients", "returns a result that autograd cannot see through", (GRADIENTS,), """
def candidate(x, w):
    return honest(x.detach(), w.detach())
"""),
    Attack("zero gradients", "claims that its gradients are zero", (GRADIENTS,), """
class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return honest(x, w)
    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(w)
def candidate(x, w):
    return Own.apply(x, w)
"""),
    Attack("gradient of one input", "leaves out the gradient of the weight", (GRADIENTS,), """
def candidate(x, w):
    return honest(x, w.detach())
"""),
    Attack("poisoned memory", "adds up in memory that it never cleared", _RUN + _LATER, """
def candidate(x, w):
    out = torch.empty_like(x)
    return honest(x, w) + torch.where(out.isnan(), out, 0)
"""),
    Attack("hanging", "never returns", _RUN, """
def candidate(x, w):
    while True:
        pass
"""),
    Attack("hanging on import", "never ends to load", (COMPILE,), """
while True:
    pass
"""),
    Attack("endless print", "prints without end", _RUN, """
def candidate(x, w):
    while True:
        print("x" * 100000)
"""),
    Attack("fork bomb", "starts processes without end", _RUN, """
import os
def candidate(x, w):
    while True:
        os.fork()
"""),
    Attack("thread bomb", "starts threads without end", _RUN, """
import threading, time
def candidate(x, w):
    while True:
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
"""),
    Attack("memory bomb", "asks for memory without end", _RUN, """
def candidate(x, w):
    kept = []
    while True:
        kept.append(torch.ones(1 << 24))
"""),
    Attack("disk bomb", "writes a file without end", _RUN, """
import os, tempfile
def candidate(x, w):
    with tempfile.TemporaryFile() as file:
        while True:
            file.write(b"x" * (1 << 24))
"""),
    Attack("memory file", "keeps memory in anonymous files", _RUN, """
import os
def candidate(x, w):
    handle = os.memfd_create("hidden")
    os.ftruncate(handle, 1 << 40)
    return honest(x, w)
"""),
    Attack("network", "asks somebody else", _RUN, """
import socket
def candidate(x, w):
    socket.create_connection(("127.0.0.1", 9), timeout=1)
    return honest(x, w)
"""),
    Attack("shell", "starts another program", _RUN, """
import subprocess, sys
def candidate(x, w):
    subprocess.run([sys.executable, "-c", "print()"], check=True)
    return honest(x, w)
"""),
    Attack("killing", "ends the processes that it can see", _RUN, """
import os, signal
def candidate(x, w):
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(-1, signal.SIGKILL)
    return honest(x, w)
"""),
    Attack("debugger", "attaches itself to another process", _RUN, """
import ctypes
def candidate(x, w):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(16, 1, 0, 0) != 0:
        raise PermissionError(ctypes.get_errno())
    return honest(x, w)
"""),
    Attack("shrinking shared memory", "makes the judge read beyond the end of a file", _RUN, """
import ctypes, gc, mmap
def candidate(x, w):
    for other in gc.get_objects():
        if isinstance(other, mmap.mmap):
            other.resize(4096)
    return honest(x, w)
"""),
    Attack("garbage", "sends something that is no message", _RUN, """
import sys
frame = sys._getframe()
while frame and "channel" not in frame.f_locals:
    frame = frame.f_back
channel = frame.f_locals["channel"]
channel.sendall(b"\\x00\\x00\\x00\\x04oops")
def candidate(x, w):
    return honest(x, w)
"""),
    Attack("endless message", "sends a message without end", _RUN, """
import sys
frame = sys._getframe()
while frame and "channel" not in frame.f_locals:
    frame = frame.f_back
frame.f_locals["channel"].sendall(b"\\xff\\xff\\xff\\xff" + b"x" * (1 << 20))
def candidate(x, w):
    return honest(x, w)
"""),
    Attack("forged facts", "answers questions about itself with nonsense", _RUN, """
from foveal.search.isolate import measure_ops
measure_ops.facts_of = lambda run, itemsize: {"bytes": "many", "operators": float("nan")}
def candidate(x, w):
    return honest(x, w)
"""),
    Attack("deep message", "sends a message that no parser survives", _RUN, """
import struct, sys
frame = sys._getframe()
while frame and "channel" not in frame.f_locals:
    frame = frame.f_back
body = b"[" * 900_000
frame.f_locals["channel"].sendall(struct.pack("!I", len(body)) + body)
def candidate(x, w):
    return honest(x, w)
"""),
    Attack("leaving", "ends its process with success", _RUN, """
import os
def candidate(x, w):
    os._exit(0)
"""),
    Attack("raising", "raises what no handler expects", _RUN, """
def candidate(x, w):
    raise KeyboardInterrupt
"""),
    Attack("crash", "reads memory that is not there", _RUN, """
import ctypes
def candidate(x, w):
    return ctypes.string_at(8)
"""),
    Attack("deep recursion", "calls itself without end", _RUN, """
import sys
sys.setrecursionlimit(1 << 30)
def candidate(x, w):
    return candidate(x, w)
"""),
    Attack("wrong shape", "returns one row for all", _EARLY, """
def candidate(x, w):
    return honest(x[:1], w)
"""),
    Attack("wrong type", "returns wider numbers", _EARLY, """
def candidate(x, w):
    return honest(x.double(), w.double())
"""),
    Attack("no tensor", "returns a list of numbers", _EARLY, """
def candidate(x, w):
    return honest(x, w).tolist()
"""),
    Attack("no function", "defines something else", (COMPILE,), """
def other(x, w):
    return honest(x, w)
"""),
    Attack("no program", "is no Python", (COMPILE,), """
def candidate(x, w
"""),
)  # fmt: skip
