"""Collapse is told in words: which states, after how long, how often, and with what advice."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmae_ray.health import PATIENCE, Health
from glmae_ray.models.glmae import GLMAE
from glmae_ray.tracking import read_events, write_event
from glmae_ray.watch import Event
from tests.conftest import tiny_config
from tests.models.test_glmae import make_batch

LN_K = math.log(32)  # prototypes of the tiny config
HEALTHY: dict[str, float] = {
    "loss": 5.0, "loss_rl": 1.0, "loss_rg": 1.0, "loss_gg": 1.5, "loss_gl": 1.5,
    "teacher_entropy": 0.5 * LN_K, "kl_gg": 0.3, "kl_gl": 0.4,
    "cls_std_global": 0.1, "cls_std_local": 0.2,
}  # fmt: skip
ILL = {
    "loss_not_finite": {"loss": math.nan, "loss_gl": math.inf},
    "collapsed_to_uniform": {"teacher_entropy": 0.999 * LN_K, "kl_gg": 0.001, "kl_gl": 0.002},
    "collapsed_to_one_answer": {"teacher_entropy": 0.001},
    "collapsed_features": {"cls_std_global": 1e-5},
}


def told(records: list[dict[str, Any]], *words: str) -> list[Event]:
    """Events of a run that logs these records every ten steps."""
    health = Health(tiny_config(*words))
    return [
        event
        for number, record in enumerate(records, start=1)
        for event in health.judge({"step": 10 * number, **HEALTHY, **record})
    ]


@pytest.mark.parametrize("kind", ILL)
def test_a_collapse_is_told_once_after_three_logged_steps(kind):
    events = told([{}, *[ILL[kind]] * 9])
    assert [(event.kind, event.facts["step"]) for event in events] == [(kind, 40)]


@pytest.mark.parametrize("kind", ILL)
def test_a_blip_says_nothing(kind):
    assert told([ILL[kind], ILL[kind], {}] * 4) == []


@pytest.mark.parametrize("kind", ILL)
def test_it_is_told_again_only_after_it_was_over_for_as_long(kind):
    ill = [ILL[kind]] * 3
    assert len(told([*ill, {}, {}, *ill, *ill])) == 1
    assert [e.facts["step"] for e in told([*ill, {}, {}, {}, *ill])] == [30, 90]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("loss_not_finite", ["loss and loss_gl", "before step 30", "a lower optim.base_lr"]),
        (
            "collapsed_to_uniform",
            ["3.462 of at most 3.466 (ln 32)", "0.0020", "a lower loss.teacher_temperature (0.04 to"
             " 0.07 now)", "a higher loss.center_momentum", "loss.w_gg 1 and loss.w_gl 1"],
        ),
        (
            "collapsed_to_one_answer",
            ["0.0010 of at most 3.466", "a higher loss.teacher_temperature",
             "a lower loss.center_momentum"],
        ),
        ("collapsed_features", ["of global views", "1e-05", "a lower optim.base_lr"]),
    ],
)  # fmt: skip
def test_a_line_has_the_value_what_it_means_and_what_to_try(kind, words):
    (event,) = told([ILL[kind]] * 3)
    assert event.line.startswith("step 30: ")
    assert "try" in event.line or "resume" in event.line
    assert "\n" not in event.line
    for word in words:
        assert word in event.line


def test_an_event_reaches_the_file_that_the_terminal_follows(tmp_path):
    (event,) = told([ILL["collapsed_to_uniform"]] * 3)
    write_event(tmp_path, event, rank=0)
    (record,) = read_events(tmp_path)
    assert record["event"] == "collapsed_to_uniform"
    assert record["line"] == event.line
    assert record["kl"] == 0.002


# As a run has them: ten logged losses that wobble by a tenth or two.
CALM = [{"loss": 5 + wobble} for wobble in (0.1, -0.2, 0.0, 0.2, -0.1) * 2]


def test_a_loss_far_above_the_last_ones_is_told_at_once_and_once_until_it_is_over():
    spike, calm = {"loss": 7.0}, {"loss": 5.0}
    events = told([*CALM, spike, spike, calm, spike, calm, calm, calm, spike])
    assert [(e.kind, e.facts["step"]) for e in events] == [("loss_spike", 110), ("loss_spike", 180)]
    line = events[0].line
    assert line.startswith("step 110: loss 7 is a spike: the last 10 logged ones had the median 5,")
    assert "try a lower optim.base_lr" in line
    facts = {"step": 110, "loss": 7.0, "median": 5.0, "limit": 6.0}
    assert events[0].facts == pytest.approx(facts)


@pytest.mark.parametrize(
    "records",
    [
        [*CALM[:9], {"loss": 50.0}],  # too little is known
        [*CALM, {"loss": 5.9}],  # within ten deviations
        [{"loss": 5.0}] * 10 + [{"loss": 5.4}],  # of a loss that does not move: below a tenth
        [*CALM, {"loss": math.nan}, {"loss": math.inf}],  # told otherwise
        [{"loss": 9.0 - 0.1 * step} for step in range(40)],
    ],
)
def test_what_is_no_spike(records):
    assert told(records) == []


def test_a_loss_that_stays_high_is_told_once_and_is_then_the_usual_one():
    assert [e.facts["step"] for e in told([*CALM, *[{"loss": 7.0}] * 40])] == [110]


def test_losses_that_are_no_numbers_do_not_move_the_median():
    assert len(told([*CALM, {"loss": math.nan}, {"loss": math.inf}, {"loss": 7.0}])) == 1


def test_a_uniform_teacher_that_the_student_does_not_yet_copy_is_no_collapse():
    assert told([{"teacher_entropy": LN_K, "kl_gg": 0.001, "kl_gl": 2.1}] * 5) == []


def test_features_count_only_where_a_consistency_term_uses_them():
    assert told([{"cls_std_local": 0.0}] * 5, "loss.w_gg=0", "loss.w_gl=0") == []


def test_a_single_view_in_a_forward_has_no_deviation_and_no_warning():
    one = ("engine.micro_batch=1", "views.global_count=1")
    assert told([{"cls_std_global": 0.0}] * 5, *one) == []
    assert [e.kind for e in told([{"cls_std_local": 0.0}] * 5, *one)] == ["collapsed_features"]


def test_the_runs_of_the_log_are_judged_as_it_describes_them():
    """The six rows of docs/log.md, "The consistency terms collapse in short runs"."""
    rows = [(6.238, 0.0), (6.237, 0.001), (6.220, 0.024), (5.7, 0.36), (4.3, 0.65), (5.2, 0.36)]
    kinds = [
        [
            e.kind
            for e in told(
                [{"teacher_entropy": h, "kl_gg": kl, "kl_gl": kl}] * 3, "model.prototypes=512"
            )
        ]
        for h, kl in rows
    ]
    assert kinds == [["collapsed_to_uniform"]] * 3 + [[]] * 3


figures = st.fixed_dictionaries(
    {},
    optional={name: st.floats(width=32) for name in HEALTHY},
)


@given(st.lists(figures, max_size=30))
def test_any_record_is_judged_and_no_kind_is_told_more_often_than_it_can_recover(records):
    health = Health(tiny_config())
    steps: dict[str, list[int]] = {}
    for step, record in enumerate(records):
        for event in health.judge({"step": step, **record}):
            steps.setdefault(event.kind, []).append(step)
            assert event.line
    for kind, told_at in steps.items():
        patience = 1 if kind == "loss_spike" else PATIENCE
        assert told_at[0] >= patience - 1
        assert all(b - a >= PATIENCE + patience for a, b in itertools.pairwise(told_at))


@given(
    st.lists(st.sampled_from([{}, *ILL.values()]), max_size=40),
    st.lists(st.sampled_from([{}, *ILL.values()]), max_size=40),
)
def test_events_depend_on_the_past_only(first, then):
    assert told(first) == told([*first, *then])[: len(told(first))]


@given(
    st.floats(0.02, 0.98), st.floats(0.002, 10), st.lists(st.floats(0, 20), min_size=4, max_size=4)
)
def test_a_healthy_run_hears_nothing(share, deviation, terms):
    record = dict(zip(("loss_rl", "loss_rg", "loss_gg", "loss_gl"), terms, strict=True))
    deviations = {"cls_std_global": deviation, "cls_std_local": deviation}
    assert told([{"teacher_entropy": share * LN_K, **record, **deviations}] * 6) == []


def collapsed(module: GLMAE, *, one_answer: bool) -> None:
    """Make both heads answer every view alike: by nothing, or by one prototype."""
    with torch.no_grad():
        for head in (module.head, module.teacher_head):
            last = head.mlp[-1]
            last.weight.zero_()
            last.bias.fill_(1.0)
            head.prototypes.weight.fill_(1.0)
            if one_answer:
                head.prototypes.weight[1:].neg_()


@pytest.mark.parametrize(
    ("one_answer", "kind"), [(False, "collapsed_to_uniform"), (True, "collapsed_to_one_answer")]
)
def test_a_real_objective_with_a_collapsed_head_is_noticed(one_answer, kind):
    cfg = tiny_config()
    torch.manual_seed(0)
    module, health = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss), Health(cfg)

    def hear() -> list[str]:
        kinds = []
        for step in range(PATIENCE):
            outputs = module(make_batch(cfg), teacher_temperature=0.04)
            record = {name: value.item() for name, value in outputs.items()}
            kinds += [event.kind for event in health.judge({"step": step, **record})]
        return kinds

    assert hear() == []
    collapsed(module, one_answer=one_answer)
    assert hear() == [kind]


def test_a_real_encoder_that_gives_all_views_one_feature_is_noticed():
    cfg = tiny_config()
    torch.manual_seed(0)
    module, health = GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss), Health(cfg)
    with torch.no_grad():
        module.encoder.norm.weight.zero_()
    outputs = module(make_batch(cfg))
    record = {name: value.item() for name, value in outputs.items()}
    kinds = [e.kind for step in range(PATIENCE) for e in health.judge({"step": step, **record})]
    assert kinds == ["collapsed_features"]
