"""A term of weight 0 costs nothing: no view, no forward and no product, for every ablation."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from glmae_ray.config import PretrainConfig
from glmae_ray.samples import sample_maker
from tests.conftest import tiny_config
from tests.models.test_glmae import build, make_batch
from tests.test_samples import write_store

TERMS = ("rl", "rg", "gg", "gl")
ABLATIONS = [on for count in (1, 2, 3, 4) for on in itertools.combinations(TERMS, count)]
SAMPLES = 2
# Tiny config: (views of a sample, patches, patches that stay) of each kind, and 64 voxels a patch.
VIEWS = {"global": (2, 120, 48), "local": (3, 24, 9)}
VOXELS = 64


def words(on: tuple[str, ...]) -> list[str]:
    return [f"loss.w_{term}=0" for term in TERMS if term not in on]


def seen_by_student(on: tuple[str, ...]) -> list[str]:
    """The kinds whose masked views the terms that are on are about."""
    uses = {"local": {"rl", "gl"}, "global": {"rg", "gg"}}
    return [kind for kind, terms in uses.items() if terms & set(on)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("ablations") / "store", cases=2)


@pytest.mark.parametrize("on", ABLATIONS, ids="+".join)
def test_only_views_that_a_term_needs_are_made_and_they_are_enough(on, store):
    cfg = tiny_config(f"store={store}", *words(on))
    columns = sample_maker(cfg, split="train", kinds=cfg.loss.kinds).make({"number": np.arange(1)})
    needed = set(seen_by_student(on)) | ({"global"} if {"gg", "gl"} & set(on) else set())
    assert {"global", "local"} & set(columns) == needed
    assert {name for name in columns if name.endswith("_seeds")} == {f"{k}_seeds" for k in needed}
    _, module = build(*words(on))
    names = [*needed, *(f"{kind}_seeds" for kind in needed), "window"]
    outputs = module({name: torch.from_numpy(columns[name]) for name in names})
    assert {name for name in outputs if name.startswith("loss_")} == {f"loss_{t}" for t in on}


@pytest.mark.parametrize("on", ABLATIONS, ids="+".join)
def test_only_the_parts_that_a_term_needs_exist_and_run(on):
    """Forwards of each part, by the number of views or CLS tokens in them."""
    cfg, module = build(*words(on))
    ran: dict[str, list[int]] = {}
    for name, part in module.named_children():
        part.register_forward_hook(
            lambda _part, inputs, _out, name=name: ran.setdefault(name, []).append(
                inputs[0].shape[:-1].numel() if "head" in name else inputs[0].shape[0]
            )
        )
    module(make_batch(cfg, SAMPLES))["loss"].backward()
    module.update_teacher(0.9)
    rows = {kind: SAMPLES * count for kind, (count, _, _) in VIEWS.items()}
    taught = bool({"gg", "gl"} & set(on))
    expected = {
        "encoder": [rows[kind] for kind in seen_by_student(on)],
        "decoder": [rows[kind] for kind, term in (("local", "rl"), ("global", "rg")) if term in on],
        "head": [rows[kind] for kind, term in (("global", "gg"), ("local", "gl")) if term in on],
        "teacher_encoder": [rows["global"]] * taught,
        "teacher_head": [rows["global"]] * taught,
    }
    assert {name: sorted(calls) for name, calls in ran.items()} == {
        name: sorted(calls) for name, calls in expected.items() if calls
    }
    assert {name for name, _ in module.named_children()} == set(ran)


@pytest.mark.parametrize("on", ABLATIONS, ids="+".join)
def test_the_products_of_a_step_are_those_of_its_terms_to_the_last_one(on):
    """Multiplications and additions of forward and backward, counted by torch, in closed form."""
    cfg, module = build(*words(on))
    batch = make_batch(cfg, SAMPLES)
    # Of torch's ways to attend this is the one whose products it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = module(batch)["loss"]
        forward = counter.get_total_flops()
        loss.backward()
    student, teacher, embedding = expected_flops(cfg, on)
    assert forward == student + teacher
    # Backward makes two products of each, but none towards the voxels and none in the teacher.
    assert counter.get_total_flops() == 3 * student - embedding + teacher


def expected_flops(cfg: PretrainConfig, on: tuple[str, ...]) -> tuple[int, int, int]:
    """Of the student's forward, the teacher's forward, and the student's patch embedding."""
    model, student, teacher, embedding = cfg.model, 0, 0, 0
    for kind in seen_by_student(on):
        count, patches, kept = VIEWS[kind]
        rows = SAMPLES * count
        embedding += linear(rows * kept, VOXELS, model.width)
        student += blocks(rows, 1 + kept, model.width, model.depth)
        if f"r{kind[0]}" in on:
            student += linear(rows * (1 + kept), model.width, model.decoder_width)
            student += blocks(rows, 1 + patches, model.decoder_width, model.decoder_depth)
            student -= spared(rows, 1 + kept, model.decoder_width)
            student += linear(rows * (patches - kept), model.decoder_width, VOXELS)
        if {"global": "gg", "local": "gl"}[kind] in on:
            student += head(cfg, rows)
    if {"gg", "gl"} & set(on):
        count, patches, _ = VIEWS["global"]
        rows = SAMPLES * count
        teacher += linear(rows * patches, VOXELS, model.width) + head(cfg, rows)
        teacher += blocks(rows, 1 + patches, model.width, model.depth)
        teacher -= spared(rows, patches, model.width)
    return student + embedding, teacher, embedding


def linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def blocks(rows: int, tokens: int, width: int, depth: int) -> int:
    """Four linear layers of 12 width^2 weights, and two products of attention."""
    return depth * (linear(rows * tokens, width, 12 * width) + 4 * rows * tokens**2 * width)


def spared(rows: int, tokens: int, width: int) -> int:
    """What the last block does not do for tokens that nobody asks for: all but qkv."""
    return linear(rows * tokens, width, 9 * width)


def head(cfg: PretrainConfig, rows: int) -> int:
    model = cfg.model
    sides = (model.width, model.head_hidden, model.head_hidden, model.head_bottleneck,
             model.prototypes)  # fmt: skip
    return sum(linear(rows, a, b) for a, b in itertools.pairwise(sides))
