"""What a run's views need, and whether a cluster has it."""

from __future__ import annotations

import pytest

from glmae_ray.budget import budget, cpus_per_maker
from glmae_ray.errors import UserError
from glmae_ray.jobs.allotment import allot
from tests.conftest import tiny_config

# 2 views of 32 x 20 x 12 and 3 of 16 x 12 x 8 voxels, 2 bytes each.
SAMPLE = 2 * (2 * 7680 + 3 * 1536)
GB = 10**9


def node(cpus=4.0, *, gpus=0.0, labels=None, **resources):
    there = {"CPU": cpus, "memory": 16 * GB, "object_store_memory": 4 * GB, **resources}
    return {
        "Alive": True,
        "Labels": labels or {},
        "Resources": there | ({"GPU": gpus} if gpus else {}),
    }


def test_the_needs_follow_from_sizes_batch_and_prefetch():
    cfg = tiny_config("resources.workers=2", "pipeline.prefetch_batches=3", "model.channels=2")
    need = budget(cfg, cpus=5, cpus_per_worker=0.5)
    assert (need.sample, need.batch) == (2 * SAMPLE, 2 * 2 * SAMPLE)
    assert (need.makers, need.maker_cpus, need.trainer_cpus) == (4, 4, 1)
    # Two finished batches a maker, and for each worker three ahead and one in use.
    assert need.object_store == (2 * 4 + 2 * (3 + 1)) * need.batch
    assert need.maker_memory > 4 * (need.batch + need.sample)
    assert "4 makers on 4 CPUs" in need.line()
    bounded = budget(
        cfg.model_copy(update={"pipeline": cfg.pipeline.model_copy(update={"makers": 1})}),
        cpus=5,
        cpus_per_worker=0.5,
    )
    assert bounded.makers == 1


def test_makers_that_wait_for_an_object_store_take_half_a_cpu():
    assert cpus_per_maker(tiny_config("store=/data/ct")) == 1
    assert cpus_per_maker(tiny_config("store=s3://bucket/ct")) == 0.5
    assert cpus_per_maker(tiny_config("store=s3://b/ct", "pipeline.cpus_per_maker=2")) == 2


def test_only_the_views_that_the_loss_uses_are_counted():
    local = tiny_config("loss.w_rg=0", "loss.w_gg=0", "loss.w_gl=0")
    assert budget(local, cpus=4, cpus_per_worker=1).sample == 2 * 3 * 1536


def test_a_cluster_that_fits_is_divided():
    cfg = tiny_config("resources.workers=2")
    allotment = allot(cfg, [node(4)])
    assert (allotment.gpu, allotment.cpus, allotment.budget.makers) == (False, 0.5, 3)
    assert allotment.warnings == ()
    with_gpus = allot(cfg, [node(8, gpus=2)])
    assert (with_gpus.gpu, with_gpus.cpus, with_gpus.budget.makers) == (True, 1.0, 6)


def test_makers_can_have_nodes_of_their_own():
    words = ("resources.workers=2", "pipeline.labels={pool: cpu}")
    cfg = tiny_config(*words)
    nodes = [node(2, gpus=2), node(16, labels={"pool": "cpu"})]
    assert allot(cfg, nodes).budget.makers == 16
    by_resource = tiny_config("resources.workers=2", "pipeline.resources={views: 0.01}")
    assert allot(by_resource, [node(2, gpus=2), node(8, views=1.0)]).budget.makers == 8
    assert allot(by_resource, [node(2, gpus=2), node(8, views=0.03)]).budget.makers == 3


def test_makers_do_not_share_a_cpu_of_two_nodes():
    cfg = tiny_config("resources.workers=1", "pipeline.labels={pool: cpu}")
    nodes = [node(2, gpus=1), *(node(1.5, labels={"pool": "cpu"}) for _ in range(4))]
    assert allot(cfg, nodes).budget.makers == 4


@pytest.mark.parametrize(
    ("words", "nodes", "line"),
    [
        (
            ["resources.workers=2", "resources.cpus_per_worker=1"],
            [node(2)],
            "2 at 1 CPU each and 1 CPU to make their views are 3 CPUs; the cluster has 2",
        ),
        (
            ["pipeline.labels={pool: cpu}"],
            [node(8)],
            "no node has {'pool': 'cpu'} and 1 CPU to make views",
        ),
        (
            ["pipeline.resources={views: 1}"],
            [node(8)],
            "no node has {'views': 1.0} and 1 CPU to make views",
        ),
        (["resources.gpu=true"], [node(8)], "1 need a GPU each; the cluster has 0"),
        (
            ["resources.workers=2", "resources.cpus_per_worker=3"],
            [node(2)] * 5,
            "2 at 3 CPU each, but the nodes, each by itself, have room for 0",
        ),
        (
            ["resources.workers=4"],
            [node(1, gpus=4), node(8)],
            "4 at 1 CPU and a GPU each, but the nodes, each by itself, have room for 1",
        ),
    ],
)
def test_a_cluster_that_could_never_make_views_is_refused_unless_it_grows(words, nodes, line):
    with pytest.raises(UserError) as caught:
        allot(tiny_config(*words), nodes)
    assert line in caught.value.lines[0]
    assert allot(tiny_config(*words, "resources.autoscales=true"), nodes).budget.makers >= 1


def test_too_small_an_object_store_or_memory_is_told():
    cfg = tiny_config("views.local_count=400", "pipeline.prefetch_batches=400", "global_batch=64")
    tight = node(4, object_store_memory=1e6, memory=1e6)
    first, second = allot(cfg, [tight]).warnings
    assert first.startswith("object store: ")
    assert second.startswith("memory: ")


def test_a_probe_gets_a_cpu_where_one_is_left_and_else_shares_them():
    probed = ("resources.workers=2", "probe.every_steps=2")
    cfg = tiny_config(*probed)
    assert allot(cfg, [node(4)]).probe_cpus == 1
    small = allot(cfg, [node(2)])  # 2 workers at half a CPU, and a maker
    assert small.probe_cpus == 0
    assert small.warnings[-1].startswith("probe: no CPU of its own")
    asks = tiny_config(*probed, "probe.cpus=2")
    assert allot(asks, [node(4)]).probe_cpus == 2
    for nodes in ([node(3)], [node(1)] * 8):  # too few, too small
        with pytest.raises(UserError, match=r"probe.cpus: 2, but beside 2 workers"):
            allot(asks, nodes)
    assert allot(tiny_config("resources.workers=2"), [node(2)]).warnings == ()
