"""`glmae demo`: phantom people through the same doors as real scans."""

from __future__ import annotations

from pathlib import Path

from glmae_ray.config import DemoConfig, PretrainConfig
from glmae_ray.config_loading import build, merge, read_yaml, shipped
from glmae_ray.config_store import IngestConfig
from glmae_ray.jobs import ingest, pretrain
from glmae_ray.phantoms import write_cohort


def run(cfg: DemoConfig) -> None:
    """Write a cohort, ingest it, pre-train on it; again, it goes on where it stopped.

    Raises:
        UserError: What ingest or pretrain found wrong.
    """
    out = Path(cfg.out).absolute()
    tree = merge(read_yaml(shipped("pretrain/demo.yaml")), cfg.pretrain)
    changes = {"store": str(out / "store"), "run": str(out / "run"), "ray": cfg.ray.model_dump()}
    pretraining = build(PretrainConfig, tree | changes)
    people = out / "phantoms"
    if not (people / "dataset.json").exists():  # written last
        print(f"phantoms: {cfg.people} people in {people}")
        write_cohort(people, people=cfg.people, seed=cfg.seed)
    if cfg.only == "phantoms":
        print(f"phantoms: {people}")
        return
    ingest.run(IngestConfig(source=str(people), store=pretraining.store, ray=cfg.ray))
    pretrain.run(pretraining)
