"""Bidirectional attention over frames: pooled blocks beside special tokens, and static modes per head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveal._attend import attend
from foveal._errors import OptionError, SelectionError
from foveal._judged import judged
from foveal._shares import share_of
from foveal.compose.merge import merge
from foveal.patterns import Blocks, BlockSelection, Neighborhood, Rows, Sliding
from foveal.selectors import Mass, Pooled, Tiling
from foveal.systems.base import Claim, Draw, Identity, System
from foveal.systems.sparse.shapes import qkv_shapes


@judged
def vggt_block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frame: int = 1024,
    special: int = 5,
    mass: float = 0.9,
    least: float = 0.0,
    q_block: int = 128,
    kv_block: int = 64,
) -> Tensor:
    """Attention over frames of `frame` tokens, of which the first `special` are dense both ways.

    Patches see all special tokens, and the blocks of patches that hold `mass` of the softmax of mean
    query times mean key, at least the share `least` of all blocks.
    Shapes: q [B, L, Hq, D], k [B, L, Hkv, D], v [B, L, Hkv, Dv]; frame divides L.
    """
    length = q.shape[1]
    if length % frame or not 0 <= special <= frame or k.shape[1] != length:
        raise SelectionError("frame", frame, f"a divisor of {length}, at least special, is needed")
    if not 0 <= least <= 1:
        raise OptionError("least", least, "a share from 0 to 1 is needed")
    place = torch.arange(length, device=q.device)
    first, rest = (place[(place % frame < special) == side] for side in (True, False))
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    parts, lses = [], []
    if special:
        o = o.index_copy(1, first, attend(q[:, first], k, v))
        far = attend(q[:, rest], k[:, first], v[:, first], return_lse=True)
        parts, lses = [far[0]], [far[1]]
    if len(rest):
        own_q, own_k, own_v = (x[:, rest] for x in (q, k, v))
        selection = _pooled_blocks(own_q, own_k, mass, least, q_block, kv_block)
        near = attend(own_q, own_k, own_v, Blocks(selection), return_lse=True)
        merged = merge([*parts, near[0]], [*lses, near[1]])[0]
        o = o.index_copy(1, rest, merged)
    return o


def _pooled_blocks(
    q: Tensor, k: Tensor, mass: float, least: float, q_block: int, kv_block: int
) -> BlockSelection:
    tiling = Tiling(q.shape[1], k.shape[1], q_block, kv_block, False)
    with torch.no_grad():
        scores = Pooled().scores(q, k, tiling)
        kept = Mass(mass).keep(scores, tiling)
        count = share_of(tiling.kv_blocks, least)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        kept = kept.scatter(-1, best, True)
        if mass == 1.0:
            kept = torch.ones_like(kept)
    return BlockSelection.from_block_mask(kept, q_block, kv_block)


def _whole(draw: Draw) -> Claim:
    frame = draw.integer(3, 6)
    return Claim(
        draw.qkv((3 * frame,), heads=4, kv_heads=2),
        lambda q, k, v: vggt_block_sparse(
            q, k, v, frame=frame, special=2, mass=1.0, q_block=4, kv_block=2
        ),
        attend,
    )


def _special_alone(draw: Draw) -> Claim:
    return Claim(
        draw.qkv((12,)),
        lambda q, k, v: vggt_block_sparse(q, k, v, frame=4, special=4),
        attend,
    )


VGGT_BLOCK_SPARSE = System(
    name="vggt_block_sparse",
    title="Faster VGGT with Block-Sparse Global Attention",
    year=2025,
    paper="RWTH Aachen; arXiv 2509.07120",
    kind="operator",
    family="sparse",
    summary="Global attention over frames: camera and register tokens dense both ways, patches to "
    "the blocks that hold most of the pooled softmax.",
    op=vggt_block_sparse,
    identities=(
        Identity("whole", "The whole mass is dense attention.", _whole),
        Identity("special_alone", "Frames of special tokens are dense attention.", _special_alone),
    ),
    operands=qkv_shapes,
    reference_shapes=(
        {
            "grid": (32768,), "heads": 16, "kv_heads": 16, "head_dim": 64,
            "options": {"frame": 1024},
        },
    ),
)  # fmt: skip


MODES = ("full", "diagonal", "multi_diagonal", "stripe", "skip")


@judged
def sparse_vdit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frame: int = 2048,
    modes: tuple[str, ...] = ("diagonal",),
    width: int = 64,
) -> Tensor:
    """Every head in a static mode, as a search found them; heads of one mode run together.

    full; diagonal: |i - j| <= width; multi_diagonal: the same inside every frame, at the same place;
    stripe: the first `width` tokens of every frame; skip: output 0.
    Shapes: q, k, v [B, L, H, D], frame divides L; modes per head, or one for all.
    """
    heads, length = q.shape[2], q.shape[1]
    modes = modes * heads if len(modes) == 1 else modes
    if len(modes) != heads or any(mode not in MODES for mode in modes):
        raise SelectionError("modes", modes, f"one of {', '.join(MODES)} for each of {heads} heads")
    if length % frame or k.shape[1:3] != q.shape[1:3]:
        raise SelectionError("frame", frame, f"a divisor of {length}, k and v like q, are needed")
    if set(modes) == {"skip"}:  # nobody sees a key: 0, gradient 0
        nothing = torch.zeros(length, dtype=torch.int64)
        return attend(q, k, v, Rows(nothing, nothing))
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    for mode in sorted(set(modes)):
        own = torch.tensor([h for h, each in enumerate(modes) if each == mode], device=q.device)
        if mode != "skip":
            part = _in_mode(mode, q[:, :, own], k[:, :, own], v[:, :, own], frame, width)
            o = o.index_copy(2, own, part)
    return o


def _in_mode(mode: str, q: Tensor, k: Tensor, v: Tensor, frame: int, width: int) -> Tensor:
    if mode == "full":
        return attend(q, k, v)
    if mode == "diagonal":
        return attend(q, k, v, Sliding(width, width))
    frames = q.shape[1] // frame
    if mode == "stripe":
        place = torch.arange(k.shape[1], device=k.device)
        place = place[place % frame < width]
        return attend(q, k[:, place], v[:, place])
    window = min(2 * width + 1, frame)
    if frame - 1 > width > (frame - 1) // 2:
        raise SelectionError("width", width, f"at most {(frame - 1) // 2}, or {frame - 1} and more")
    border: Literal["clip", "shift"] = "clip" if window == 2 * width + 1 else "shift"
    q, k, v = (x.unflatten(1, (frames, frame)) for x in (q, k, v))
    pattern = Neighborhood((frames, window), border=("shift", border))
    return attend(q, k, v, pattern).flatten(1, 2)


def search_modes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    frame: int,
    costs: dict[str, float],
    weight: float = 1.0,
    width: int = 64,
) -> tuple[str, ...]:
    """Per head, the mode with the least |o_mode - o_full|^2 + weight cost(mode), summed over the batch."""
    full = attend(q, k, v)
    losses = []
    for mode in costs:
        o = sparse_vdit(q, k, v, frame=frame, modes=(mode,), width=width)
        losses.append((o - full).square().sum((0, 1, 3)) + weight * costs[mode])
    return tuple(list(costs)[int(best)] for best in torch.stack(losses).argmin(0))


def _wide_band(draw: Draw) -> Claim:
    mode = ("diagonal", "multi_diagonal", "stripe")[draw.integer(0, 2)]
    return Claim(
        draw.qkv((12,)),
        lambda q, k, v: sparse_vdit(q, k, v, frame=4, modes=(mode,), width=12),
        attend,
    )


def _mixed(draw: Draw) -> Claim:
    def alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.stack(
            [attend(q, k, v, Sliding(2, 2))[:, :, 0], q[:, :, 1, :1] * 0 + v[:, :, 1] * 0], 2
        )

    return Claim(
        draw.qkv((12,)),
        lambda q, k, v: sparse_vdit(q, k, v, frame=4, modes=("diagonal", "skip"), width=2),
        alone,
    )


SPARSE_VDIT = System(
    name="sparse_vdit",
    title="Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion "
    "Transformers",
    year=2025,
    paper="Fudan, StepFun; arXiv 2506.03065",
    kind="operator",
    family="sparse",
    summary="Diagonal, repeated diagonal, stripe, full or nothing for each head, chosen offline by "
    "error and measured cost.",
    op=sparse_vdit,
    identities=(
        Identity("wide_band", "Bands and stripes as wide as the frame are dense.", _wide_band),
        Identity("mixed", "Heads run in modes of their own; skipped ones give 0.", _mixed),
    ),
    operands=qkv_shapes,
    reference_shapes=(
        {
            "grid": (32768,), "heads": 24, "kv_heads": 24, "head_dim": 128,
            "options": {"frame": 2048, "modes": ("diagonal",), "width": 1024},
        },
    ),
)  # fmt: skip
