"""The rows of the step benchmark: what is built, and what one whole step of it is."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from glmae_ray.config import PretrainConfig

_LR, _MOMENTUM, _TEMPERATURE = 1e-4, 0.996, 0.05
_ONLY_LOCAL = {"w_rg": 0, "w_gg": 0, "w_gl": 0}


@dataclass(frozen=True)
class Way:
    """One way to do the same work.

    Attributes:
        objective: `glmae`, or `mae`: the local views alone, without a teacher.
        who: `ours`, our engine and loop, or `monai`, composed from MONAI's blocks.
        precision: As `engine.precision`.
        compile: As `model.compile`.
    """

    objective: str
    who: str
    precision: str = "float32"
    compile: bool = False

    @property
    def name(self) -> str:
        """As it stands in the table and in the ratios."""
        short = {"float32": "fp32", "bf16": "bf16"}[self.precision]
        whose = {"glmae": "monai_composed", "mae": "monai_mae"}[self.objective]
        who = "ours" if self.who == "ours" else whose
        return f"{who}_{short}{'_compiled' if self.compile else ''}"


@dataclass(frozen=True)
class Size:
    """What one step takes: view sizes in voxels, samples, preset."""

    global_size: int
    local_size: int
    samples: int
    preset: str = "base"


def config(way: Way, size: Size) -> PretrainConfig:
    """The run that a way measures, as `glmae pretrain` would have it."""
    return PretrainConfig.model_validate(
        {
            "store": "",
            "run": "",
            "steps": 10**6,
            "global_batch": size.samples,
            "views": {"global_size": size.global_size, "local_size": size.local_size},
            "model": {"preset": size.preset, "compile": way.compile},
            "loss": _ONLY_LOCAL if way.objective == "mae" else {},
            "engine": {"precision": way.precision},
        }
    )


def measure(
    way: Way, size: Size, *, warm_up: int, steps: int, threads: int, weigh: bool
) -> dict[str, Any]:
    """Seconds of each step and, if to weigh, bytes that one holds at most; in its own process."""
    # torch.compile on CPU warns of what it does not vectorise; nothing to act upon.
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = config(way, size)
    prepare = _ours if way.who == "ours" else _monai
    step = prepare(cfg, batch(cfg, device), device)
    times = []
    for _ in range(warm_up + steps):
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return {"seconds": times[warm_up:], "peak": _peak_of_tensors(step, device) if weigh else 0}


def batch(cfg: PretrainConfig, device: torch.device) -> dict[str, Tensor]:
    """Views of noise: what they show changes no time."""
    generator, samples = torch.Generator().manual_seed(0), cfg.global_batch
    made = {"window": torch.tensor([-1000.0, 1000.0]).expand(samples, cfg.model.channels, 2)}
    for kind in cfg.loss.kinds:
        views, size = (getattr(cfg.views, f"{kind}_{what}") for what in ("count", "size"))
        shape = (samples, views, cfg.model.channels, *size)
        voxels = torch.randint(-1000, 1000, shape, generator=generator, dtype=torch.int16)
        seeds = torch.randint(0, 2**62, (samples, views), generator=generator)
        made |= {kind: voxels, f"{kind}_seeds": seeds}
    return {name: tensor.to(device) for name, tensor in made.items()}


def _ours(cfg: PretrainConfig, views: dict[str, Tensor], device: torch.device) -> Callable[[], Any]:
    """A worker's own loop: engine, schedule, clipping, AdamW, teacher."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from glmae_ray.engine import Engine
    from glmae_ray.loop import train_steps
    from glmae_ray.models.glmae import GLMAE

    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    engine = Engine(module, cfg=cfg, device=device)
    infos = train_steps(engine, itertools.repeat(views), cfg=cfg)
    return lambda: next(infos)


def _monai(
    cfg: PretrainConfig, views: dict[str, Tensor], device: torch.device
) -> Callable[[], Any]:
    """A loop as a user would write it, with torch's fused AdamW as ours.

    Views come as float32 in [0, 1]: its loader made them.
    """
    from benchmarks._step_monai import ComposedGLMAE, autoencoder, masked_error

    unit = {kind: ((views[kind].float() + 1000) / 2000).clamp(0, 1) for kind in cfg.loss.kinds}
    if cfg.loss.uses_teacher:
        module: Any = ComposedGLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss).to(device)
        kinds = [list(unit[kind].unbind(1)) for kind in ("global", "local")]

        def loss() -> Tensor:
            return module(*kinds, tau=_TEMPERATURE)
    else:
        ratio, x = cfg.views.mask_ratio, unit["local"].flatten(0, 1)
        module = autoencoder(cfg.model, cfg.views.local_size, ratio=ratio).to(device)

        def loss() -> Tensor:
            predicted, mask = module(x)
            return masked_error(predicted, mask, x, cfg.model.patch)

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    settings = {"betas": cfg.optim.betas, "weight_decay": cfg.optim.weight_decay}
    optimizer = torch.optim.AdamW(trained, lr=_LR, fused=True, **settings)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(trained, cfg.optim.clip)
        optimizer.step()
        if cfg.loss.uses_teacher:
            module.update(_MOMENTUM)

    return step


def counted_flops(way: Way, size: Size) -> float:
    """FLOPs that one sample needs, forward and backward, as torch counts products of matrices.

    Counted on our module, which computes no token that the algorithm does not need; attention as
    plain products, without what fused kernels compute again.
    """
    from glmae_ray.models.glmae import GLMAE

    cfg = config(replace(way, who="ours", compile=False), replace(size, samples=1))
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    views = batch(cfg, torch.device("cpu"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(views)["loss"].backward()
    return float(counter.get_total_flops())


def matrix_rate(dtype: torch.dtype, *, threads: int) -> float:
    """FLOP/s of products of square matrices: the median of repeats, of the best size."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides, repeats = ((4096, 8192), 50) if device == "cuda" else ((1024, 2048, 4096), 10)
    rates = []
    for side in sides:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(2 + repeats):
            begin = time.perf_counter()
            a @ b
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        rates.append(2 * side**3 / statistics.median(times[2:]))
    return max(rates)


def _peak_of_tensors(step: Callable[[], Any], device: torch.device) -> int:
    """Bytes of all tensors that one more step holds at most, by torch's own account."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    now = most = _alive()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":  # one for what is taken, one for what is given back
            now += event.nbytes()
            most = max(most, now)
    return most


def _alive() -> int:
    """Bytes of the storages of all tensors there are, each once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):  # a compiler's stand-ins have no storage
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
