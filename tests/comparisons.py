"""A comparison on a store of tiny scans, and planted scores, for the tests of comparisons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks._compare_config import CompareConfig
from benchmarks._compare_statistics import values_of
from glmae_ray.config_loading import load
from tests.test_crops import write_store

NAMES = ("liver", "spleen")
TIMES = 800  # resamplings

CONFIG = """
arms:
  scratch: null
  local_mae: {loss: {w_rg: 0, w_gg: 0, w_gl: 0}}
  glmae: {}
baselines: [scratch, local_mae]
fractions: [0.5, 1.0]
seeds: [0, 1]
model: {preset: tiny, patch: [8, 4, 2], width: 24, depth: 2, heads: 2}
pretrain:
  sampling: {where: "split == 'train' and case_id != 'p5'"}
  steps: 4
  global_batch: 2
  views: {global_size: [16, 12, 8], local_count: 2, local_size: [16, 8, 8]}
  optim: {base_lr: 0.03}
  engine: {precision: float32}
finetune:
  where: split == 'train' and case_id != 'p5'
  steps: 4
  global_batch: 2
  crops: {count: 1, size: [16, 12, 8], window: [-300, 600]}
  head: {feature_size: 4}
  optim: {lr: 0.01}
  engine: {precision: float32}
evaluate: {where: case_id == 'p5', bootstrap: 50}
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("compare") / "store")


@pytest.fixture
def words(store, tmp_path) -> list[str]:
    """Of a command for a folder that is not there yet."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    return [str(tmp_path / "config.yaml"), f"store={store}", f"out={tmp_path / 'out'}"]


def config(words: list[str], *more: str) -> CompareConfig:
    return load(CompareConfig, [*words, *more])


# Statistics


def scores(dices: np.ndarray) -> list[dict]:
    """Scores of each seed from Dice (seeds, cases, structures); the other figures follow it."""
    return [
        {
            f"case{n:02}": {
                name: None if np.isnan(dice) else {"dice": dice, "nsd": dice / 2, "hd95": 1 - dice}
                for name, dice in zip(NAMES, case, strict=True)
            }
            for n, case in enumerate(one.tolist())
        }
        for one in dices
    ]


def values(dices: np.ndarray) -> np.ndarray:
    cases = [f"case{n:02}" for n in range(dices.shape[1])]
    return values_of(scores(dices), cases, NAMES)


def planted(rng: np.random.Generator, *, seeds: int = 3, cases: int = 30) -> np.ndarray:
    """Dice of people who differ much from each other, (seeds, cases, structures)."""
    people = rng.normal(0.5, 0.15, (1, cases, 1))
    return people + rng.normal(0, 0.01, (seeds, cases, len(NAMES)))
