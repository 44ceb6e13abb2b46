"""`glmae finetune`: an encoder and labelled cases into a segmenter or a classifier."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.crops import crop_maker
from glmae_ray.jobs.allotment import Allotment
from glmae_ray.jobs.launching import allot_or_refuse, apply_profile, train_or_stop
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.run_folder import check_run, write_facts
from glmae_ray.jobs.store_changes import StoreFacts
from glmae_ray.labelled import Labelled, choose_cases
from glmae_ray.paths import Place, publish, to_place
from glmae_ray.store.index import FINGERPRINT_COLUMNS, VolumeIndex
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.tracking import progress, summarise

if TYPE_CHECKING:
    from glmae_ray.models.load_report import LoadReport

CASES = "cases.json"  # in the run folder: who is trained on, who is held out, what outputs mean


def run(cfg: FinetuneConfig) -> None:
    """Finetune, or continue; prints the summary and where the run is.

    Raises:
        UserError: Store, encoder, run folder or cluster do not fit the config; nothing was written.
    """
    cfg = _resolved(cfg)
    folder = to_place(cfg.run)
    VolumeStore.open(cfg.store)
    labelled = choose_cases(cfg)
    facts = StoreFacts(_fingerprint(cfg), _digest(labelled))
    cfg, report = _with_model(cfg, labelled, folder)
    if check_run(cfg, folder, facts):
        print(f"{folder}: has done its {cfg.steps} steps already")
    else:
        print(*_told(cfg, labelled), sep="\n")
        apply_profile(cfg)
        with ray_session(cfg.ray):
            allotment = allot_or_refuse(cfg)
            if report is not None:
                _keep(report, folder)
            publish(folder / CASES, json.dumps(labelled.as_dict(), indent=1) + "\n")
            write_facts(cfg, folder, facts)
            with progress(folder, steps=cfg.steps):
                train_or_stop(cfg, lambda: _fit(cfg, allotment, labelled))
        _print_summary(folder)
    print(f"run: {folder}")


def _resolved(cfg: FinetuneConfig) -> FinetuneConfig:
    """The same with whole paths: Ray's workers run in another directory."""
    names = ("store", "run", "targets", *(() if cfg.scratch else ("init",)))
    given = {name: location for name in names if (location := getattr(cfg, name)) is not None}
    return cfg.model_copy(update={name: str(to_place(at)) for name, at in given.items()})


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


def _told(cfg: FinetuneConfig, labelled: Labelled) -> list[str]:
    names = labelled.classes or labelled.structures
    what = "classes" if labelled.classes else "structures"
    line = f"{len(labelled.train)} cases to train on, {len(labelled.val)} held out"
    start = "random first weights" if cfg.scratch else cfg.init
    return [f"{line}; {len(names)} {what}: {', '.join(names)}; from {start}", *labelled.notes]


def _keep(report: LoadReport, folder: Place) -> None:
    from glmae_ray.jobs.starting import keep_report

    keep_report(report, folder)


def _fit(cfg: FinetuneConfig, allotment: Allotment, labelled: Labelled) -> None:
    from glmae_ray.jobs.finetune_worker import train_worker  # brings torch with it
    from glmae_ray.jobs.training import train

    maker = crop_maker(cfg, labelled, split="train")
    train(cfg, allotment, worker=train_worker, maker=maker)


def _print_summary(folder: Place) -> None:
    summary = summarise(folder)
    print(
        f"{summary['steps']} steps, {summary['samples']} samples in {summary['wall_s']:.0f} s "
        f"({summary['samples_per_s']:.1f} samples/s, {summary['data_wait_share']:.0%} of the time "
        f"waiting for data, peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB)"
    )
    if summary["skipped_steps"]:
        print(f"skipped steps: {summary['skipped_steps']}; see events.jsonl")
    if val := summary.get("val"):
        print(
            f"held-out mean: {val['last']:.4f} after the last step, best {val['best']:.4f} after "
            f"step {val['best_step']}; glmae evaluate measures both on the test cases"
        )
