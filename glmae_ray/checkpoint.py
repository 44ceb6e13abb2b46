"""What a checkpoint folder holds, and how Ray Train keeps and returns it.

CHECKPOINT/
  engine/       DeepSpeed's files: student, teacher, decoder, heads, centre; optimizer
  state.json    step and samples consumed, and the resolved config
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch

from glmae_ray.config import PretrainConfig
from glmae_ray.engine import Engine
from glmae_ray.models.encoder_formats import encoder_facts, publish_weights
from glmae_ray.models.weight_files import WEIGHTS

FOLDER = "checkpoints"  # in the run folder; Ray Train's name for the run
INIT = "init.json"  # in the run folder: what the first weights were loaded from
_STATE = "state.json"


def save(engine: Engine, *, state: dict[str, Any]) -> None:
    """Hand a checkpoint to Ray Train, which registers it once every rank's part is there.

    Collective. A run that dies in between is continued from the checkpoint before.

    Args:
        engine: What is saved.
        state: JSON facts, among them `step`.
    """
    with tempfile.TemporaryDirectory(prefix="glmae-checkpoint-") as name:
        folder = Path(name)
        engine.save(folder)
        if ray.train.get_context().get_world_rank() == 0:
            (folder / _STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
        metrics = {"step": state["step"]}
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))


def latest_step(run: Path) -> int:
    """Steps done at the newest registered checkpoint of a run; 0 where there is none."""
    folder = run / FOLDER
    if not (folder / "checkpoint_manager_snapshot.json").exists():
        return 0
    metrics = ray.train.Result.from_path(folder).metrics
    return int(metrics["step"]) if metrics else 0


def resume(engine: Engine) -> int:
    """Load the newest registered checkpoint, if there is one; the steps it had done. Collective."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        engine.load(Path(folder))
        return int(read_state(Path(folder))["step"])


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON facts of a checkpoint folder."""
    return json.loads((folder / _STATE).read_text(encoding="utf-8"))


def export_encoder(engine: Engine, *, cfg: PretrainConfig, folder: Path, step: int) -> None:
    """Write `encoder.safetensors` and `encoder.json`: portable weights and what they need.

    Collective; rank 0 writes. Tensor names are timm's, as in the published GL-MAE encoder file.
    """
    with engine.whole_parameters():
        if ray.train.get_context().get_world_rank() != 0:
            return
        encoder = engine.module.encoder
        tensors = {
            name: value.detach().to("cpu", torch.float32, copy=True)
            for name, value in encoder.state_dict().items()
        }
        facts = encoder_facts(encoder) | training_facts(cfg, step=step)
    if (folder / INIT).exists():
        facts["origin"] = json.loads((folder / INIT).read_text(encoding="utf-8"))["origin"]
    publish_weights(folder / WEIGHTS, tensors, facts=facts)


def training_facts(cfg: PretrainConfig, *, step: int) -> dict[str, Any]:
    """What an encoder was trained on."""
    model, views = cfg.model, cfg.views
    grids = {
        kind: [side // part for side, part in zip(size, model.patch, strict=True)]
        for kind, size in (("global", views.global_size), ("local", views.local_size))
    }
    return {
        "step": step,
        "grid": grids,
        "window": {"CT": list(views.window), "other": "percentiles 0.5 and 99.5 of the case"},
        "window_becomes": [0.0, 1.0],
        "spacing_mm": "as acquired; each crop is resized to the view",
    }
