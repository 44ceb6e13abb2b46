"""The nine traps of docs/method.md in its order, each by what happens to whoever falls into it."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from torch import Tensor

from glmae_ray import losses
from glmae_ray.config import PretrainConfig
from glmae_ray.errors import UserError
from glmae_ray.health import PATIENCE, Health
from glmae_ray.loop import held_out_reconstruction
from glmae_ray.models.decoder import Decoder
from glmae_ray.models.glmae import GLMAE
from glmae_ray.models.masking import draw_masks
from glmae_ray.models.vit3d import Encoder, gather_tokens, patchify
from glmae_ray.tracking import RunLog, summarise
from tests.conftest import tiny_config
from tests.models.test_glmae import build, make_batch

ONLY_MAE = ("loss.w_gg=0", "loss.w_gl=0")
ONLY_LOCAL = (*ONLY_MAE, "loss.w_rg=0")


# 1. An encoder built from scratch without positions.

GRIDS = [(10, 10, 10), (6, 6, 6), (6, 4, 3)]  # of base's global and local views, and unequal


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(channels=1, patch=(2, 1, 2), width=24, depth=2, heads=2)


@pytest.mark.parametrize("grid", GRIDS)
def test_an_encoder_from_scratch_knows_where_each_patch_is(grid):
    """The authors' file leaves the table at zero: their baseline "from scratch" has no places."""
    table = encoder().positions(grid)[1:]
    assert table.shape == (math.prod(grid), 24)
    assert table.norm(dim=1).min() > 1
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1


@pytest.mark.parametrize("grid", GRIDS)
def test_places_change_the_features_from_the_first_step_and_zero_places_would_not(grid):
    """CLS of a shuffled view is another one; with a table of zeros it is the same."""
    patches = torch.rand(1, math.prod(grid), 4, generator=torch.Generator().manual_seed(1))
    shuffled = patches.flip(1)
    ours, blind = encoder(), encoder()
    blind.adopt_positions(torch.zeros(1 + math.prod(grid), 24), grid=grid)
    moved, unmoved = (
        (part(shuffled, grid=grid)[:, 0] - part(patches, grid=grid)[:, 0]).abs().max().item()
        for part in (ours, blind)
    )
    assert moved > 1e-3
    assert unmoved < 1e-5


def test_patches_of_one_content_differ_by_their_place():
    """Nothing else could tell them apart, so that a decoder would paint one patch everywhere."""
    features = encoder()(torch.ones(1, 72, 4), grid=(6, 4, 3))[0, 1:]
    assert torch.cdist(features, features).fill_diagonal_(1).min() > 1e-3


# 2. The pair of one index, which DINO's loss skips.


def test_global_to_global_holds_the_pairs_of_one_index_and_no_other():
    """Here the student's view is the masked copy of the crop that the teacher of that index sees.

    The answer to each teacher view is certain, so every pair costs another amount.
    """
    logits = np.random.default_rng(0).normal(size=(3, 2, 5))
    log_student = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    taught = np.zeros((3, 2, 5))
    for b, i in np.ndindex(3, 2):
        taught[b, i, (2 * b + 3 * i) % 5] = 1
    own = -np.mean([log_student[b, i, (2 * b + 3 * i) % 5] for b, i in np.ndindex(3, 2)])
    skipping = -np.mean([log_student[b, 1 - i, (2 * b + 3 * i) % 5] for b, i in np.ndindex(3, 2)])
    actual = losses.same_view_cross_entropy(torch.tensor(taught), torch.tensor(log_student)).item()
    assert actual == pytest.approx(own, rel=1e-12)
    assert abs(own - skipping) > 0.1


def test_one_global_view_is_enough_for_the_term_that_dino_would_find_empty():
    """Without pairs of one index a single global view would leave nothing to average."""
    cfg, module = build("views.global_count=1", "loss.w_gl=0", "loss.w_rl=0", "loss.w_rg=0")
    module = module.double()
    heard: dict[str, np.ndarray] = {}
    for name in ("head", "teacher_head"):
        module.get_submodule(name).register_forward_hook(
            lambda _part, _in, out, name=name: heard.update({name: out.detach().numpy()})
        )
    actual = module(make_batch(cfg), teacher_temperature=0.05)["loss_gg"].item()
    teacher, student = heard["teacher_head"].reshape(3, 32), heard["head"].reshape(3, 32)
    p = np.exp(teacher / 0.05)
    p /= p.sum(-1, keepdims=True)
    q = np.exp(student / 0.1)
    q /= q.sum(-1, keepdims=True)
    assert actual == pytest.approx(-(p * np.log(q)).sum(-1).mean(), rel=1e-10)


# 3. Cubes hide mistakes of axis order.

UNEQUAL = ("model.patch=16", "views.global_size=[96,64,48]", "views.local_size=[48,32,64]",
           "views.global_count=1", "views.local_count=2")  # fmt: skip


def test_the_whole_objective_trains_on_views_of_unequal_sides():
    """96 x 64 x 48 voxels, a grid of 6 x 4 x 3; no two sides that could be exchanged unseen."""
    cfg, module = build(*UNEQUAL)
    outputs = module(make_batch(cfg, 1))
    outputs["loss"].backward()
    assert {f"loss_{name}" for name in ("rl", "rg", "gg", "gl")} <= set(outputs)
    assert all(value.isfinite() for value in outputs.values())
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_patch_n_is_the_cube_at_its_place_of_the_grid():
    """Z slowest, X fastest, as NumPy counts."""
    volume = torch.rand(1, 2, 96, 64, 48, generator=torch.Generator().manual_seed(0))
    patches = patchify(volume, (16, 16, 16))
    for number, (z, y, x) in enumerate(itertools.product(range(6), range(4), range(3))):
        cube = volume[0, :, 16 * z :, 16 * y :, 16 * x :][:, :16, :16, :16]
        assert torch.equal(patches[0, number], cube.flatten())


@pytest.mark.parametrize("axes", [(3, 2, 4), (2, 4, 3), (4, 3, 2)])
def test_swapped_axes_are_another_view(axes):
    """Voxels with two axes exchanged have other features, also where the grid is a cube."""
    volume = torch.rand(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    part = Encoder(channels=1, patch=(2, 2, 2), width=24, depth=2, heads=2)
    as_is, swapped = (
        part(patchify(v, (2, 2, 2)), grid=(4, 4, 4))[:, 0]
        for v in (volume, volume.permute(0, 1, *axes))
    )
    assert (as_is - swapped).abs().max() > 1e-3


def test_pictures_land_in_place_on_unequal_sides():
    """Every patch has a grey of its own; predicting means gives back the very volume."""
    cfg, module = build(*UNEQUAL, *ONLY_MAE)
    greys = torch.arange(72).reshape(6, 4, 3) * 20 - 720
    volume = greys.repeat_interleave(16, 0).repeat_interleave(16, 1).repeat_interleave(16, 2)
    batch = make_batch(cfg, 1) | {"global": volume.short().expand(1, 1, 1, 96, 64, 48)}
    with torch.no_grad():
        for parameter in module.decoder.predict.parameters():
            parameter.zero_()
        picture = module(batch, task="picture")["global"]
    expected = (volume.float() + 1000) / 2000
    torch.testing.assert_close(picture.original[0, 0, 0], expected)
    torch.testing.assert_close(picture.reconstructed[0, 0, 0], expected)
    hidden = picture.masked[0, 0, 0].isnan()
    whole = hidden.reshape(6, 16, 4, 16, 3, 16).float().mean(dim=(1, 3, 5))
    _, numbers = draw_masks(batch["global_seeds"].flatten(), tokens=72, ratio=0.6)
    assert torch.equal(whole.flatten().nonzero().flatten(), numbers[0])
    assert set(whole.flatten().tolist()) == {0.0, 1.0}


# 4. Collapse.

MANY = "model.prototypes=4096"


def records(module: GLMAE, cfg: PretrainConfig, **options: float) -> list[dict[str, float]]:
    outputs = module(make_batch(cfg), **options)
    values = {name: value.item() for name, value in outputs.items()}
    return [{"step": 10 * n, **values} for n in range(1, PATIENCE + 1)]


def warnings(cfg: PretrainConfig, logged: list[dict[str, float]]) -> list[str]:
    health = Health(cfg)
    return [event.line for record in logged for event in health.judge(record)]


def test_a_consistency_term_stuck_at_ln_k_is_told():
    """ln 4096 = 8.318: every answer is every prototype."""
    cfg, module = build(MANY, "loss.student_temperature=1e4")
    logged = records(module, cfg, teacher_temperature=1e4)
    assert logged[0]["teacher_entropy"] == pytest.approx(8.318, abs=1e-3)
    assert logged[0]["loss_gg"] == pytest.approx(8.318, abs=1e-3)
    assert logged[0]["kl_gl"] == pytest.approx(0, abs=1e-4)
    (line,) = warnings(cfg, logged)
    assert "8.318 of at most 8.318 (ln 4096)" in line


def test_a_teacher_without_entropy_is_told():
    """Entropy 0: every answer is one prototype."""
    cfg, module = build(MANY)
    logged = records(module, cfg, teacher_temperature=1e-5)
    assert logged[0]["teacher_entropy"] == pytest.approx(0, abs=0.05)
    (line,) = warnings(cfg, logged)
    assert "collapsed to one answer" in line


def test_an_untrained_objective_is_not_taken_for_a_collapsed_one():
    """At the default temperatures (docs/method.md), before and after the centre has started."""
    cfg, module = build(MANY)
    before = records(module, cfg, teacher_temperature=0.04)
    assert {"teacher_entropy", "kl_gg", "kl_gl", "cls_std_global", "cls_std_local"} <= set(
        before[0]
    )
    module.update_teacher(0.996)
    assert warnings(cfg, before + records(module, cfg, teacher_temperature=0.04)) == []


# 5. Terms start at different sizes.


def test_each_term_is_logged_as_it_is_and_as_it_counts():
    """ln K against about 1: who sees but the sum cannot tell which term moves it."""
    weights = {"rl": 2.0, "rg": 3.0, "gg": 0.5, "gl": 0.25}
    cfg, module = build(MANY, *(f"loss.w_{name}={weight}" for name, weight in weights.items()))
    outputs = module(make_batch(cfg), teacher_temperature=0.07)
    for name, weight in weights.items():
        raw, weighted = outputs[f"loss_{name}"], outputs[f"weighted_{name}"]
        assert weighted.item() == pytest.approx(weight * raw.item(), rel=1e-6)
        assert not raw.requires_grad
    assert 0.5 < outputs["loss_rl"].item() < 2
    assert math.log(4096) / 2 < outputs["loss_gg"].item() < 2 * math.log(4096)


# 6. Pictures of normalised targets.


@pytest.mark.parametrize("channels", [1, 2])
def test_a_decoder_that_is_always_right_paints_the_original(channels):
    """Its output has mean 0 and deviation 1; each patch needs its own two numbers back."""
    cfg, module = build(*ONLY_LOCAL, f"model.channels={channels}")
    batch = make_batch(cfg, 2)
    # Contrast and brightness differ from patch to patch, and some are pure air.
    level = torch.linspace(0, 1, 16)[:, None, None]
    batch["local"] = (batch["local"] * 0.3 * level + 800 * level - 500).short()
    batch["local"][:, 0, ..., :8, :, :] = -1000
    module.decoder.register_forward_hook(lambda *_: right_answer(batch, channels))
    with torch.no_grad():
        picture = module(batch, task="picture")["local"]
    torch.testing.assert_close(picture.reconstructed, picture.original, atol=1e-5, rtol=0)
    assert picture.masked.isnan().any()


def right_answer(batch: dict[str, Tensor], channels: int) -> Tensor:
    """The standardised voxels of the hidden patches, by the formula of docs/method.md."""
    unit = ((batch["local"].float() + 1000) / 2000).clamp(0, 1).flatten(0, 1)
    patches = patchify(unit, (8, 4, 2))
    _, hidden = draw_masks(batch["local_seeds"].flatten(), tokens=24, ratio=0.6)
    x = gather_tokens(patches, hidden)
    assert x.shape[-1] == channels * 64
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()


# 7. The best checkpoint on the fold that is reported.


@given(st.lists(st.floats(0.01, 2), min_size=1, max_size=8))
def test_the_summary_reports_the_last_figure_beside_the_best(tmp_path_factory, figures):
    """The best of many flatters; the last is what a run that stops on time has."""
    run = tmp_path_factory.mktemp("run")
    log = RunLog(run, step=0, tensorboard=False)
    log.write({"step": 1, "samples": 4, "loss": 1.0, "interval_steps": 1, "interval_samples": 4,
               "interval_s": 1.0, "data_wait_s": 0.0, "peak_memory_bytes": 1})  # fmt: skip
    for step, loss in enumerate(figures, start=1):
        held_out = {"loss": loss, "trivial": 0.8, "r2": 1 - loss / 0.8}
        log.write({"step": step, "samples": 4 * step, "val_reconstruction": held_out})
    summarise(run)
    reported = json.loads((run / "summary.json").read_text())["val_reconstruction"]
    assert reported["last"] == figures[-1]
    assert reported["best"] == min(figures)
    assert reported["r2"] == pytest.approx(1 - figures[-1] / 0.8)


# 8. The normalised loss flatters.


class Bare:
    """An engine without DeepSpeed."""

    def __init__(self, module: GLMAE) -> None:
        self._module, self.train = module, module.train

    def __call__(self, batch: dict[str, Tensor], **options: object) -> object:
        return self._module(batch, **options)


def lazy(module: GLMAE) -> GLMAE:
    """Predict every patch's own mean, which is 0 once it is standardised."""
    with torch.no_grad():
        for parameter in module.decoder.predict.parameters():
            parameter.zero_()
    return module


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_predicting_the_mean_explains_nothing_however_much_air_there_is(share):
    """Air has no variance and makes the loss small for nothing: 0.5 at one half, r2 still 0."""
    cfg, module = build(*ONLY_MAE)
    batch = make_batch(cfg, 8)
    for kind in ("local", "global"):
        views = batch[kind]
        views[: int(share * len(views))] = -1000  # whole people of air
    figures = held_out_reconstruction(Bare(lazy(module)), [(batch, 1.0)])
    for suffix in ("", "_local", "_global"):
        assert figures[f"r2{suffix}"] == 0.0
        assert figures[f"loss{suffix}"] == figures[f"trivial{suffix}"]
        assert figures[f"trivial{suffix}"] == pytest.approx(1 - share, abs=1e-3)


def test_held_out_figures_belong_to_the_batch_and_not_to_chance():
    """Fixed masks: two models are compared on the same hidden patches, in any order of batches."""
    cfg, module = build(*ONLY_MAE)
    batch = make_batch(cfg, 4)
    parts = [({name: value[i : i + 2] for name, value in batch.items()}, 1.0) for i in (0, 2)]
    company = (batch, 0.0)  # only for a rank that has fewer
    figures = []
    for seed, order in ((0, parts), (1, [*parts[::-1], company])):
        torch.manual_seed(seed)
        figures.append(held_out_reconstruction(Bare(module), order))
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)
    other = batch | {"local_seeds": batch["local_seeds"] + 1}
    again = held_out_reconstruction(Bare(module), [(other, 1.0)])
    assert again["loss_local"] != pytest.approx(figures[0]["loss_local"], rel=1e-6)
    assert again["loss_global"] == pytest.approx(figures[0]["loss_global"], rel=1e-6)


# 9. MONAI's MaskedAutoEncoderViT.


def monai_autoencoder(**changes: int) -> MaskedAutoEncoderViT:
    small = dict(hidden_size=24, mlp_dim=96, num_layers=1, num_heads=2, decoder_hidden_size=12,
                 decoder_mlp_dim=48, decoder_num_layers=1, decoder_num_heads=2)  # fmt: skip
    return MaskedAutoEncoderViT(1, (16, 12, 8), 4, **(small | changes))


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_monais_autoencoder_fails_under_bfloat16_autocast_and_ours_does_not():
    """Should the first half fail, MONAI has repaired it, and docs/method.md can say so."""
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="Float for the destination and BFloat16 for the source"),
    ):
        monai_autoencoder()(torch.rand(1, 1, 16, 12, 8))
    cfg, module = build()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = module(make_batch(cfg))
    outputs["loss"].backward()
    assert outputs["loss"].dtype == torch.float32
    assert outputs["loss"].item() == pytest.approx(module(make_batch(cfg))["loss"].item(), rel=0.05)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_a_decoder_width_of_512_is_no_multiple_of_six_and_ours_is_576_by_twelve_heads():
    """MONAI asserts when it builds; ours says before a run starts what would be right."""
    with pytest.raises(AssertionError, match="divisible by 6"):
        monai_autoencoder(decoder_hidden_size=512, decoder_num_heads=16)
    with pytest.raises(UserError, match=r"model\.decoder_width: 512 is not divisible by 6"):
        tiny_config("model.decoder_width=512", "model.decoder_heads=16")
    cfg = tiny_config("model.decoder_width=576", "model.decoder_heads=12")
    decoder = Decoder(cfg.model, values=64)
    masks = draw_masks(torch.arange(2), tokens=24, ratio=0.6)
    rebuilt = decoder(torch.rand(2, 10, 24), masks=masks, grid=(2, 3, 4))
    assert rebuilt.shape == (2, 15, 64)
    base = PretrainConfig.model_fields["model"].default
    assert (base.preset, base.decoder_width, base.decoder_heads) == ("base", 576, 12)
