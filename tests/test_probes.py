"""Probes of planted and of empty representations: what is there is found, what is not is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glmae_ray.probes import Scale, TokenProbe, Tokens, knn, logistic

CLASSES = torch.arange(60) % 3


def features(*, planted: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled features (60, 8) to fit on and others, about a centre a class, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    centres = planted * torch.randn(3, 8, generator=generator)
    fit, val = (50 + centres[CLASSES] + torch.randn(60, 8, generator=generator) for _ in range(2))
    scale = Scale.of(fit)
    return scale(fit), scale(val)


def accuracies(*, planted: float) -> list[float]:
    fit, val = features(planted=planted)
    said = knn(fit, CLASSES, val, neighbours=20), logistic(fit, CLASSES, val)
    return [float((answer == CLASSES).float().mean()) for answer in said]


def test_classes_that_are_apart_are_told_apart_by_both():
    assert accuracies(planted=8.0) == [1.0, 1.0]


def test_features_that_know_nothing_are_at_chance():
    for accuracy in accuracies(planted=0.0):
        assert accuracy == pytest.approx(1 / 3, abs=0.2)


def test_the_neighbours_that_vote_are_the_nearest_by_their_angle():
    fit = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [0.1, 7.0], [-1.0, 0.0]])
    classes = torch.tensor([0, 0, 1, 1, 2])
    val = torch.tensor([[0.2, 0.0], [0.0, 30.0], [-5.0, -0.1]])
    for neighbours in (1, 2, 20):
        assert knn(fit, classes, val, neighbours=neighbours).tolist() == [0, 1, 2]


def test_the_logistic_regression_is_where_its_gradient_is_nothing():
    fit, _ = features(planted=1.0)
    torch.manual_seed(1)
    weight = torch.zeros(8, 3, requires_grad=True)
    bias = torch.zeros(3, requires_grad=True)
    descent = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:  # as stated
        descent.zero_grad()
        entropy = torch.nn.functional.cross_entropy(fit @ weight + bias, CLASSES, reduction="sum")
        whole = entropy + weight.square().sum() / 2
        whole.backward()
        return whole

    descent.step(loss)
    _, val = features(planted=1.0)
    assert torch.equal(logistic(fit, CLASSES, val), (val @ weight + bias).argmax(1))


def cases(
    *, planted: bool, count: int = 6, known: tuple[bool, bool] = (True, True)
) -> list[Tokens]:
    """Tokens whose patches hold structure 1, structure 2 or nothing, each a block of voxels."""
    rng, found = np.random.default_rng(count), []
    for _ in range(count):
        kind = rng.integers(0, 12, 200)  # two in twelve have something
        label = np.zeros((200, 8), np.uint8)
        label[kind == 1, :3] = 1
        label[kind == 2, 4:] = 2
        feature = rng.normal(size=(200, 6)).astype(np.float32)
        if planted:
            feature[:, 0] += 9 * (kind == 1)
            feature[:, 1] += 9 * (kind == 2)
        found.append(Tokens(*map(torch.from_numpy, (feature, label)), torch.tensor(known)))
    return found


def test_structures_that_tokens_tell_are_found_with_their_shape():
    dice = TokenProbe(cases(planted=True)).dice(cases(planted=True, count=4))
    assert dice == pytest.approx({1: 1.0, 2: 1.0}, abs=0.05)


def test_tokens_that_tell_nothing_find_what_marking_everything_would():
    share = (1 / 12) * 3 / 8, (1 / 12) * 4 / 8  # of all voxels
    dice = TokenProbe(cases(planted=False)).dice(cases(planted=False, count=4))
    for number, part in enumerate(share, start=1):
        # What the constant alone knows: which voxels of a patch a structure has, when there is one.
        everywhere = 2 * (1 / 12) / (1 + 1 / 12)
        assert part < dice[number] < everywhere + 0.1


def test_a_case_in_which_a_structure_is_not_known_counts_neither_way():
    whole, later = cases(planted=True), cases(planted=True, count=4)
    expected = TokenProbe(whole).dice(later)
    hidden = [  # nobody looked for structure 2: its voxels are background here
        case._replace(
            label_NP=case.label_NP * (case.label_NP != 2), known_K=torch.tensor([True, False])
        )
        for case in cases(planted=True, count=5)
    ]
    found = TokenProbe([*whole, *hidden]).dice([*later, *hidden])
    assert found[2] == pytest.approx(expected[2], abs=0.02)
    wrong = [case._replace(known_K=torch.tensor([True, True])) for case in hidden]
    assert TokenProbe([*whole, *wrong]).dice([*later, *wrong])[2] < expected[2] - 0.2


def test_a_structure_that_nothing_to_fit_on_shows_has_no_figure():
    whole = cases(planted=True)
    fit = [case._replace(label_NP=case.label_NP * (case.label_NP == 1)) for case in whole]
    assert TokenProbe(fit).dice(cases(planted=True, count=4)).keys() == {1}
