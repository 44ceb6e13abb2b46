"""Augmentation: what it changes, how often, and that a crop's seed alone decides."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from glmae_ray.augmentation import augment
from glmae_ray.config_finetune import AugmentConfig

SIZE = (6, 10, 8)
OFF = dict(flips=0, rotate90=0, shift_chance=0)


def crops(count: int, *, size=SIZE, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.random((count, 2, *size), dtype=np.float32)
    return images, (images[:, 0] > 0.5).astype(np.uint8)


def changed(cfg: AugmentConfig, images, labels, *, seeds=None):
    images, labels = images.copy(), labels.copy()
    augment(images, labels, seeds=np.arange(len(images)) if seeds is None else seeds, cfg=cfg)
    return images, labels


def share(images, others) -> float:
    return float((images != others).any(axis=tuple(range(1, images.ndim))).mean())


def test_off_leaves_every_voxel():
    images, labels = crops(5)
    found = changed(AugmentConfig(**OFF), images, labels)
    np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(found[1], labels)


@pytest.mark.parametrize("axis", range(3))
def test_a_flip_turns_image_and_label_about_its_own_axis(axis):
    flips = tuple(float(axis == n) for n in range(3))
    images, labels = crops(3)
    found = changed(AugmentConfig(**{**OFF, "flips": flips}), images, labels)
    np.testing.assert_array_equal(found[0], np.flip(images, 2 + axis))
    np.testing.assert_array_equal(found[1], np.flip(labels, 1 + axis))


def test_quarter_turns_stay_in_the_plane_and_half_turns_where_its_sides_differ():
    cfg = AugmentConfig(**{**OFF, "rotate90": 1.0})
    images, labels = crops(40, size=(5, 8, 8))
    found, moved = changed(cfg, images, labels)
    turns = [
        next(k for k in (1, 2, 3) if np.array_equal(np.rot90(image, k, (2, 3)), other))
        for image, other in zip(images, found, strict=True)
    ]
    assert {*turns} == {1, 2, 3}
    assert all(
        np.array_equal(np.rot90(label, k, (1, 2)), other)
        for k, label, other in zip(turns, labels, moved, strict=True)
    )
    images, labels = crops(4)
    found, _ = changed(cfg, images, labels)
    np.testing.assert_array_equal(found, images[..., ::-1, ::-1])


def test_intensities_change_as_often_and_as_much_as_asked_for_and_labels_do_not():
    images, labels = crops(400)
    images[:] = 0.5
    shifted, same = changed(AugmentConfig(**{**OFF, "shift_chance": 0.5}), images, labels)
    np.testing.assert_array_equal(same, labels)
    assert share(shifted, images) == pytest.approx(0.5, abs=0.07)
    moves = shifted[:, 0, 0, 0, 0] - 0.5
    assert np.abs(moves).max() == pytest.approx(0.1, abs=0.005)
    assert (np.ptp(shifted, axis=(1, 2, 3, 4)) < 1e-6).all()
    scaled, _ = changed(AugmentConfig(**OFF, scale=0.2, scale_chance=1), images, labels)
    assert (scaled.min(), scaled.max()) == pytest.approx((0.4, 0.6), abs=0.01)
    noisy, _ = changed(AugmentConfig(**OFF, noise=0.05, noise_chance=1), images, labels)
    assert noisy.std() == pytest.approx(0.05, rel=0.02)


def test_rotation_and_zoom_move_labels_with_the_image():
    z, y, x = np.meshgrid(*(np.arange(side) for side in (20, 28, 24)), indexing="ij")
    ball = ((z - 9.5) ** 2 + (y - 18) ** 2 + (x - 8) ** 2 < 36).astype(np.uint8)
    labels = np.stack([ball] * 6)
    images = labels[:, None].astype(np.float32)
    cfg = AugmentConfig(**OFF, rotate_deg=20, zoom=0.2, affine_chance=1.0)
    found, moved = changed(cfg, images, labels)
    assert {*np.unique(moved)} == {0, 1}
    assert len({int(label.sum()) for label in moved}) > 3  # zoomed, each by its own share
    overlap = ((found[:, 0] > 0.5) == moved).mean()
    assert overlap > 0.995
    assert share(moved, labels) == 1


def test_a_crop_and_its_seed_decide_whatever_the_company_and_the_thread():
    cfg = AugmentConfig(flips=0.5, rotate90=0.5, noise=0.1, noise_chance=0.5, zoom=0.1,
                        affine_chance=0.5)  # fmt: skip
    images, labels = crops(12)
    seeds = np.arange(12) * 2**33 + 5
    together = changed(cfg, images, labels, seeds=seeds)

    def alone(n: int):
        return changed(cfg, images[n : n + 1], labels[n : n + 1], seeds=seeds[n : n + 1])

    with ThreadPoolExecutor(4) as pool:
        for n, (image, label) in enumerate(pool.map(alone, range(12))):
            np.testing.assert_array_equal(image[0], together[0][n])
            np.testing.assert_array_equal(label[0], together[1][n])
    assert share(changed(cfg, images, labels, seeds=seeds + 1)[0], together[0]) > 0.9


def test_images_without_labels_are_changed_too():
    images, _ = crops(3)
    before = images.copy()
    augment(images, None, seeds=np.arange(3), cfg=AugmentConfig(**{**OFF, "flips": 1}))
    np.testing.assert_array_equal(images, before[..., ::-1, ::-1, ::-1])
