"""What a run computes: parameters, tokens and floating-point operations, from its config alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from glmae_ray.config import PretrainConfig
from glmae_ray.config_base import Size
from glmae_ray.config_data import kept_tokens

# Of a transformer block, MLP ratio 4, in units of width^2: qkv 3, projection 1, MLP 8.
BLOCK_WEIGHTS, QKV_WEIGHTS = 12, 3
_BLOCK_VECTORS = 13  # in units of width: biases 3 + 1 + 4 + 1, two norms 4


class Tokens(NamedTuple):
    """One kind of view of a sample.

    Attributes:
        views: How many a sample has.
        size: Voxels along Z, Y, X.
        grid: Patches along Z, Y, X.
        every: Patches of a view.
        kept: Those that the student sees.
        values: Voxel values of a patch, all channels.
    """

    views: int
    size: Size
    grid: Size
    every: int
    kept: int
    values: int

    @property
    def hidden(self) -> int:
        """Patches that are masked, and rebuilt where the loss asks for it."""
        return self.every - self.kept

    @property
    def encoded(self) -> int:
        """Length of the student's sequence: the kept patches and CLS."""
        return 1 + self.kept

    @property
    def whole(self) -> int:
        """Length of the teacher's sequence and of the decoder's: all patches and CLS."""
        return 1 + self.every


def tokens(cfg: PretrainConfig, kind: str) -> Tokens:
    """Tokens of the views of a kind, `local` or `global`."""
    size, patch = getattr(cfg.views, f"{kind}_size"), cfg.model.patch
    z, y, x = (side // part for side, part in zip(size, patch, strict=True))
    every = z * y * x
    kept = kept_tokens(every, cfg.views.mask_ratio)
    values = cfg.model.channels * math.prod(patch)
    return Tokens(getattr(cfg.views, f"{kind}_count"), size, (z, y, x), every, kept, values)


def parameters(cfg: PretrainConfig) -> dict[str, int]:
    """Parameters of each part that the loss uses: encoder, decoder, head, teacher.

    The teacher is a copy of encoder and head, and is not trained.
    """
    model, values = cfg.model, cfg.model.channels * math.prod(cfg.model.patch)
    width, narrow = model.width, model.decoder_width
    # Projection with bias, CLS, final norm; then embedding, mask token, norm, prediction.
    encoder = values * width + 4 * width + model.depth * _block_parameters(width)
    decoder = width * narrow + 4 * narrow + narrow * values + values
    decoder += model.decoder_depth * _block_parameters(narrow)
    head = head_weights(cfg) + 2 * model.head_hidden + model.head_bottleneck
    counts = {"encoder": encoder}
    if cfg.loss.reconstructed:
        counts["decoder"] = decoder
    if cfg.loss.uses_teacher:
        counts |= {"head": head, "teacher": encoder + head}
    return counts


def trainable(cfg: PretrainConfig) -> int:
    """Parameters that the optimizer moves: all but the teacher's."""
    return sum(count for part, count in parameters(cfg).items() if part != "teacher")


def _block_parameters(width: int) -> int:
    return BLOCK_WEIGHTS * width**2 + _BLOCK_VECTORS * width


def head_weights(cfg: PretrainConfig) -> int:
    """Entries of the matrices of a projection head, prototypes included."""
    model = cfg.model
    hidden, bottleneck = model.head_hidden, model.head_bottleneck
    return hidden * (model.width + hidden + bottleneck) + bottleneck * model.prototypes


def head_vectors(cfg: PretrainConfig) -> int:
    """CLS features of a sample that the student's head maps: those that a term compares."""
    on = {"global": cfg.loss.w_gg > 0, "local": cfg.loss.w_gl > 0}
    return sum(getattr(cfg.views, f"{kind}_count") for kind, used in on.items() if used)


def flops(cfg: PretrainConfig) -> dict[str, int]:
    """Floating-point operations of one sample, forward and backward, by part.

    What the algorithm needs, counted as `torch.utils.flop_counter` does: 2 m n k for a product
    of matrices, nothing for the rest; backward, a product costs two, fused attention five
    products for the two of its forward. Not counted is what activation checkpointing repeats.
    """
    model, parts = cfg.model, parameters(cfg)
    counts = dict.fromkeys(parts, 0)
    for kind in cfg.loss.masked_kinds:
        t = tokens(cfg, kind)
        # Pixels need no gradient, so the backward pass of the embedding is one product.
        view = 2 * 2 * t.kept * t.values * model.width
        view += _blocks_flops(t.encoded, model.width, model.depth, given=t.encoded)
        counts["encoder"] += t.views * view
    for kind in cfg.loss.reconstructed:
        t = tokens(cfg, kind)
        outer = t.encoded * model.width + t.hidden * t.values
        view = 3 * 2 * outer * model.decoder_width
        view += _blocks_flops(t.whole, model.decoder_width, model.decoder_depth, given=t.hidden)
        counts["decoder"] += t.views * view
    if cfg.loss.uses_teacher:
        t = tokens(cfg, "global")
        counts["head"] = 3 * 2 * head_vectors(cfg) * head_weights(cfg)
        view = 2 * t.every * t.values * model.width + 2 * head_weights(cfg)
        view += _blocks_flops(t.whole, model.width, model.depth, given=1, backward=False)
        counts["teacher"] = t.views * view
    return counts


def _blocks_flops(length: int, width: int, depth: int, *, given: int, backward: bool = True) -> int:
    """Of blocks on one sequence; the last one projects and transforms only the tokens it gives.

    Both products of attention are length^2 x width.
    """
    products, attention = (3, 2 + 5) if backward else (1, 2)
    every = 2 * length * width * (products * BLOCK_WEIGHTS * width + attention * length)
    spared = (length - given) * (BLOCK_WEIGHTS - QKV_WEIGHTS) * width
    return depth * every - 2 * width * products * spared
