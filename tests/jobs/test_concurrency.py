"""How many trials fit beside each other: every one with its workers and a maker of views."""

from __future__ import annotations

import pytest

from glmae_ray.jobs.allotment import allot
from glmae_ray.jobs.concurrency import room
from tests.models.finetunes import finetune_config
from tests.test_budget import node


@pytest.mark.parametrize(
    ("words", "nodes", "trials", "makers"),
    [
        ((), [node(2)], 1, None),  # 2 x 0.5 + 2 x 1 CPUs are more than there are
        (("pipeline.cpus_per_maker=0.5",), [node(2)], 2, 1),
        (("resources.workers=2",), [node(2)], 1, None),
        (("resources.workers=2",), [node(16)], 5, 2),  # as many as wanted
        (("resources.workers=2",), [node(8)], 4, 1),
        (("resources.workers=2", "pipeline.makers=1"), [node(16)], 5, 1),
        (("resources.workers=2",), [node(8, gpus=4)], 2, 2),
        (("resources.workers=2",), [node(2), node(2)], 2, 1),
        # Two nodes of 1.5 CPUs hold a maker each, and one worker each beside it.
        (("resources.workers=2",), [node(1.5), node(1.5)], 1, None),
        (("pipeline.resources={views: 1}",), [node(4), node(1, views=1)], 1, None),
        (("pipeline.labels={disk: fast}",), [node(4), node(2, labels={"disk": "fast"})], 2, 2),
    ],
)
def test_trials_fit_beside_each_other(words, nodes, trials, makers):
    cfg = finetune_config(*words)
    found = room(cfg, allot(cfg, nodes), nodes, most=5)
    assert found == (trials, makers)


def test_what_trials_take_at_a_time_is_there():
    for cpus in range(2, 40):
        for workers in (1, 2):
            cfg = finetune_config(f"resources.workers={workers}")
            nodes = [node(cpus)]
            allotment = allot(cfg, nodes)
            found = room(cfg, allotment, nodes, most=100)
            makers = found.makers or 1
            assert found.trials * (workers * allotment.cpus + makers) <= cpus
