"""`glmae pretrain`: check what was asked, run the workers under Ray Train, sum up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from glmae_ray.config import PretrainConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.allotment import Allotment
from glmae_ray.jobs.launching import allot_or_refuse, apply_profile, train_or_stop
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.run_folder import check_run, write_facts
from glmae_ray.jobs.store_changes import StoreFacts
from glmae_ray.paths import Place, to_place
from glmae_ray.samples import sample_maker
from glmae_ray.store.index import FINGERPRINT_COLUMNS, VolumeIndex
from glmae_ray.store.selection import columns_to_select, select_cases
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.tracking import progress, summarise

if TYPE_CHECKING:
    from glmae_ray.models.load_report import LoadReport


def run(cfg: PretrainConfig) -> None:
    """Pre-train, or continue; prints the summary and where the run is.

    Raises:
        UserError: Store, run folder or cluster do not fit the config; nothing was written.
    """
    # Ray's workers run in another directory.
    places = {
        name: str(to_place(location))
        for name in ("store", "run", "init")
        if (location := getattr(cfg, name)) is not None
    }
    cfg = cfg.model_copy(update=places)
    folder = to_place(cfg.run)
    facts = check_store(cfg)
    if check_run(cfg, folder, facts):
        print(f"{folder}: has done its {cfg.steps} steps already")
    else:
        loaded = _check_init(cfg, folder)
        apply_profile(cfg)
        with ray_session(cfg.ray):
            allotment = allot_or_refuse(cfg)
            if loaded is not None:
                _keep(loaded, folder)
            write_facts(cfg, folder, facts)
            with progress(folder, steps=cfg.steps):
                train_or_stop(cfg, lambda: _fit(cfg, allotment))
        _print_summary(summarise(folder))
    print(f"run: {folder}")


def _fit(cfg: PretrainConfig, allotment: Allotment) -> None:
    from glmae_ray.jobs.pretrain_worker import train_worker  # brings torch with it
    from glmae_ray.jobs.training import train

    maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
    train(cfg, allotment, worker=train_worker, maker=maker)


def _keep(loaded: LoadReport, folder: Place) -> None:
    from glmae_ray.jobs.starting import keep_report

    keep_report(loaded, folder)


def _check_init(cfg: PretrainConfig, folder: Place) -> LoadReport | None:
    """See that the encoder to start from fits; None where none is named."""
    if cfg.init is None:
        return None
    from glmae_ray.jobs.starting import check_init  # brings torch with it

    return check_init(cfg, folder)


def check_store(cfg: PretrainConfig, *, tell: Callable[[str], None] = print) -> StoreFacts:
    """See that the store can feed the run; tell what is odd about it.

    Raises:
        UserError: It cannot.
    """
    VolumeStore.open(cfg.store)
    boxes = {"box_start", "box_stop"}
    needed = {*FINGERPRINT_COLUMNS, "channels", *boxes, *columns_to_select(cfg.sampling)}
    index = VolumeIndex.read(cfg.store, columns=needed)
    selection, val = select_cases(index, cfg.sampling), index.select(split="val")
    chosen = selection.index
    channels = sorted({*chosen.column("channels").tolist(), *val.column("channels").tolist()})
    if channels != [cfg.model.channels]:
        raise UserError(
            f"model.channels: {cfg.model.channels}, but the store's cases have {channels}"
        )
    if len(val) == 0 and cfg.loss.reconstructed:
        tell(f"{cfg.store}: no case of the split val, so no held-out reconstruction is measured")
    if both := len(chosen.select(split="val")):
        tell(f"sampling.where: {both} chosen cases are of the split val, which is held out")
    return StoreFacts(index.fingerprint(), selection.digest())


def _print_summary(summary: dict[str, Any]) -> None:
    print(
        f"{summary['steps']} steps, {summary['samples']} samples in {summary['wall_s']:.0f} s "
        f"({summary['samples_per_s']:.1f} samples/s, {summary['data_wait_share']:.0%} of the time "
        f"waiting for data, peak memory {summary['peak_memory_bytes'] / 2**30:.1f} GiB)"
    )
    if summary["skipped_steps"]:
        print(f"skipped steps: {summary['skipped_steps']}; see events.jsonl")
    held_out = summary.get("val_reconstruction")
    if held_out:
        print(
            f"held-out reconstruction: loss {held_out['first']:.4f} -> {held_out['last']:.4f} "
            f"(predicting the mean: {held_out['trivial']:.4f}), r2 {held_out['r2']:.4f}"
        )
