"""What the kernels are launched with: tiles and routes of a task on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveal.engines.local_linear.spec import Spec
from foveal.engines.local_linear.tuning import sizes
from foveal.engines.tile.launch import Layout, lay_out, least_columns, options
from foveal.engines.tile.parts import Task
from foveal.tuning.config import Config
from foveal.tuning.tile import BACKWARD_KV, FORWARD, architecture

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Stage:
    """One kernel of a task, ready to launch."""

    spec: Spec
    config: Config
    layout: Layout

    @property
    def options(self) -> dict[str, Any]:
        return {"SPEC": self.spec, **options(self.config.warps, self.config.stages)}

    def queries(self, x: Tensor) -> int:
        """Programs for the queries x [N, Lq, H, D]."""
        return len(x) * x.shape[2] * self.layout.q_tiles

    def keys(self, x: Tensor) -> int:
        """Programs for the keys x [N, Lk, Hkv, D]."""
        return len(x) * x.shape[2] * self.layout.k_tiles


def stage(name: str, task: Task, q: Tensor, v: Tensor, precise: bool = False) -> Stage:
    """The kernel `name` of `tuning` for q [N, Lq, Hq, D] and v [N, Lk, Hkv, Dv]."""
    by_key = name == "backward_kv"
    config = sizes(name, max(q.shape[3], v.shape[3]), q.dtype, q.device)
    kind = BACKWARD_KV if by_key else FORWARD
    layout = lay_out(kind, task.pattern, task.extent, config, q.device, q.shape[2])
    spec = Spec(
        q_tile=layout.q_tile,
        k_tile=layout.k_tile,
        rank=layout.rank,
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        route=layout.route,
        precision="ieee",
        precise=precise,
        columns=least_columns(architecture(q.device), q.dtype),
    )
    return Stage(spec, config, layout)
