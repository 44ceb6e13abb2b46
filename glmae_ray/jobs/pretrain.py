"""`glmae pretrain`: check what was asked, run the workers under Ray Train, sum up."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from glmae_ray.config import PretrainConfig
from glmae_ray.errors import UserError
from glmae_ray.jobs.allotment import Allotment
from glmae_ray.jobs.launching import launch, with_whole_paths
from glmae_ray.jobs.run_folder import check_run
from glmae_ray.jobs.store_changes import StoreFacts
from glmae_ray.paths import Place, to_place
from glmae_ray.probed_cases import probed_cases
from glmae_ray.samples import sample_maker
from glmae_ray.store.index import FINGERPRINT_COLUMNS, VolumeIndex
from glmae_ray.store.selection import columns_to_select, select_cases
from glmae_ray.store.zarr_store import VolumeStore
from glmae_ray.tracking import Record


def run(cfg: PretrainConfig) -> None:
    """Pre-train, or continue; prints the summary and where the run is.

    Raises:
        UserError: Store, run folder or cluster do not fit the config; nothing was written.
    """
    probe = with_whole_paths(cfg.probe, "store", "targets")
    cfg = with_whole_paths(cfg.model_copy(update={"probe": probe}), "store", "run", "init")
    folder = to_place(cfg.run)
    facts = check_store(cfg)
    check_probe(cfg)
    if check_run(cfg, folder, facts):
        print(f"{folder}: has done its {cfg.steps} steps already")
    else:
        begin = _check_init(cfg, folder)
        summary = launch(cfg, facts, begin=begin, fit=functools.partial(_fit, cfg))
        if held_out := summary.get("val_reconstruction"):
            print(
                f"held-out reconstruction: loss {held_out['first']:.4f} -> {held_out['last']:.4f} "
                f"(predicting the mean: {held_out['trivial']:.4f}), r2 {held_out['r2']:.4f}"
            )
        for line in _probed_lines(summary.get("probe")):
            print(line)
    print(f"run: {folder}")


def _probed_lines(probe: Record | None) -> Iterator[str]:
    """What the probes say of the first and the last encoder, a line a figure."""
    if probe is None:
        return
    first, last = probe["first"], probe["last"]
    for name in ("knn", "linear", "dice"):
        if name in last and name in first:
            was, now = (p[name]["mean"] if name == "dice" else p[name] for p in (first, last))
            steps = f"after {first['step']} and {last['step']} steps"
            yield f"probe, {name}: {was:.4f} -> {now:.4f} ({steps})"


def _fit(cfg: PretrainConfig, allotment: Allotment) -> None:
    from glmae_ray.jobs.pretrain_worker import train_worker  # brings torch with it
    from glmae_ray.jobs.training import train

    maker = sample_maker(cfg, split="train", kinds=cfg.loss.kinds)
    if cfg.probe.every_steps:
        probe = cfg.probe.model_copy(update={"cpus": allotment.probe_cpus})
        cfg = cfg.model_copy(update={"probe": probe})
    train(cfg, allotment, worker=train_worker, maker=maker)


def _check_init(cfg: PretrainConfig, folder: Place) -> Callable[[], None]:
    """See that the encoder to start from fits, if one is named; what tells and keeps its report."""
    if cfg.init is None:
        return lambda: None
    from glmae_ray.jobs.starting import check_init, keep_report  # brings torch with it

    return functools.partial(keep_report, check_init(cfg, folder), folder)


def check_probe(cfg: PretrainConfig, *, tell: Callable[[str], None] = print) -> None:
    """See that there is something to probe the run with, if it asks for probes; tell what.

    Raises:
        UserError: There is not.
    """
    if not cfg.probe.every_steps:
        return
    for cases in probed_cases(cfg).values():
        for line in cases.lines():
            tell(line)


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
