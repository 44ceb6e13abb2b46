"""What a run holds on a device: bytes of weights, optimizer, activations and peak, from its config.

The terms follow what autograd keeps in `models/`; tests compare them with what it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from glmae_ray.config import PretrainConfig
from glmae_ray.costs import (
    BLOCK_WEIGHTS,
    Tokens,
    head_vectors,
    head_weights,
    parameters,
    tokens,
    trainable,
)

_FLOAT = 4  # bytes: float32, for all that is not computed under autocast
_INDEX = 8  # bytes: int64
_VOXEL = 2  # bytes: int16
# Entries; DeepSpeed's default of 500 million would take 2 or 4 GB of each device. Our decision.
_BUCKET = 50_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights: Of what is trained.
        gradients: All of them, as after a backward pass.
        moments: AdamW's two.
        master: The optimizer's own copy of its share of the weights, under ZeRO 1 and 2.
        teacher: Its weights.
        batch: The views of a micro-batch.
        activations: What a forward keeps for its backward pass, 16-bit copies of weights included.
        transient: The largest of what lives beside the activations for a moment.
        buffers: Of ZeRO, to reduce gradients and, at stage 3, to gather weights.
        peak: The most that a step holds at a time. Less than the sum where gradients and
            activations do not meet.
    """

    weights: int
    gradients: int
    moments: int
    master: int
    teacher: int
    batch: int
    activations: int
    transient: int
    buffers: int
    peak: int


def memory(cfg: PretrainConfig) -> Memory:
    """Bytes that a run holds on each device."""
    stage, workers = cfg.engine.zero_stage, cfg.workers
    trained, teacher = trainable(cfg), parameters(cfg).get("teacher", 0)
    part, teacher_part = -(-trained // workers), -(-teacher // workers)  # shards are padded
    sizes = {
        "weights": _FLOAT * (part if stage == 3 else trained),
        "gradients": _FLOAT * (part if stage >= 2 else trained),
        "moments": 2 * _FLOAT * (part if stage >= 1 else trained),
        "master": _FLOAT * part if stage in (1, 2) else 0,
        "teacher": _FLOAT * (teacher_part if stage == 3 else teacher),
        "batch": _VOXEL * cfg.micro_batch * _voxels(cfg),
        "activations": sum(activations(cfg).values()),
        "transient": max(_forward_transient(cfg), _backward_transient(cfg, cfg.loss.masked_kinds)),
        "buffers": _buffers(cfg, trained),
    }
    return Memory(**sizes, peak=_peak(cfg, sizes))


def _peak(cfg: PretrainConfig, sizes: dict[str, int]) -> int:
    """The largest of three moments: the loss, half-way back, the sending of gradients.

    A fused AdamW needs nothing more.
    """
    stays = ("weights", "moments", "master", "teacher", "batch")
    gradients, buffers = sizes["gradients"], sizes["buffers"]
    loss = sizes["activations"] + sizes["transient"] + buffers
    if cfg.accumulation > 1:
        loss += gradients  # of the micro-batches before
    # The kind that was encoded last comes back first, and then all gradients are there.
    first = cfg.loss.masked_kinds[:-1]
    kept = activations(cfg, first)
    half_way = sum(kept.values()) + _backward_transient(cfg, first) + gradients + buffers
    # Without ZeRO they are copied into one buffer, where there is anybody to send it to.
    sending = gradients * (2 if cfg.engine.zero_stage == 0 and cfg.workers > 1 else 1)
    return sum(sizes[name] for name in stays) + max(loss, half_way, sending)


def activations(cfg: PretrainConfig, kinds: tuple[str, ...] | None = None) -> dict[str, int]:
    """Bytes that one micro-batch keeps for its backward pass, by part.

    `casts` are the 16-bit copies of weights that autocast makes once a forward.

    Args:
        cfg: The run.
        kinds: Only what these kinds of view keep, without the heads; None: everything.
    """
    small, counts = cfg.micro_batch, {"encoder": 0, "decoder": 0, "head": 0, "casts": _casts(cfg)}
    for kind in cfg.loss.masked_kinds if kinds is None else kinds:
        t = tokens(cfg, kind)
        counts["encoder"] += small * t.views * _encoder_keeps(cfg, t)
        if kind in cfg.loss.reconstructed:
            counts["decoder"] += small * t.views * _decoder_keeps(cfg, t)
        elif not _narrow(cfg):
            # CLS is a view of the encoder's whole output.
            counts["encoder"] += small * t.views * t.encoded * cfg.model.width * _FLOAT
    if cfg.loss.uses_teacher and kinds is None:
        counts["head"] = _head_keeps(cfg)
    return {part: count for part, count in counts.items() if count}


def _voxels(cfg: PretrainConfig) -> int:
    """Voxels of a sample's views, all channels."""
    kinds = [tokens(cfg, kind) for kind in cfg.loss.kinds]
    return sum(t.views * t.every * t.values for t in kinds)


def _narrow(cfg: PretrainConfig) -> bool:
    return cfg.engine.precision != "float32"


def _computed(cfg: PretrainConfig) -> int:
    """Bytes of what products of matrices read and write."""
    return 2 if _narrow(cfg) else _FLOAT


def _checkpointed(cfg: PretrainConfig) -> bool:
    return cfg.model.activation_checkpointing


def _blocks_keep(cfg: PretrainConfig, length: int, *, width: int, heads: int, depth: int) -> int:
    """Of a sequence through blocks: all of it, or with checkpointing the input of each block."""
    if _checkpointed(cfg):
        return depth * length * width * _FLOAT
    return depth * _block_keeps(cfg, length, width=width, heads=heads)


def _block_keeps(cfg: PretrainConfig, length: int, *, width: int, heads: int) -> int:
    """Of a sequence through one block.

    In float32 the inputs of both norms, with mean and deviation, and the logarithms of attention's
    sums; as computed the inputs of qkv and fc1, queries, keys and values, attention's output (4
    more widths), and what goes into GELU and fc2, 4 widths each.
    """
    computed = 14 * width * _computed(cfg)
    return length * (computed + _FLOAT * (2 * width + 4 + heads))


def _encoder_keeps(cfg: PretrainConfig, t: Tokens) -> int:
    """Of one view: patches, blocks, the final norm."""
    width, depth = cfg.model.width, cfg.model.depth
    blocks = _blocks_keep(cfg, t.encoded, width=width, heads=cfg.model.heads, depth=depth)
    return t.kept * t.values * _computed(cfg) + blocks + t.encoded * _FLOAT * (width + 2)


def _decoder_keeps(cfg: PretrainConfig, t: Tokens) -> int:
    """Of one view: the embedding's input, blocks, the hidden rows, and how far they are off."""
    model, width, computed = cfg.model, cfg.model.decoder_width, _computed(cfg)
    heads, depth = model.decoder_heads, model.decoder_depth
    embedding = t.encoded * (model.width * computed + _INDEX)
    blocks = _blocks_keep(cfg, t.whole, width=width, heads=heads, depth=depth)
    blocks += t.hidden * _INDEX
    if not _checkpointed(cfg):
        # The last block goes on with the hidden rows, and keeps attention's output of these apart.
        spared = 9 * width * computed + _FLOAT * (width + 2)
        blocks += t.hidden * width * computed - (t.whole - t.hidden) * spared
    norm = t.hidden * (_FLOAT * (width + 2) + width * computed)
    return embedding + blocks + norm + t.hidden * t.values * _FLOAT


def _head_keeps(cfg: PretrainConfig) -> int:
    """Of a micro-batch's CLS features: the MLP, unit vectors, prototypes, log-probabilities."""
    model, small, computed = cfg.model, cfg.micro_batch, _computed(cfg)
    cls = model.width * computed if _narrow(cfg) else 0
    unit = _FLOAT * (2 * model.head_bottleneck + 2)
    vector = cls + 4 * model.head_hidden * computed + unit + _FLOAT * model.prototypes
    calls = (cfg.loss.w_gg > 0) + (cfg.loss.w_gl > 0)
    # Each call makes unit vectors of the prototypes anew.
    prototypes = calls * model.prototypes * _FLOAT * (model.head_bottleneck + 2)
    targets = cfg.views.global_count * (cfg.loss.w_gg > 0) + (cfg.loss.w_gl > 0)
    targets *= model.prototypes * _FLOAT
    return small * (head_vectors(cfg) * vector + targets) + prototypes


def _casts(cfg: PretrainConfig) -> int:
    """Bytes of the 16-bit copies of weights that stay until the backward pass.

    Not that of the patch projection: pixels need no gradient, so nothing asks for it again.
    """
    if not _narrow(cfg):
        return 0
    model, count = cfg.model, 0
    if cfg.loss.reconstructed:
        values = tokens(cfg, cfg.loss.reconstructed[0]).values
        count += model.decoder_width * (model.width + values)
    if cfg.loss.uses_teacher:
        count += head_weights(cfg) - model.head_bottleneck * model.prototypes
    return count * _computed(cfg) + (0 if _checkpointed(cfg) else _block_casts(cfg))


def _block_casts(cfg: PretrainConfig) -> int:
    """Bytes of the 16-bit copies of the weights of all blocks."""
    model, count = cfg.model, 0
    if _narrow(cfg) and cfg.loss.masked_kinds:
        count += model.depth * model.width**2
        if cfg.loss.reconstructed:
            count += model.decoder_depth * model.decoder_width**2
    return BLOCK_WEIGHTS * count * _computed(cfg)


def _forward_transient(cfg: PretrainConfig) -> int:
    """Bytes beside the activations in the loss or in the teacher."""
    computed, counts = _computed(cfg), [0]
    for kind in cfg.loss.reconstructed:
        t = tokens(cfg, kind)
        # The prediction, the target and the squares of their difference.
        counts.append(t.views * t.hidden * t.values * (computed + 2 * _FLOAT))
    if cfg.loss.uses_teacher:
        t = tokens(cfg, "global")
        # The residual, the norm's input, in float32 its output, GELU's 4 widths on either side.
        norm = 2 * _FLOAT + (_FLOAT + computed if _narrow(cfg) else computed)
        block = t.whole * cfg.model.width * (norm + 8 * computed)
        # Every patch, first as int16 or once more as computed.
        patches = t.every * t.values
        counts.append(t.views * (_FLOAT * patches + max(_VOXEL * patches, block)))
    # Autocast keeps its copies to the end of the forward, whether or not a block keeps them too.
    unkept = _block_casts(cfg) if _checkpointed(cfg) else 0
    return cfg.micro_batch * max(counts) + unkept


def _backward_transient(cfg: PretrainConfig, kinds: tuple[str, ...]) -> int:
    """Bytes of gradients on their way through the loss or a block of these kinds of view."""
    counts = [0]
    for kind in kinds:
        t = tokens(cfg, kind)
        counts.append(t.views * _block_backward(cfg, t.encoded, ""))
        if kind in cfg.loss.reconstructed:
            # Four of the size of the squares.
            counts.append(t.views * t.hidden * t.values * 4 * _FLOAT)
            counts.append(t.views * _block_backward(cfg, t.whole, "decoder_"))
    return cfg.micro_batch * max(counts)


def _block_backward(cfg: PretrainConfig, length: int, part: str) -> int:
    """Of a sequence, gradients inside one block; with checkpointing also what it keeps, anew."""
    width, heads = getattr(cfg.model, f"{part}width"), getattr(cfg.model, f"{part}heads")
    gradients = length * width * (2 * _FLOAT + 8 * _computed(cfg))
    again = _block_keeps(cfg, length, width=width, heads=heads) if _checkpointed(cfg) else 0
    return gradients + again


def reduce_bucket(trained: int) -> int:
    """Entries of a buffer through which ZeRO reduces gradients of so many weights."""
    return min(_BUCKET, trained)


def _buffers(cfg: PretrainConfig, trained: int) -> int:
    """Bytes of ZeRO's buffers: one for each type in which gradients travel."""
    stage = cfg.engine.zero_stage
    if stage == 0:
        return 0
    types = 2 if _narrow(cfg) else 1  # of Linear, 16 bits under autocast; of the rest, float32
    if stage < 3:
        return types * _FLOAT * reduce_bucket(trained)
    # At stage 3 each buffer has its own type, and the weights stay whole until they are used again.
    return (_FLOAT + (types - 1) * _computed(cfg)) * reduce_bucket(trained) + _FLOAT * trained
