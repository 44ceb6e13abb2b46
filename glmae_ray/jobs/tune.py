"""`glmae tune`: a search over finetuning runs on Ray Tune; the same command again continues."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import replace
from typing import Any

from glmae_ray.config_loading import merge
from glmae_ray.config_search import SearchConfig, nested
from glmae_ray.errors import StoppedError, UserError
from glmae_ray.jobs import finetune
from glmae_ray.jobs.concurrency import Room, room
from glmae_ray.jobs.launching import allot_here, apply_profile, nodes_alive
from glmae_ray.jobs.ray_session import ray_session
from glmae_ray.jobs.run_folder import CONFIG, refusals
from glmae_ray.jobs.search_results import BEST, best_of, leave_pictures, leave_table, measured
from glmae_ray.jobs.trials import Trial, figures, name_of, read_trials, run_of, told, write_trial
from glmae_ray.paths import Place, names_in, publish, read_file, to_place

# What may differ when a search is continued. More trials may be asked for, too.
_FREE = {"store", "run", "trials", "retries", "at_a_time", "ray"}


def run(cfg: SearchConfig) -> None:
    """Search, or continue; prints a line a trial, and where the best config is.

    Raises:
        UserError: The search, its folder, store or cluster do not fit; nothing was started.
        StoppedError: A signal came; trials that ran saved their state.
    """
    if cfg.algorithm == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError("algorithm: optuna is not installed; pip install glmae-ray[tune]")
    cfg = _settled(cfg)
    search = to_place(cfg.run)
    _check_folder(cfg, search)
    labelled = finetune.check(cfg.example)
    if not labelled.val:
        raise UserError("finetune.val_where: no case with labels is held out to judge trials by")
    print(*finetune.told(cfg.example, labelled), sep="\n")
    publish(search / CONFIG, json.dumps(cfg.model_dump(mode="json"), indent=2) + "\n")
    todo, left = _todo(cfg, search)
    if left:
        _search(cfg, todo, left)
    leave_table(cfg)
    if line := leave_pictures(cfg):
        print(line)
    _tell(cfg, search)


def _settled(cfg: SearchConfig) -> SearchConfig:
    """The same as any folder and later day reads it: whole paths, `base` as it is now."""
    tree = _with_whole_init(cfg.tree)
    places = {name: str(to_place(getattr(cfg, name))) for name in ("store", "run")}
    fields = cfg.model_dump() | places | {"base": None, "finetune": tree}
    if "init" in cfg.search:
        ((kind, values),) = cfg.search["init"].items()
        fields["search"] = cfg.search | {"init": {kind: [_whole(value) for value in values]}}
    return SearchConfig.model_validate(fields)


def _with_whole_init(tree: dict[str, Any]) -> dict[str, Any]:
    for name in ("init", "targets"):
        if isinstance(tree.get(name), str):
            tree = merge(tree, nested(name, _whole(tree[name])))
    return tree


def _whole(location: str) -> str:
    return location if location == "none" else str(to_place(location))


def _check_folder(cfg: SearchConfig, search: Place) -> None:
    before = read_file(search / CONFIG)
    if before is None:
        if names_in(search) - {f"{CONFIG}.unfinished"}:
            raise UserError(f"run: {search} is not the folder of a search; name another")
        return
    known = json.loads(before)
    if "search" not in known:
        raise UserError(f"run: {search} is a run, not a search; name another")
    if lines := refusals(known, cfg.model_dump(mode="json"), search, free=_FREE):
        raise UserError(*lines)


def _todo(cfg: SearchConfig, search: Place) -> tuple[list[Trial], int]:
    """Trials that are known and not over, and how many are left with those not chosen yet.

    Those whose fields do not fit each other are over before they begin.
    """
    known = read_trials(search)
    if cfg.algorithm == "random":
        for number in range(cfg.count):
            trial = Trial(name_of(number), cfg.sample(number))
            if trial.name not in known:
                known[trial.name] = _checked(cfg, search, trial)
    # Of one that has done its steps, a kill may have come before that was written down.
    for name, trial in known.items():
        if trial.state == "running" and figures(run_of(search, name)).is_complete:
            known[name] = replace(trial, state="finished")
            write_trial(search, known[name])
    todo = [trial for trial in known.values() if trial.state == "running"]
    chosen = max(0, cfg.count - len(known))
    return todo, len(todo) + chosen


def _checked(cfg: SearchConfig, search: Place, trial: Trial) -> Trial:
    try:
        cfg.trial(trial.sample, run=cfg.run)
    except UserError as error:
        trial = replace(trial, state="failed", reason="; ".join(error.lines))
        write_trial(search, trial)
        print(told(trial, figures(run_of(search, trial.name))))
    return trial


def _search(cfg: SearchConfig, todo: list[Trial], left: int) -> None:
    example = cfg.example.model_copy(update={"ray": cfg.ray})
    apply_profile(example)
    with ray_session(cfg.ray):
        from glmae_ray.jobs.searching import search

        share = _room(cfg, left)
        try:
            search(cfg, todo, share, after_each=lambda: leave_table(cfg))
        except StoppedError:
            leave_table(cfg)
            raise


def _room(cfg: SearchConfig, left: int) -> Room:
    example, nodes = cfg.example, nodes_alive()
    allotment = allot_here(example, nodes)
    share = room(example, allotment, nodes, most=min(left, cfg.at_a_time or left))
    makers = "" if share.makers is None else f", each with at most {share.makers} makers of views"
    print(f"{left} of {cfg.count} trials to do, {share.trials} at a time{makers}", flush=True)
    return share


def _tell(cfg: SearchConfig, search: Place) -> None:
    found = measured(cfg)
    states = Counter(one.trial.state for one in found)
    print(f"{len(found)} trials: " + ", ".join(f"{n} {state}" for state, n in states.items()))
    best = best_of(found)
    if best is None:
        print(f"run: {search}")
        raise UserError(f"no trial has finished; {search / 'trials.parquet'} has the reasons")
    print(f"best {told(best.trial, best.found)}")
    print(f"best config: {search / BEST}")
    print(f"run: {search}")
