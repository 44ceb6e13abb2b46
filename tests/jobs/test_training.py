"""What the driver says of workers that failed."""

from __future__ import annotations

import pytest
import ray.train

from glmae_ray.jobs.training import _reason

GLOO = "RuntimeError: [/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"


@pytest.mark.parametrize(
    ("failures", "line"),
    [
        ({0: GLOO, 1: "Traceback\nValueError: the culprit"}, "rank 1: ValueError: the culprit"),
        ({1: "b", 0: "a"}, "rank 0: a"),
        ({0: GLOO, 1: GLOO}, f"rank 0: {GLOO}"),
    ],
)
def test_the_rank_that_failed_is_named_and_not_one_that_missed_it(failures, line):
    errors = {rank: RuntimeError(text) for rank, text in failures.items()}
    assert _reason(ray.train.WorkerGroupError("both", errors)) == line
