"""What a step of the real module keeps, needs and computes, on fake tensors: sizes without work.

Fake tensors go through the dispatcher of the CPU as real ones do, so autograd keeps the same and
every intermediate result has its size, at full size in a second.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from glmae_ray.config import PretrainConfig
from glmae_ray.models.glmae import GLMAE
from glmae_ray.models.vit3d import sincos_positions

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Bytes(NamedTuple):
    """What autograd keeps of a forward for its backward pass, and what there is at the peak."""

    kept: int
    peak: int


def build(cfg: PretrainConfig) -> GLMAE:
    """The module without storage."""
    with torch.device("meta"):
        return GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)


def measure_flops(cfg: PretrainConfig) -> int:
    """Operations of a forward and backward pass of a micro-batch."""
    # Apart from the bytes: the counter keeps alive what checkpointing makes anew.
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with _module(cfg, fake=True) as module, counter:
        _forward(cfg, module).backward()
    return counter.get_total_flops()


def measure_bytes(cfg: PretrainConfig, *, fake: bool = True) -> Bytes:
    """Bytes of a step, AdamW's moments made already; a fused AdamW takes no more."""
    with _module(cfg, fake=fake) as module:
        kept, live = _Kept(module), _Live([*module.parameters(), *module.buffers()])
        with live:
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            moments = [torch.zeros_like(parameter) for parameter in trained * 2]
            if cfg.accumulation > 1:  # gradients of the micro-batch before
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            batch = make_batch(cfg)
            with kept.hooks():
                loss = _forward(cfg, module, batch)
            loss.backward()
            del moments
    return Bytes(kept.total, live.peak)


@contextlib.contextmanager
def _module(cfg: PretrainConfig, *, fake: bool) -> Iterator[GLMAE]:
    """The module on fake or real tensors of the CPU, and nothing of it in the cache afterwards."""
    module = build(cfg)
    sincos_positions.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        yield module.to_empty(device="cpu")
    sincos_positions.cache_clear()


def _forward(cfg: PretrainConfig, module: GLMAE, batch: dict[str, Tensor] | None = None) -> Tensor:
    with _autocast(cfg):
        return module(make_batch(cfg) if batch is None else batch)["loss"]


def make_batch(cfg: PretrainConfig) -> dict[str, Tensor]:
    """A micro-batch of zeros."""
    small, channels = cfg.micro_batch, cfg.model.channels
    batch = {"window": torch.tensor([-1000.0, 1000.0]).repeat(small, channels, 1)}
    for kind in cfg.loss.kinds:
        shape = (small, getattr(cfg.views, f"{kind}_count"))
        size = getattr(cfg.views, f"{kind}_size")
        batch[kind] = torch.zeros((*shape, channels, *size), dtype=torch.int16)
        batch[f"{kind}_seeds"] = torch.zeros(shape, dtype=torch.int64)
    return batch


def _autocast(cfg: PretrainConfig) -> contextlib.AbstractContextManager[Any]:
    if cfg.engine.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=DTYPES[cfg.engine.precision])


# torch's counter knows CUDA's fused attention, not that of CPUs.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class _Kept:
    """Adds up the storages, each once, that autograd saves beside the module's own."""

    def __init__(self, module: nn.Module) -> None:
        own = [*module.parameters(), *module.buffers()]
        self._seen = {tensor.untyped_storage()._cdata for tensor in own}
        self._alive: list[Tensor] = []  # so that no address is used twice
        self.total = 0

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield
        self._alive.clear()  # the backward pass is to free them

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor.detach())
            self.total += storage.nbytes()
        return tensor


class _Live(TorchDispatchMode):
    """Adds up the storages that are alive, from every operation's results."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self._live = self.peak = 0
        for tensor in there:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return results

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key: int) -> None:
        self._live -= self._sizes.pop(key)
