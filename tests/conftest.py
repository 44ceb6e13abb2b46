"""What tests share: tiny configs, and the folder of real volumes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from glmae_ray.config import PretrainConfig
from glmae_ray.config_loading import load

# How long an example takes says more of what else a machine does than of the code.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")

# Unequal sides everywhere: cubes hide mistakes of axis order.
TINY = [
    "store=none",
    "run=none",
    "steps=4",
    "global_batch=4",
    "model.preset=tiny",
    "model.patch=[8,4,2]",
    "model.width=24",
    "model.depth=2",
    "model.heads=2",
    "model.decoder_width=12",
    "model.decoder_depth=1",
    "model.decoder_heads=2",
    "model.head_hidden=16",
    "model.head_bottleneck=8",
    "model.prototypes=32",
    "views.global_count=2",
    "views.local_count=3",
    "views.global_size=[32,20,12]",
    "views.local_size=[16,12,8]",
    "engine.precision=float32",
]


def tiny_config(*words: str) -> PretrainConfig:
    """A pre-training config of a few thousand weights; later words win."""
    return load(PretrainConfig, [*TINY, *words])


def start_ray(*, cpus: int = 4) -> str:
    """Start a Ray in this process, as bare as can be; its address."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    return str(context.address_info["address"])


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real volumes."""
    name = os.environ.get("GLMAE_TEST_DATA")
    if not name:
        pytest.skip("GLMAE_TEST_DATA does not name a folder of real volumes")
    return Path(name)
