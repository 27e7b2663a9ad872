"""What the heads of the language model look at: how much of their softmax cheaper patterns keep."""

from __future__ import annotations

import math

import foveal as fv
from examples.first_hour.folder import Result
from examples.first_hour.language_model import Layer
from foveal.probe.mass import block_mass, heaviest_blocks, kept_mass, keys_per_row, whole

BUDGETS = (32, 64, 128, 256)
SINK_TOKENS = 4
BLOCK = 16

WINDOW, SINKS, STRIDED, TOP_BLOCKS = "window", "window + first 4", "strided", "top-k blocks"
PATTERNS = (WINDOW, SINKS, STRIDED, TOP_BLOCKS)


def study(layer: Layer) -> Result:
    """Kept mass, output error and keys per query of every pattern, budget and head of a layer."""
    q, k, v, score = layer.q, layer.k, layer.v, layer.score
    everything = whole(q, k, v, score, layer.pattern)
    extent = fv.Extent((q.shape[1],), (k.shape[1],))
    visible = float(keys_per_row(layer.pattern, extent))
    mass = block_mass(q, k, layer.pattern, score, BLOCK)
    rows = []
    for budget in BUDGETS:
        patterns = {
            WINDOW: fv.Sliding(left=budget - 1),
            SINKS: fv.Sliding(left=budget - SINK_TOKENS - 1, sink_tokens=SINK_TOKENS),
            STRIDED: strided(budget, visible),
            TOP_BLOCKS: fv.Blocks(heaviest_blocks(mass, budget // BLOCK, BLOCK)),
        }
        for name, pattern in patterns.items():
            kept = kept_mass(q, k, v, pattern, score, everything)
            numbers = {"mass": kept.mass, "error": kept.error, "keys": kept.keys}
            row = {field: values[0].tolist() for field, values in numbers.items()}
            rows.append({"pattern": name, "budget": budget} | row)
    return {"window": layer.window, "keys": visible, "rows": rows}


def strided(budget: int, visible: float) -> fv.Pattern:
    """Half the budget on the nearest keys, the other half on every s-th of the `visible` ones."""
    near = budget // 2
    return fv.Sliding(left=near - 1) | fv.Strided(max(math.ceil((visible - near) / near), 1))
