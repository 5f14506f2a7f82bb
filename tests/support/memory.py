"""How much memory a computation would hold at its peak, without computing or holding anything."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Held(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.held: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.held.values()))
        return out


def peak_mib(make: Callable[[], tuple[Any, ...]], run: Callable[..., Any]) -> float:
    """MiB of tensors alive at the worst moment of `run(*make())`, those that `make` returns not counted."""
    with FakeTensorMode():
        made = make()
        with _Held() as held:
            run(*made)
    return held.peak / 2**20
