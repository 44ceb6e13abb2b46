"""What is told of batches: cases that others stand in for, waits and their reason."""

from __future__ import annotations

import time

import numpy as np
import pytest

from glmae_ray.samples import sample_maker
from glmae_ray.store.index import VolumeIndex
from glmae_ray.watch import Event, Watch, starving_stage
from tests.conftest import tiny_config
from tests.store.test_index import record

PLENTY = {
    "CPU": 3.0,
    "total_CPU": 8.0,
    "object_store_memory": 5e9,
    "total_object_store_memory": 8e9,
}


def watch(tmp_path, events: list[Event], *words: str, free=PLENTY) -> Watch:
    VolumeIndex.from_records([record("a"), record("b")]).write(tmp_path)
    cfg = tiny_config(f"store={tmp_path}", *words)
    maker = sample_maker(cfg, split="train", kinds=("local",))
    return Watch(maker, pipeline=cfg.pipeline, tell=events.append, free=lambda: free)


def columns(numbers, *, faults=None, made_s=(1.0, 0.5)):
    texts = [(faults or {}).get(number, "").encode().ljust(320, b"\0") for number in numbers]
    return {
        "number": np.array(numbers),
        "case": np.ones(len(numbers), np.int64),
        "fault": np.array([np.frombuffer(text, np.uint8) for text in texts]),
        "made_s": np.array([[*made_s, time.time()]] * len(numbers)),
    }


def test_each_stand_in_is_told_with_its_reason_and_many_of_them_once(tmp_path):
    events: list[Event] = []
    looks = watch(tmp_path, events, "pipeline.skip_warning=0.25")
    looks.take(columns([0, 1, 2, 3]), waited_s=0)
    assert events == []
    looks.take(columns([4, 5], faults={5: "case a: is damaged"}), waited_s=0)
    (event,) = events
    assert event.line == "sample 5: case a: is damaged; b stands in"
    assert event.facts == {"sample": 5, "stand_in": "b", "fault": "case a: is damaged"}
    looks.take(columns([6, 7], faults={6: "case a: é", 7: "case a: x"}), waited_s=0)
    assert [e.kind for e in events] == ["stand_in", "stand_in", "stand_in", "many_stand_ins"]
    assert "3 of 8 samples (37.5%)" in events[-1].line
    assert events[-1].line.endswith("the last: case a: x")
    looks.take(columns([8], faults={8: "case a: x"}), waited_s=0)
    assert [e.kind for e in events].count("many_stand_ins") == 1
    assert (looks.samples, looks.stand_ins) == (9, 4)
    looks.take(columns(range(9, 40), faults=dict.fromkeys(range(9, 40), "case a: x")), waited_s=0)
    assert [e.kind for e in events].count("many_stand_ins") == 2  # twice the share that was told


def test_one_stand_in_among_few_samples_is_not_many(tmp_path):
    events: list[Event] = []
    looks = watch(tmp_path, events)
    looks.take(columns([0], faults={0: "case a: x"}), waited_s=0)
    assert [e.kind for e in events] == ["stand_in"]


@pytest.mark.parametrize(
    ("made_s", "stage"),
    [
        ((30.0, 2.0, 999.0), "the store: reading took 30.0 s"),
        ((2.0, 30.0, 999.0), "its views: resizing took 30.0 s"),
        ((0.3, 0.2, 999.0), "a free CPU: making it took 0.5 s"),
        ((9.0, 9.0, 960.0), "its way from the node that made it 40 s ago"),
    ],
)
def test_a_late_batch_names_the_stage_that_it_waited_for(made_s, stage):
    assert starving_stage(np.array([made_s]), waited_s=40.0, now=1000.0) == stage


def test_a_wait_beyond_the_bound_is_told_while_it_lasts_and_explained_when_it_ends(tmp_path):
    events: list[Event] = []
    looks = watch(tmp_path, events, "pipeline.patience_s=0.05")
    with looks.waiting():
        pass
    with looks.waiting():
        time.sleep(0.2)
    looks.take(columns([0], made_s=(0.15, 0.01)), waited_s=0.2)
    assert [e.kind for e in events] == ["slow_batch", "slow_batch"]
    assert "the store may be slow (free: 3 of 8 CPUs, 5.0 of 8.0 GB" in events[0].line
    assert "it waited for the store" in events[1].line


@pytest.mark.parametrize(
    ("free", "words"),
    [
        ({"CPU": 0.0}, "no CPU is free"),
        ({"object_store_memory": 1e6}, "the object store is full"),
    ],
)
def test_what_is_exhausted_is_suspected(tmp_path, free, words):
    events: list[Event] = []
    looks = watch(tmp_path, events, "pipeline.patience_s=0.01", free=PLENTY | free)
    with looks.waiting():
        time.sleep(0.1)
    assert words in events[0].line
