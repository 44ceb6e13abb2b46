"""A run that begins with another's newest checkpoint, and its own hyperparameters.

A run that is continued refuses other hyperparameters; so this is a run of its own, in a folder of
its own. `fork.json` says where it comes from.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from glmae_ray import checkpoint
from glmae_ray.checkpoint import CorruptError
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_loading import build, merge
from glmae_ray.config_search import Tree, nested
from glmae_ray.encoder_out import INIT
from glmae_ray.jobs.run_folder import CASES, CONFIG
from glmae_ray.jobs.store_changes import ENVIRONMENT
from glmae_ray.journal import METRICS, encoded
from glmae_ray.paths import Place, publish, read_file
from glmae_ray.tracking import read_metrics

FORK = "fork.json"  # in the run folder
_KEPT = (ENVIRONMENT, INIT, CASES)
_TRIES = 5


def fork(donor: Callable[[], Place], child: Place, *, changes: Tree) -> None:
    """Begin a run where another stands.

    A kill leaves a folder without `config.json`, which is no run; it can be forked again.

    Args:
        donor: Gives the other run's folder; asked again where what it holds was just replaced.
        child: Its folder.
        changes: What differs from the other, by dotted name.

    Raises:
        CorruptError: The other has no checkpoint that can be read.
    """
    for left in reversed(range(_TRIES)):
        try:
            _fork(donor(), child, changes)
            return
        except CorruptError:
            if not left:
                raise


def _fork(donor: Place, child: Place, changes: Tree) -> None:
    for left in checkpoint.complete(child):
        checkpoint.remove(left.place)
    found = next(iter(checkpoint.complete(donor)), None)
    if found is None:
        raise CorruptError(f"{donor / checkpoint.FOLDER} holds no complete checkpoint")
    checkpoint.copy(found, child)
    for name in _KEPT:
        if (data := read_file(donor / name)) is not None:
            publish(child / name, data)
    publish(child / METRICS, encoded(r for r in read_metrics(donor) if r["step"] <= found.step))
    facts = {"run": str(donor), "step": found.step, "checkpoint": found.place.name}
    publish(child / FORK, json.dumps(facts | {"changes": changes}, indent=1) + "\n")
    publish(child / CONFIG, json.dumps(_config(donor, child, changes), indent=2) + "\n")


def _config(donor: Place, child: Place, changes: Tree) -> Tree:
    tree = json.loads(read_file(donor / CONFIG) or b"{}")
    for name, value in {**changes, "run": str(child)}.items():
        tree = merge(tree, nested(name, value))
    return build(FinetuneConfig, tree).model_dump(mode="json")
