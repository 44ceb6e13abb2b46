"""python -m tests.golden.make: record the losses of twenty steps in pretrain_float32.json.

A change that should not alter what a run computes leaves the record as it is. One that should
alter it makes the record anew, and the commit says why the curve moved.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.loop import train_steps
from glmae_ray.models.glmae import GLMAE
from tests.conftest import tiny_config

RECORD = Path(__file__).with_name("pretrain_float32.json")
TERMS = ("loss_rl", "loss_rg", "loss_gg", "loss_gl")
WORDS = (
    "steps=20",
    "seed=7",
    "global_batch=4",
    "engine.micro_batch=2",
    "engine.precision=float32",
    "model.channels=2",
    "optim.base_lr=0.02",
    "optim.warmup_steps=5",
    # So that both move the curve: some steps are clipped and some not.
    "optim.clip=25",
    "optim.weight_decay=0.5",
)
_ONE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


def micro_batches(cfg: PretrainConfig) -> Iterator[dict[str, torch.Tensor]]:
    """Views like those of scans: smooth shapes under noise, in whole numbers and so exact.

    The raw words of Philox are fixed by its definition; NumPy's distributions are not.
    """
    number = 0
    while True:
        samples = cfg.micro_batch
        window = torch.tensor([-1000.0, 1000.0]).expand(samples, cfg.model.channels, 2)
        batch = {"window": window}
        for stream, kind in enumerate(("global", "local")):
            count, size = (getattr(cfg.views, f"{kind}_{what}") for what in ("count", "size"))
            words = np.random.Philox(key=[cfg.seed, stream], counter=[0, number, 0, 0])
            shape = (samples, count, cfg.model.channels)
            coarse = _below(words, (*shape, *(side // 4 for side in size)), 1600)
            for axis in (3, 4, 5):
                coarse = coarse.repeat(4, axis=axis)
            views = coarse - 1000 + _below(words, coarse.shape, 200)
            batch[kind] = torch.from_numpy(views.astype(np.int16))
            seeds = words.random_raw(samples * count).reshape(samples, count) >> 1
            batch[f"{kind}_seeds"] = torch.from_numpy(seeds.astype(np.int64))
        yield batch
        number += 1


def _below(words: np.random.Philox, shape: tuple[int, ...], bound: int) -> np.ndarray:
    raw = words.random_raw(int(np.prod(shape))).reshape(shape)
    return (raw >> 32).astype(np.int64) * bound >> 32


def steps(*words: str) -> list[dict[str, float]]:
    """The four terms and the gradient's norm of every step, through the engine and its loop."""
    cfg = tiny_config(*WORDS, *words)
    torch.manual_seed(cfg.seed)
    module = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss)
    engine = Engine(module, cfg=cfg, device=torch.device("cpu"))
    recorded = []
    for info in train_steps(engine, micro_batches(cfg), cfg=cfg):
        values = {name: info.outputs[name].item() for name in TERMS}
        recorded.append(values | {"gradient_norm": engine.gradient_norm()})
    return recorded


def facts() -> dict[str, Any]:
    """What the record was made on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return {
        "commit": commit.stdout.strip() or None,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in ("torch", "deepspeed", "numpy")},
    }


def main() -> None:
    """Write the record, or another file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("words", nargs="*", help="fields to change, to see what that does")
    given = parser.parse_args()
    os.environ |= _ONE_PROCESS
    torch.set_num_threads(given.threads)
    lines = ",\n".join(f"    {json.dumps(step)}" for step in steps(*given.words))
    head = json.dumps({"made_on": facts(), "words": WORDS}, indent=2).removesuffix("\n}")
    given.out.write_text(f'{head},\n  "steps": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
