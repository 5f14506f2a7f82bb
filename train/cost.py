"""What one step of a stage costs, read off a step on tensors without values: its FLOPs, and the memory it holds.

The twin of a stage has the same networks, losses and order of work, but nothing is computed and no memory is used, so a
network of any size is measured on any machine. The kernels are those of a CPU: fused attention holds no matrix of scores.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from ..conf.spine import Strategy
from ..models.generators.base import Generator
from ..models.tokenizers.base import Tokenizer
from .clock import Clock
from .network import Trainable, held
from .stage import Batch, Steps
from .units import recompute

_ATEN = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _attention(query, key, value)  # the scores that the fused kernel makes again are no part of the model's


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""FLOPs of an operation: those of torch's `FlopCounterMode`, and of fused attention on a CPU, which it lacks."""


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    formula = _FORMULAS.get(func.overloadpacket)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)


class _Counter(TorchDispatchMode):
    """Sums the FLOPs of all operations within."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _FORMULAS:
            with self:  # inference mode leaves it to us to take composite operations (linear, matmul) apart
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        self.flops += _flops(func, args, kwargs, out)
        return out


def counted_flops(action: Callable[[], None]) -> int:
    """FLOPs of what `action` really computes, by the formulas of `Cost.flops`; compiled parts are not seen."""
    with _Counter() as counter:
        action()
    return counter.flops


LATE = Clock(10**9, 0, 2 * 10**9, 1, 10**6)
"""Past every start step."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What products and convolutions compute in under autocast, by `strategy.precision`."""


@dataclass(frozen=True)
class Cost:
    """What one step costs a rank.

    Args:
        flops: of the trained networks, forward and backward; attention counts whole score matrices, a product of
            `[m, k]` and `[k, n]` 2·m·k·n.
        frozen_flops: of teachers and other frozen modules, beside them.
        moments: `(bytes, gradients)` at the worst moments: bytes of tensors alive that are neither weights nor finished
            gradients, and how many elements of the gradients are finished.
    """

    flops: int
    frozen_flops: int
    moments: tuple[tuple[int, int], ...]

    def worst(self, gradient_bytes: Callable[[int], float]) -> tuple[int, int]:
        """The moment that takes most when so many finished gradients take `gradient_bytes`."""
        return max(self.moments, key=lambda moment: moment[0] + gradient_bytes(moment[1]), default=(0, 0))

    def peak(self, gradient_bytes: Callable[[int], float]) -> float:
        """Bytes beside weights and optimizer at the worst moment."""
        held, finished = self.worst(gradient_bytes)
        return held + gradient_bytes(finished)


class Twin:
    """A copy of a stage on tensors without values.

    Args:
        stage: built, on the CPU or the meta device; it stays as it is.
        precision: of the arithmetic: fp32, bf16 or fp16.
    """

    def __init__(self, stage: Steps, precision: str) -> None:
        tensors = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules_of(stage))
        # cheap: most runs are too short to ask for a cost, and only `cost` makes tensors to compute with
        self.stage: Any = copy.deepcopy(stage, {id(tensor): _without_values(tensor) for tensor in tensors})
        for module in modules_of(self.stage):
            if isinstance(module, Generator) and isinstance(tokenizer := getattr(self.stage, "tokenizer", None), Tokenizer):
                module.bind(tokenizer)  # a copy of a generator keeps the tokenizer that was lent to the first
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.dtype = AUTOCAST.get(precision)

    def cost(self, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], clock: Clock, accumulate: int = 1) -> Cost:
        """The cost of the step that `clock` stands before.

        Args:
            shapes: shape and type of each tensor of a micro-batch of one rank.
            clock: decides what the step does (start of the adversarial loss, R1, …).
            accumulate: micro-batches of a step.

        Raises:
            DataDependentOutputException, DynamicOutputShapeException: a part of the stage looks at values.
        """
        networks: Any = {name: _OnPaper(item, self.dtype) for name, item in self.stage.trainables.items()}
        with self.mode, ExitStack() as stack:
            self._give_values()
            batch: Batch = {name: torch.zeros(tuple(shape), dtype=dtype) for name, (shape, dtype) in shapes.items()}
            weights = chain.from_iterable(chain(module.parameters(), module.buffers()) for module in modules_of(self.stage))
            watch = _Watch(self.stage.frozen, weights)
            parameters = [parameter for item in self.stage.trainables.values() for parameter in item.module.parameters()]
            stack.enter_context(watch.watching(parameters))
            for _ in range(accumulate):
                self.stage.step(dict(batch), clock, networks)
            for parameter in parameters:
                parameter.grad = None
        return Cost(watch.flops, watch.frozen_flops, watch.worst())

    def _give_values(self) -> None:
        for module in modules_of(self.stage):
            if any(tensor.is_meta for tensor in module.parameters()):
                module._apply(_on_cpu)


def modules_of(stage: Steps) -> list[nn.Module]:
    """All networks, trained ones first."""
    return [item.module for item in stage.trainables.values()] + stage.frozen


def _without_values(tensor: Tensor) -> Tensor:
    made = torch.empty_like(tensor, device="meta")
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _on_cpu(tensor: Tensor) -> Tensor:
    if not tensor.is_meta:
        return tensor
    # not by an operation on the old tensor: a module cannot let go of one that a mode remembers
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def step_cost(
    stage: Steps, strategy: Strategy, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]], *, again: bool = True
) -> Cost:
    """The cost of a late step, where all losses count, under a strategy's precision and recomputation.

    Args:
        stage: built, without a strategy.
        strategy: of the run.
        shapes: of a micro-batch of one rank.
        again: count and hold what the strategy's recomputation makes of it; else what the model needs.
    """
    twin = Twin(stage, strategy.precision)
    for item in twin.stage.trainables.values() if again else ():
        if strategy.recompute != "none":
            recompute(item.module, strategy.recompute)
    return twin.cost(shapes, LATE)


class _OnPaper:
    """What a stage's step asks of a `Network`."""

    def __init__(self, trainable: Trainable, dtype: torch.dtype | None) -> None:
        self.trainable, self.module, self._dtype = trainable, trainable.module, dtype

    def __call__(self, *inputs: Any) -> Any:
        with torch.autocast("cpu", self._dtype, enabled=self._dtype is not None):
            return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @contextmanager
    def apart(self) -> Iterator[Callable[..., Any]]:
        with held(self.module):
            yield self


class _Watch(TorchDispatchMode):
    """Sees every operation: whose FLOPs they are, and what is alive after it.

    Args:
        frozen: modules whose FLOPs are counted apart.
        weights: tensors that are there all the time.
    """

    def __init__(self, frozen: Sequence[nn.Module], weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.frozen, self.flops, self.frozen_flops = frozen, 0, 0
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in weights}
        self._held, self._finished = 0, 0
        self._worst: dict[int, int] = {}
        self._depth, self._begun = 0, 0
        self._born: list[range] = []

    def worst(self) -> tuple[tuple[int, int], ...]:
        """See `Cost.moments`."""
        return tuple((held, finished) for finished, held in self._worst.items())

    @contextmanager
    def watching(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, operations are seen, and the gradients of `parameters`."""
        handles: list[Any] = [parameter.register_post_accumulate_grad_hook(self._finish) for parameter in parameters]
        for module in {each for root in self.frozen for each in root.modules()}:
            handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN.bincount.default:
            return args[0].new_empty(args[2])  # as many as there are codes; torch would not say without their values
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._count(_flops(func, args, kwargs, out))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self._hold(value.untyped_storage())
        self._look()
        return out

    def _look(self) -> None:
        self._worst[self._finished] = max(self._held, self._worst.get(self._finished, 0))

    def _count(self, flops: int) -> None:
        if self._depth or self._is_frozen(torch._C._current_autograd_node()):
            self.frozen_flops += flops
        else:
            self.flops += flops

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._held += storage.nbytes()
            self._refs[key] = weakref.ref(storage, lambda _: self._release(key))

    def _release(self, key: int) -> None:
        self._held -= self._sizes.pop(key)
        del self._refs[key]

    def _finish(self, parameter: Tensor) -> None:
        """A gradient is complete: where it goes is up to the strategy, so it is counted apart."""
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        if self._sizes.get(key):
            self._held -= self._sizes[key]
            self._sizes[key] = 0
            self._finished += parameter.numel()
            self._look()

    def _enter(self, *_: Any) -> None:
        if not self._depth:
            self._begun = torch.autograd._get_sequence_nr()
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self._born.append(range(self._begun, torch.autograd._get_sequence_nr()))

    def _is_frozen(self, node: Node | None) -> bool:
        """A step of the backward of what a frozen module did."""
        return node is not None and any(node._sequence_nr() in born for born in self._born)  # type: ignore[attr-defined]
