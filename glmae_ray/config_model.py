"""The section about the network, and the presets that give every number that is not stated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import PositiveInt, model_validator

from glmae_ray.config_base import Config, Problem, Size

PRESETS: dict[str, dict[str, int]] = {
    "tiny": dict(width=192, depth=6, heads=4, decoder_width=96, decoder_depth=2, decoder_heads=2,
                 head_hidden=512, head_bottleneck=128, prototypes=512),
    "small": dict(width=384, depth=12, heads=6, decoder_width=288, decoder_depth=4,
                  decoder_heads=6, head_hidden=1024, head_bottleneck=256, prototypes=2048),
    "base": dict(width=768, depth=12, heads=12, decoder_width=576, decoder_depth=8,
                 decoder_heads=12, head_hidden=2048, head_bottleneck=256, prototypes=4096),
    "large": dict(width=1056, depth=24, heads=12, decoder_width=576, decoder_depth=8,
                  decoder_heads=12, head_hidden=2048, head_bottleneck=256, prototypes=4096),
}  # fmt: skip


class ModelConfig(Config):
    """Encoder, decoder and projection head; a preset gives every number that is not stated.

    Of `base`, patch and encoder are verified; decoder and head are decisions, as is every number
    of the other presets.
    """

    preset: Literal["tiny", "small", "base", "large"] = "base"
    channels: PositiveInt = 1
    patch: Size = (16, 16, 16)
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    decoder_width: PositiveInt
    decoder_depth: PositiveInt
    decoder_heads: PositiveInt
    head_hidden: PositiveInt
    head_bottleneck: PositiveInt
    prototypes: PositiveInt
    compile: bool = False  # the blocks with torch.compile, each shape when it is first met
    activation_checkpointing: bool = False  # a block's insides again in place of in memory

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset = given.get("preset", "base")
        return {**PRESETS.get(preset if isinstance(preset, str) else "", PRESETS["base"]), **given}

    def width_rules(self, part: str = "") -> Iterator[Problem]:
        """The width of the encoder, or of the part `decoder_`, has to fit positions and heads."""
        width, heads = getattr(self, f"{part}width"), getattr(self, f"{part}heads")
        fields = (f"model.{part}width", f"model.{part}heads")
        if width % 6:
            # Sine and cosine of three axes: six equal parts.
            line = f"model.{part}width: {width} is not divisible by 6 (sin-cos of three axes)"
            yield Problem(fields[:1], line)
        if width % heads:
            line = f"model.{part}width: {width} is not divisible by its {heads} heads"
            yield Problem(fields, line)
