"""For tests of patterns, scores and implementations, ours and yours: inputs, bounds, promises."""

from foveal.testing.agreement import check_attend
from foveal.testing.bounds import Verdict, check, check_near
from foveal.testing.identities import check_pattern, definition
from foveal.testing.inputs import LAYOUTS, Layout, Sizes, packed_lengths, qkv
from foveal.testing.poison import poisoned_allocations
from foveal.testing.selection import check_selector

__all__ = [
    "LAYOUTS",
    "Layout",
    "Sizes",
    "Verdict",
    "check",
    "check_attend",
    "check_near",
    "check_pattern",
    "check_selector",
    "definition",
    "packed_lengths",
    "poisoned_allocations",
    "qkv",
]
