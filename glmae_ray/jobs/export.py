"""`glmae export`: an encoder, or a finetuned run, in files that other code expects."""

from __future__ import annotations

from typing import get_args

from glmae_ray.config import EncoderFormat, ExportConfig, SegmenterFormat
from glmae_ray.errors import UserError
from glmae_ray.jobs import export_encoder, export_segmenter, hub
from glmae_ray.jobs.formats import Prepared
from glmae_ray.jobs.model_card import CARD, model_card
from glmae_ray.models.segmenter_files import FILES
from glmae_ray.paths import Place, publish, to_place


def run(cfg: ExportConfig) -> None:
    """Write the formats that are asked for and a model card, and push them where that is asked.

    Prints what was loaded, and each file.

    Raises:
        UserError: The weights cannot be loaded, have no place in a format, or there is no token to
            push with; nothing was written. Or the hub refuses.
    """
    if cfg.push:
        hub.check()
    parts = _prepare(cfg)
    print(*(line for part in parts for line in part.lines), sep="\n")
    out: Place = to_place(cfg.out)
    files: list[str] = []
    for part in parts:
        for name, write in part.writers.items():
            written = write()
            print(f"{name}: {out / written[0]}")
            files += written
    publish(out / CARD, model_card(cfg, parts[0].facts, files=files))
    print(f"card: {out / CARD}")
    if cfg.push:
        print(f"pushed: {hub.push(cfg.push, out, files=[CARD, *files])}")


def _prepare(cfg: ExportConfig) -> list[Prepared]:
    """Load what the formats need; of a finetuned run its own formats, unless others are asked."""
    of_segmenter = [n for n in cfg.formats or () if n in get_args(SegmenterFormat)]
    of_encoder = [n for n in cfg.formats or () if n in get_args(EncoderFormat)]
    finetuned = export_segmenter.is_finetuned(cfg)
    if of_segmenter and not finetuned:
        line = f"formats: {', '.join(of_segmenter)}: only of a finetuned run; {cfg.run} has no"
        raise UserError(f"{line} {FILES['last']}")
    if not finetuned and "weights" in cfg.model_fields_set:
        print(f"weights: has no effect: {cfg.run} is no finetuned run")
    parts = []
    if of_segmenter or (finetuned and not of_encoder):
        parts.append(export_segmenter.prepare(cfg, of_segmenter or None))
    if of_encoder or not finetuned:
        source = to_place(cfg.run) / FILES[cfg.weights] if finetuned else cfg.run
        parts.append(export_encoder.prepare(cfg, source, of_encoder or None))
    return parts
