"""What can be told of a system whose pairs depend on its input, before there is an input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from foveal.caches.policies import POLICIES

if TYPE_CHECKING:
    from foveal.probe.ceilings import Ceilings
    from foveal.systems import System

Options = Mapping[str, Any]
Count = Callable[[float, Options], float]

_BLOCKS = "lists of blocks (tile engine: hopper, triton, cpu)"
_TOKENS = "lists of keys per token (token kernels on a GPU)"
_COLUMNS = "blocks and single columns beside them (column kernel on a GPU)"


@dataclass(frozen=True)
class Found:
    """How a system finds its pairs: in words, then as counts on L tokens.

    keys: keys that a query reads at most, mean over the sequence; None where the data decides.
    products: scores of head_dim products per query head that the choice takes.
    """

    chooses: str
    attends: str
    products: Count
    keys: Count | None = None


def _causal(keys: float, length: float) -> float:
    """Mean over the queries of `keys`, or of all keys so far where they are fewer."""
    keys = min(keys, length)
    return keys - keys * (keys - 1) / (2 * length)


def _native_keys(L: float, o: Options) -> float:
    b = o["branches"]
    compressed: float = L / b.stride / 2
    return compressed + _causal(b.best * b.block, L) + _causal(b.window, L)


_NATIVE = Found(
    "a softmax over compressed keys, summed to blocks: one list per token and key head",
    _TOKENS,
    lambda L, o: L * L / o["branches"].stride / 2,
    _native_keys,
)

FOUND: dict[str, Found] = {
    "core_context": Found(
        "one core token per group of older ones, by the last query of the group",
        "core tokens and a window in one softmax",
        lambda L, o: L,
        lambda L, o: L / o["group"] / 2 + _causal(o["window"], L),
    ),
    "delta_token_attention": Found(
        "the pages that an earlier, full layer found heaviest",
        _BLOCKS,
        lambda L, o: 0,
        lambda L, o: _causal((o["pages"] + o["recent"] + o["sinks"]) * o["page"], L),
    ),
    "flash_sparse_attention": _NATIVE,
    "infllm_v2": Found(
        "means of windows of keys: blocks for every token and key head; dense below dense_length",
        _TOKENS,
        lambda L, o: L * L / o["stride"] / 2,
        lambda L, o: _causal(L if o["dense_length"] > L else o["blocks"] * o["block"], L),
    ),
    "lemo": Found(
        "the blocks of tokens that a small net scores highest",
        "attention among the tokens that are left",
        lambda L, o: 0,
        lambda L, o: o["keep"] ** 2 * L / 2,
    ),
    "loki": Found(
        "scores in a part of the principal directions of the keys",
        _TOKENS,
        lambda L, o: o["rank_share"] * L * L / 2,
        lambda L, o: o["share"] * L / 2,
    ),
    "louis_kv": Found(
        "pages by their mean keys, anew where the queries turn",
        "the chosen pages and a window (fv.compose.LouisCache fetches them from the host)",
        lambda L, o: L * L / o["page"] / 2,
        lambda L, o: _causal(o["pages"] * o["page"] + o["window"], L),
    ),
    "minference": Found(
        "columns and diagonals that are heavy in the attention of the last queries",
        _COLUMNS,
        lambda L, o: min(o["queries"], L) * L,
        lambda L, o: _causal(o["vertical"] + o["slash"], L),
    ),
    "nosa": Found(
        "blocks by means of windows of keys, the rest of the budget by learned weights alone",
        _BLOCKS,
        lambda L, o: L * L / o["stride"] / 2,
        lambda L, o: _causal(o["budget"] * o["block"], L),
    ),
    "nsa": _NATIVE,
    "pbs_attention": Found(
        "keys sorted inside segments by the last queries, then blocks that hold a share of the mass",
        _BLOCKS,
        lambda L, o: min(o["queries"], L) * L + (L / o["block"]) ** 2,
    ),
    "retrieval_attention": Found(
        "all products with the keys on the host, the largest of each query",
        "these, the first and a window (fv.compose.RetrievalCache fetches them from the host)",
        lambda L, o: L * L / 2,
        lambda L, o: _causal(o["keys"] + o["sinks"] + o["window"], L),
    ),
    "sale": Found(
        "an estimate of every score from whole numbers of few bits",
        _BLOCKS,
        lambda L, o: L * L / 2,
    ),
    "seer_attention_r": Found(
        "a learned gate of queries and pooled keys, by the budget or, where given, the threshold",
        _BLOCKS,
        lambda L, o: L * L / o["block"] / 2,
        lambda L, o: _causal(o["budget"] if o["threshold"] is None else L, L),
    ),
    "sla": Found(
        "pooled scores of blocks: critical ones exactly, marginal ones by linear attention",
        _BLOCKS,
        lambda L, o: (L / o["block"]) ** 2,
        lambda L, o: o["critical"] * L,
    ),
    "sparsek": Found(
        "a top-k over learned scores of keys, with a gradient",
        "the keys that are kept, and a window",
        lambda L, o: 0,
        lambda L, o: _causal(o["keys"] + o["window"], L),
    ),
    "spatten": Found(
        "the probabilities that every key received in the layers before",
        "the keys that are left, in plain operations",
        lambda L, o: 0,
        lambda L, o: o["keep"] * L / (2 if o["causal"] else 1),
    ),
    "squeezed_attention": Found(
        "clusters of the keys of a prefix, made before: those with a large share for each query",
        _TOKENS,
        lambda L, o: o["count"] * L,
    ),
    "vggt_block_sparse": Found(
        "pooled scores of blocks, those that hold a share of the mass; special tokens stay dense",
        _BLOCKS,
        lambda L, o: (L / o["q_block"]) * (L / o["kv_block"]),
    ),
    "xattention": Found(
        "sums along antidiagonals, one product on folded tokens, then the shortest list of a share",
        _BLOCKS,
        lambda L, o: L * L / o["stride"],
    ),
}
_RUNS = {
    "tile": "its choice, then attention by the tile engine",
    "state": "as a scan by the state engine (fv.explain_scan tells the plan of one)",
    "convolution": "as convolutions (fv.explain_convolve tells the plan of one)",
    "entmax": "by the entmax engine, which finds a threshold per row and skips tiles below it",
    "local_linear": "by the local linear engine, iterations over the keys until a line fits",
    "torch": "as plain operations of PyTorch",
}
_POLICY = (
    'as a policy of a cache: fv.hf.use(model, cache="{0}"); foveal eval {0} tells what it costs'
)
_TWO_WAYS = {"sla", "vggt_block_sparse"}


@dataclass(frozen=True)
class FoundExplanation:
    """What a system will do on a shape, as far as no input decides on it; flops are those of the forward.

    keys: the most that a query reads, mean over the sequence, None where only the input tells.
    """

    system: str
    summary: str
    runs: str
    chooses: str | None
    attends: str | None
    keys: float | None
    dense_keys: float
    choice_flops: float | None
    flops: float | None
    bytes: int
    bound_seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def lines(self) -> list[tuple[str, str]]:
        """Title and text of every line."""
        told = [("system", f"{self.system}: {self.summary}"), ("runs", self.runs)]
        if self.chooses is not None:
            told += [("chooses", self.chooses), ("attends", f"by {self.attends}")]
            told.append(("choice", f"{(self.choice_flops or 0) / 1e9:,.3f} GFLOP"))
            if self.keys is None:
                told.append(("keys", f"known when it runs, of {self.dense_keys:,.0f} per query"))
            else:
                share = self.keys / self.dense_keys
                told.append(
                    (
                        "keys",
                        f"at most {self.keys:,.0f} of {self.dense_keys:,.0f} per query ({share:.1%})",
                    )
                )
                dense = (self.flops or 0) / share
                bound = dense / max((self.flops or 0) + (self.choice_flops or 0), 1.0)
                told.append(
                    ("speed-up", f"about {bound:.2f}x over dense by products, choice included")
                )
        work = "" if self.flops is None else f"{self.flops / 1e9:,.3f} GFLOP of attention, "
        told.append(("work", f"{work}{self.bytes / 1e6:,.2f} MB moved at least"))
        if self.bound_seconds is not None:
            told.append(("bound", f"{self.bound_seconds * 1e3:,.3f} ms forward on this device"))
        return told


def explain_found(
    system: System, shape: Any, options: Options, ceilings: Ceilings | None, itemsize: int
) -> FoundExplanation:
    """Of a system without a pattern of its own; `shape` has batch, q_grid, heads, head_dim and others."""
    tokens = 1.0
    for side in shape.q_grid:
        tokens *= side
    chosen = {**system.defaults, **options}
    found = FOUND.get(system.name)
    causal = system.name not in _TWO_WAYS and bool(chosen.get("causal", True))
    dense = (tokens + 1) / 2 if causal else tokens
    heads = shape.batch * shape.heads
    keys = choice = flops = None
    if found is not None:
        keys = None if found.keys is None else min(found.keys(tokens, chosen), dense)
        choice = 2.0 * heads * shape.head_dim * found.products(tokens, chosen)
        if keys is not None:
            flops = 2.0 * heads * tokens * keys * (shape.head_dim + shape.value_dim)
    moved = shape.batch * itemsize * _elements(system, shape, int(tokens))
    bound = None
    if ceilings is not None:
        work = (flops or 0) + (choice or 0)
        bound = max(work / ceilings.flops_per_second, moved / ceilings.bytes_per_second)
    return FoundExplanation(
        system=system.name,
        summary=system.summary,
        runs=_POLICY.format(system.name) if system.name in POLICIES else _RUNS[system.engine],
        chooses=None if found is None else found.chooses,
        attends=None if found is None else found.attends,
        keys=keys,
        dense_keys=dense,
        choice_flops=choice,
        flops=flops,
        bytes=moved,
        bound_seconds=bound,
    )


def _elements(system: System, shape: Any, tokens: int) -> int:
    """Of one sample: what the operator is given, and a result like its first operand."""
    if system.operands is None:
        heads, dims = shape.heads + shape.kv_heads, shape.head_dim + shape.value_dim
        return tokens * int(heads * dims)
    sizes = {"grid": shape.q_grid, "heads": shape.heads, "kv_heads": shape.kv_heads}
    given = system.operands({**sizes, "head_dim": shape.head_dim})
    first, *others = (math.prod(operand) for operand in given)
    return 2 * first + sum(others)
