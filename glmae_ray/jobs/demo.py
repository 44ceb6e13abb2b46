"""`glmae demo`: phantom people through the same doors as real scans."""

from __future__ import annotations

from pathlib import Path

from glmae_ray.config import DemoConfig, PretrainConfig
from glmae_ray.config_finetune import EvaluateConfig, FinetuneConfig
from glmae_ray.config_loading import build, merge, read_yaml, shipped
from glmae_ray.config_store import IngestConfig
from glmae_ray.jobs import evaluate, finetune, ingest, pretrain
from glmae_ray.phantoms import write_cohort

_HELD_OUT = "split != 'train'"  # the last weights are measured, which nobody chose by `val`


def run(cfg: DemoConfig) -> None:
    """Write a cohort, ingest it, pre-train on it, finetune and evaluate; again, it goes on.

    Raises:
        UserError: What a part of it found wrong.
    """
    out = Path(cfg.out).absolute()
    store, encoder, organs = (str(out / name) for name in ("store", "run", "organs"))
    shared = {"store": store, "ray": cfg.ray.model_dump()}
    tree = merge(read_yaml(shipped("pretrain/demo.yaml")), cfg.pretrain)
    pretraining = build(PretrainConfig, tree | shared | {"run": encoder})
    tree = merge(read_yaml(shipped("finetune/demo.yaml")), cfg.finetune)
    finetuning = build(FinetuneConfig, tree | shared | {"run": organs, "init": encoder})
    people = out / "phantoms"
    if not (people / "dataset.json").exists():  # written last
        print(f"phantoms: {cfg.people} people in {people}")
        write_cohort(people, people=cfg.people, seed=cfg.seed)
    if cfg.only == "phantoms":
        print(f"phantoms: {people}")
        return
    ingest.run(IngestConfig(source=str(people), store=store, ray=cfg.ray))
    pretrain.run(pretraining)
    finetune.run(finetuning)
    evaluate.run(
        EvaluateConfig(run=organs, store=store, where=_HELD_OUT, weights=("last",), ray=cfg.ray)
    )
    print(f"run: {encoder}")
