"""Consistency, centring and teacher over several steps against plain NumPy; every gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glmae_ray.models.glmae import GLMAE
from tests.conftest import tiny_config
from tests.models.test_glmae import make_batch

Array = NDArray[np.float64]
ENTRIES = 5  # of each weight tensor are moved


def build(*words: str) -> GLMAE:
    cfg = tiny_config(*words)
    torch.manual_seed(0)
    return GLMAE(model=cfg.model, views=cfg.views, loss=cfg.loss).double()


def listen(module: GLMAE) -> dict[str, list[Array]]:
    """What heads answer from now on, one array (views, prototypes) a call."""
    heard: dict[str, list[Array]] = {"head": [], "teacher_head": []}
    for name, calls in heard.items():

        def keep(_part, _inputs, output, calls=calls) -> None:
            calls.append(output.detach().numpy().reshape(-1, output.shape[-1]).copy())

        module.get_submodule(name).register_forward_hook(keep)
    return heard


def cross_entropies(
    teacher: Array, globals_: Array, locals_: Array, *, center: Array, temperature: float
) -> tuple[float, float]:
    """gg and gl of samples whose views lie one after the other, by loops over the sums."""
    count = len(teacher) // 2  # two global and three local views a sample
    p_t = softmax((teacher - center) / temperature).reshape(count, 2, -1)
    p_g = softmax(globals_ / 0.1).reshape(count, 2, -1)
    p_l = softmax(locals_ / 0.1).reshape(count, 3, -1)

    def h(a: Array, b: Array) -> float:
        return -sum(x * np.log(y) for x, y in zip(a, b, strict=True))

    gg = [h(p_t[b, i], p_g[b, i]) for b in range(count) for i in range(2)]
    gl = [h(p_t[b, i], p_l[b, j]) for b in range(count) for i in range(2) for j in range(3)]
    return float(np.mean(gg)), float(np.mean(gl))


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("samples", "channels"), [(1, 2), (3, 1)])
def test_three_steps_of_consistency_centre_and_teacher_equal_plain_numpy(samples, channels):
    """Each step divided into two forwards; the student moves between steps as training would."""
    words = (f"model.channels={channels}", "loss.w_rl=0", "loss.w_rg=0")
    cfg, module = tiny_config(*words), build(*words)
    heard = listen(module)
    followed, student = module.teacher_and_student()
    teacher = [p.numpy().copy() for p in followed]
    center: Array | None = None
    for step, (momentum, temperature) in enumerate([(0.9, 0.04), (0.99, 0.05), (1.0, 0.07)]):
        said: list[Array] = []
        for part in range(2):
            batch = make_batch(cfg, samples)
            batch = {k: v.roll(part, dims=1) if "seeds" in k else v for k, v in batch.items()}
            outputs = module(batch, teacher_temperature=temperature)
            by_rows = {len(logits): logits for logits in heard["head"]}
            (answered,) = heard["teacher_head"]
            gg, gl = cross_entropies(
                answered,
                by_rows[2 * samples],
                by_rows[3 * samples],
                center=np.zeros(32) if center is None else center,
                temperature=temperature,
            )
            assert outputs["loss_gg"].item() == pytest.approx(gg, rel=1e-10)
            assert outputs["loss_gl"].item() == pytest.approx(gl, rel=1e-10)
            said.append(answered)
            for calls in heard.values():
                calls.clear()
        with torch.no_grad():
            for number, parameter in enumerate(student):
                parameter += 0.01 * np.cos(step + number)
        module.update_teacher(momentum)
        mean = np.concatenate(said).mean(axis=0)
        center = mean if center is None else 0.9 * center + 0.1 * mean
        np.testing.assert_allclose(module.center.numpy(), center, rtol=0, atol=1e-12)
        teacher = [
            momentum * old + (1 - momentum) * new.detach().numpy()
            for old, new in zip(teacher, student, strict=True)
        ]
        for expected, parameter in zip(teacher, followed, strict=True):
            np.testing.assert_allclose(parameter.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("samples", "channels"), [(1, 2), (2, 1)])
def test_the_gradient_of_every_weight_equals_finite_differences(samples, channels):
    """Central differences in float64, in a random direction along a few entries of each tensor."""
    sizes = ("views.global_size=[16,12,8]", "views.local_size=[8,12,4]", "views.local_count=2")
    words = (f"model.channels={channels}", "model.depth=1", *sizes)
    cfg, module = tiny_config(*words), build(*words)
    batch = make_batch(cfg, samples)
    generator = torch.Generator().manual_seed(0)
    module(batch)["loss"].backward()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(trainable) > 40
    for name, parameter in trainable.items():
        entries = torch.randperm(parameter.numel(), generator=generator)[:ENTRIES]
        along = torch.zeros(parameter.numel(), dtype=torch.float64)
        along[entries] = torch.randn(len(entries), generator=generator, dtype=torch.float64)
        assert parameter.grad is not None, name
        exact = (parameter.grad.view(-1) @ along).item()
        numeric = slope(module, batch, parameter, along.view_as(parameter))
        assert numeric == pytest.approx(exact, rel=1e-4, abs=1e-8), name


@torch.no_grad()
def slope(
    module: GLMAE, batch: dict[str, torch.Tensor], parameter: torch.Tensor, along: torch.Tensor
) -> float:
    """Change of the loss per unit along a direction of one weight tensor."""
    step, before = 1e-5, parameter.clone()
    parameter.copy_(before + step * along)
    above = module(batch)["loss"].item()
    parameter.copy_(before - step * along)
    below = module(batch)["loss"].item()
    parameter.copy_(before)
    return (above - below) / (2 * step)
