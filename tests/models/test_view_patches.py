"""Patches cast on demand: the same numbers as casting whole views, from no other voxel."""

from __future__ import annotations

import pytest
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glmae_ray.models.view_patches import ViewPatches
from glmae_ray.models.vit3d import gather_tokens, patchify

PATCH = (8, 4, 2)
WINDOWS = torch.tensor([[[-1000.0, 1000.0], [-50.0, 150.0]]]).repeat(3, 1, 1)


def raw(channels: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1200, 1200, (3, channels, 16, 12, 8), generator=generator).short()


def whole(voxels: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """The plain way: cast and window the view, then cut it."""
    low, high = windows[..., None, None, None, :].unbind(-1)
    return patchify(((voxels - low) / (high - low)).clamp(0, 1), PATCH)


@pytest.mark.parametrize("channels", [1, 2])
def test_patches_on_demand_equal_those_of_a_view_cast_whole_to_the_bit(channels):
    windows = WINDOWS[:, :channels]
    views = ViewPatches(raw(channels), windows, PATCH, samples=3)
    assert views.grid == (2, 3, 4)
    assert torch.equal(views.all(), whole(raw(channels), windows))
    index = torch.stack([torch.randperm(24)[:7] for _ in range(3)])
    assert torch.equal(views.at(index), gather_tokens(whole(raw(channels), windows), index))


def test_the_batch_is_left_as_it_was_whatever_its_dtype():
    for voxels in (raw(), raw().float()):
        views = ViewPatches(voxels.clone(), WINDOWS, PATCH, samples=3)
        views.all()
        views.at(torch.arange(24).expand(3, -1))
        assert torch.equal(views.voxels_BCZYX, voxels)


def test_gathering_some_patches_makes_nothing_larger_than_what_was_asked_for():
    voxels = torch.zeros(1, 1, 64, 64, 64, dtype=torch.int16)
    views = ViewPatches(voxels, WINDOWS[:1, :1], (8, 8, 8), samples=1)
    with LargestMade() as made:
        views.at(torch.arange(5).unsqueeze(0))
    assert made.bytes == 5 * 512 * 4


class LargestMade(TorchDispatchMode):
    """Sees the largest new storage that an operation gives; views of what is there are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._known |= {x.untyped_storage().data_ptr() for x in tree_leaves(args) if is_tensor(x)}
        made = function(*args, **(kwargs or {}))
        if is_tensor(made) and made.untyped_storage().data_ptr() not in self._known:
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made
