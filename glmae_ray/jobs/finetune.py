"""`glmae finetune`: an encoder and labelled cases into a segmenter or a classifier."""

from __future__ import annotations

import functools
import hashlib
import json
from typing import TYPE_CHECKING

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.crops import crop_maker
from glmae_ray.jobs.allotment import Allotment
from glmae_ray.jobs.launching import launch, with_whole_paths
from glmae_ray.jobs.run_folder import CASES, check_run
from glmae_ray.jobs.store_changes import StoreFacts
from glmae_ray.labelled import Labelled, choose_cases
from glmae_ray.paths import Place, publish, to_place
from glmae_ray.store.index import FINGERPRINT_COLUMNS, VolumeIndex
from glmae_ray.store.zarr_store import VolumeStore

if TYPE_CHECKING:
    from glmae_ray.models.load_report import LoadReport


def run(cfg: FinetuneConfig) -> None:
    """Finetune, or continue; prints the summary and where the run is.

    Raises:
        UserError: Store, encoder, run folder or cluster do not fit the config; nothing was written.
    """
    init = () if cfg.scratch else ("init",)
    cfg = with_whole_paths(cfg, "store", "run", "targets", *init)
    folder = to_place(cfg.run)
    VolumeStore.open(cfg.store)
    labelled = choose_cases(cfg)
    facts = StoreFacts(_fingerprint(cfg), _digest(labelled))
    cfg, report = _with_model(cfg, labelled, folder)
    if check_run(cfg, folder, facts):
        print(f"{folder}: has done its {cfg.steps} steps already")
    else:
        print(*told(cfg, labelled), sep="\n")
        begin = functools.partial(_begin, folder, labelled, report)
        summary = launch(cfg, facts, begin=begin, fit=functools.partial(_fit, cfg, labelled))
        if val := summary.get("val"):
            print(
                f"held-out mean: {val['last']:.4f} after the last step, best {val['best']:.4f} "
                f"after step {val['best_step']}; glmae evaluate measures both on the test cases"
            )
    print(f"run: {folder}")


def check(cfg: FinetuneConfig) -> Labelled:
    """See that store, labels and encoder fit a run, which is not begun; the cases it would have.

    Raises:
        UserError: They do not.
    """
    VolumeStore.open(cfg.store)
    labelled = choose_cases(cfg)
    _with_model(cfg, labelled, to_place(cfg.run))
    return labelled


def _fingerprint(cfg: FinetuneConfig) -> str:
    return VolumeIndex.read(cfg.store, columns=FINGERPRINT_COLUMNS).fingerprint()


def _digest(labelled: Labelled) -> str:
    """SHA-256 of the cases and of what their labels mean."""
    facts = {name: part for name, part in labelled.as_dict().items() if name != "notes"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _with_model(
    cfg: FinetuneConfig, labelled: Labelled, folder: Place
) -> tuple[FinetuneConfig, LoadReport | None]:
    """The run with the encoder's numbers stated, and what was loaded; see that all of it fits."""
    from glmae_ray.jobs.starting import refuse_another  # brings torch with it
    from glmae_ray.models.finetuning import Finetuning, build_encoder, shape_of

    encoder, report = build_encoder(cfg)
    Finetuning(cfg, encoder, labelled.outputs, labelled.channels)
    if report is not None:
        refuse_another(report, folder)
    if cfg.model is None:
        tree = cfg.model_dump(exclude_unset=True) | {"model": shape_of(encoder)}
        cfg = FinetuneConfig.model_validate(tree)
    return cfg, report


def told(cfg: FinetuneConfig, labelled: Labelled) -> list[str]:
    """What a run trains on, for people."""
    names = labelled.classes or labelled.structures
    what = "classes" if labelled.classes else "structures"
    line = f"{len(labelled.train)} cases to train on, {len(labelled.val)} held out"
    start = "random first weights" if cfg.scratch else cfg.init
    return [f"{line}; {len(names)} {what}: {', '.join(names)}; from {start}", *labelled.notes]


def _begin(folder: Place, labelled: Labelled, report: LoadReport | None) -> None:
    """Leave what the run starts from: the report of its encoder, and cases.json."""
    from glmae_ray.jobs.starting import keep_report

    if report is not None:
        keep_report(report, folder)
    publish(folder / CASES, json.dumps(labelled.as_dict(), indent=1) + "\n")


def _fit(cfg: FinetuneConfig, labelled: Labelled, allotment: Allotment) -> None:
    from glmae_ray.jobs.finetune_worker import train_worker  # brings torch with it
    from glmae_ray.jobs.training import train

    maker = crop_maker(cfg, labelled, split="train")
    train(cfg, allotment, worker=train_worker, maker=maker)
