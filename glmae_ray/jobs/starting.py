"""Start pre-training from an encoder file: see that it fits the model, keep its report, load it."""

from __future__ import annotations

import json

from glmae_ray.config import PretrainConfig
from glmae_ray.encoder_out import INIT
from glmae_ray.errors import UserError
from glmae_ray.models.encoder_files import load_encoder
from glmae_ray.models.encoder_formats import heads_of
from glmae_ray.models.glmae import GLMAE
from glmae_ray.models.load_report import LoadReport
from glmae_ray.models.vit3d import Encoder
from glmae_ray.paths import Place, publish, read_file


def check_init(cfg: PretrainConfig, folder: Place) -> LoadReport:
    """See that `init` fits `model`, and is what a run that is continued started from.

    Raises:
        UserError: A line for each number that differs; nothing was written.
    """
    _, report = _load(cfg)
    refuse_another(report, folder)
    return report


def refuse_another(report: LoadReport, folder: Place) -> None:
    """See that what is loaded is what a run that is continued started from.

    Raises:
        UserError: It is not.
    """
    started = read_file(folder / INIT)
    if started is None:
        return
    before = json.loads(started)["sha256"]
    if before != report.sha256:
        raise UserError(
            f"init: {report.source} has changed since {folder} was started: its hash was "
            f"{before[:12]} and is {report.sha256[:12]}; name another run"
        )


def keep_report(report: LoadReport, folder: Place) -> None:
    """Tell what was loaded, once for a run, and write it as `init.json`."""
    if read_file(folder / INIT) is not None:
        return
    print(*(f"init: {line}" for line in report.lines()), sep="\n")
    publish(folder / INIT, json.dumps(report.as_dict(), indent=2) + "\n")


def begin_from_init(module: GLMAE, cfg: PretrainConfig) -> None:
    """Give student and teacher the encoder that `init` names; the rest keeps its first weights.

    Before the engine, and at every start: positions of a file's own are a buffer, which has to
    be there when a checkpoint is loaded into the module.
    """
    encoder, _ = _load(cfg)
    copies = [module.encoder, *([module.teacher_encoder] if cfg.loss.uses_teacher else [])]
    for copy in copies:
        if encoder.pos_embed is not None and encoder.pos_grid is not None:
            copy.adopt_positions(encoder.pos_embed[0], grid=encoder.pos_grid)
        copy.load_state_dict(encoder.state_dict())


def _load(cfg: PretrainConfig) -> tuple[Encoder, LoadReport]:
    """The encoder of `init` with the model's channels."""
    assert cfg.init is not None
    model = cfg.model
    encoder, report = load_encoder(cfg.init, channels=model.channels, heads=model.heads)
    found = {
        "width": encoder.cls_token.shape[-1],
        "depth": len(encoder.blocks),
        "heads": heads_of(encoder),
        "patch": encoder.patch,
    }
    lines = [
        f"model.{name}: {getattr(model, name)}, but {report.source} has {value}"
        for name, value in found.items()
        if getattr(model, name) != value
    ]
    if lines:
        raise UserError(*lines)
    return encoder, report
