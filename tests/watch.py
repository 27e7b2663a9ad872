"""What PyTorch was asked to do while a piece of code ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Records each operator with the tensors that it returned, the views of old memory left out."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()
        self.largest = 0
        self.integer_dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators.add(function.overloadpacket.__name__)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
                if not (tensor.is_floating_point() or tensor.dtype in (torch.bool, torch.uint8)):
                    self.integer_dtypes.add(tensor.dtype)
        return result


COMPUTING = {"bmm", "mm", "_softmax", "exp", "sum", "_scaled_dot_product_flash_attention_for_cpu"}
