"""Count the bytes of every live tensor, exactly, while real code runs: the reference for the memory model.

A dispatch mode sees each operation's outputs, autograd's backward included, and notes their storages; a storage's end
is seen by a weak reference. What a kernel allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.nn.modules.linear_cross_entropy import _linear_cross_entropy_batch_chunked
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LINEAR_CROSS_ENTROPY = torch.ops.torch_nn._linear_cross_entropy_batch_chunked.default


class LiveMemory(TorchDispatchMode):
    """While active, ``live`` is the bytes of tensor storages that are in memory, ``peak`` their maximum."""

    def __init__(self, *existing: torch.nn.Module):
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}
        for module in existing:
            for tensor in [*module.parameters(), *module.buffers()]:
                self._note(tensor)
                state = getattr(tensor, "quant_state", None)
                while state is not None:
                    for part in (state.absmax, state.code, state.offset):
                        if torch.is_tensor(part):
                            self._note(part)
                    state = state.state2

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is LINEAR_CROSS_ENTROPY:
            with self:  # it is written in torch's own operations
                result = _linear_cross_entropy_batch_chunked._init_fn(*arguments, **(options or {}))
        else:
            result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or storage.device.type == "meta":
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)
