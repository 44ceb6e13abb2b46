"""What a frozen encoder knows of labels: labelled cases in, figures of each kind of probe out.

Letters: V crops, C channels, ZYX voxels, N tokens, E embedding, P voxels of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glmae_ray.config import PretrainConfig
from glmae_ray.crop_voxels import cut_images, cut_labels
from glmae_ray.crops import CropMaker
from glmae_ray.models.vit3d import Encoder, Grid, patch_grid, patchify
from glmae_ray.probed_cases import ProbedCases, probed_cases
from glmae_ray.probes import Scale, TokenProbe, Tokens, knn, logistic
from glmae_ray.reading import CaseReader, UnreadableCaseError

_PER_AXIS = 4  # voxels of a patch that are looked at; more would cost, and change little

Case = TypeVar("Case")


class Figures(NamedTuple):
    """What probes found.

    Attributes:
        values: Accuracies `knn`, `linear` and `majority`, that of the commonest class; `dice` of
            each structure and their `mean`; `cases`, how many were measured on.
        faults: Cases that were left out, and why, a line each.
    """

    values: dict[str, Any]
    faults: list[str]


class _Scan(NamedTuple):
    """One scan as a vector (E,), and its class."""

    feature: Tensor
    number: int


@torch.no_grad()
def probe(encoder: Encoder, cfg: PretrainConfig) -> Figures:
    """Probe an encoder in every way that the run asks for, on the CPU.

    Args:
        encoder: On the CPU, its weights float32.
        cfg: The run.

    Raises:
        UserError: The labelled cases are gone, or no longer fit.
    """
    values: dict[str, Any] = {}
    faults: list[str] = []
    for task, cases in probed_cases(cfg).items():
        if task == "classification":
            values |= _classify(encoder, cfg, cases, faults)
        else:
            values |= _segment(encoder, cases, faults)
    return Figures(values, faults)


def _classify(
    encoder: Encoder, cfg: PretrainConfig, cases: ProbedCases, faults: list[str]
) -> dict[str, Any]:
    def scan_of(maker: CropMaker, row: int) -> _Scan:
        return _scan_of(encoder, maker, row, size=cfg.views.global_size)

    fit = [*_readable(cases.fit, scan_of, faults)]
    val = [*_readable(cases.val, scan_of, faults)]
    if not (fit and val):
        return {}
    classes, truth = (torch.tensor([scan.number for scan in part]) for part in (fit, val))
    features, others = (torch.stack([scan.feature for scan in part]) for part in (fit, val))
    scale = Scale.of(features)
    features, others = scale(features), scale(others)
    answers = {"majority": classes.bincount().argmax().expand(len(truth))}
    if "knn" in cfg.probe.chosen:
        answers["knn"] = knn(features, classes, others, neighbours=cfg.probe.neighbours)
    if "linear" in cfg.probe.chosen:
        answers["linear"] = logistic(features, classes, others)
    accuracies = {n: float((said == truth).float().mean()) for n, said in answers.items()}
    return {**accuracies, "classified_cases": len(val)}


def _segment(encoder: Encoder, cases: ProbedCases, faults: list[str]) -> dict[str, Any]:
    def tokens_of(maker: CropMaker, row: int) -> Tokens:
        return _tokens_of(encoder, maker, row)

    fit = [*_readable(cases.fit, tokens_of, faults)]
    val = [*_readable(cases.val, tokens_of, faults)]
    if not (fit and val):
        return {}
    names = cases.labelled.structures
    found = {names[number - 1]: dice for number, dice in TokenProbe(fit).dice(val).items()}
    mean = float(np.mean([*found.values()])) if found else 0.0
    return {"dice": {"mean": mean, **found}, "segmented_cases": len(val)}


def _readable(
    maker: CropMaker, make: Callable[[CropMaker, int], Case], faults: list[str]
) -> Iterator[Case]:
    """What is made of each case; one that cannot be read is left out and named."""
    for row in range(len(maker.index)):
        try:
            yield make(maker, row)
        except UnreadableCaseError as error:
            faults.append(str(error))


def _scan_of(encoder: Encoder, maker: CropMaker, row: int, *, size: Grid) -> _Scan:
    """The mean of the tokens of the foreground box as one global view."""
    source = maker.source(row)
    reader = CaseReader(source.case_id, store=maker.store, cache=maker.cache)
    image = np.empty((1, len(source.air), *size), np.float32)
    cut_images(reader, source, maker.index.boxes()[row : row + 1].astype(float), image)
    assert maker.targets is not None
    tokens_1NE = _encode(encoder, image)
    return _Scan(tokens_1NE[0].mean(0), maker.targets[source.case_id])


def _tokens_of(encoder: Encoder, maker: CropMaker, row: int) -> Tokens:
    """Tokens of a case's crops, and the labels of some voxels of their patches."""
    source, crops = maker.source(row), maker.crops
    reader = CaseReader(source.case_id, store=maker.store, cache=maker.cache)
    boxes = maker.plan.draw(row, maker.points(source), case=row).boxes
    image = np.empty((crops.count, len(source.air), *crops.size), np.float32)
    label = np.empty((crops.count, *crops.size), np.uint8)
    cut_images(reader, source, boxes, image)
    cut_labels(reader, source, boxes, label)
    return Tokens(
        _encode(encoder, image).flatten(0, 1),
        _looked_at(label, encoder.patch),
        torch.from_numpy(maker.known(row)[1:]),
    )


def _encode(encoder: Encoder, image_VCZYX: NDArray[np.float32]) -> Tensor:
    """Tokens without CLS, (V, N, E); crops one by one, so that little memory is needed."""
    grid = patch_grid(list(image_VCZYX.shape[2:]), encoder.patch)
    crops = (torch.from_numpy(image_VCZYX[v : v + 1]) for v in range(len(image_VCZYX)))
    tokens = [encoder(patchify(crop, encoder.patch), grid=grid)[:, 1:] for crop in crops]
    return torch.cat(tokens)


def _looked_at(label_VZYX: NDArray[np.uint8], patch: Grid) -> Tensor:
    """Labels of voxels on a lattice in every patch, (V N, P): an even part of all voxels."""
    axes = []
    for side, part in zip(label_VZYX.shape[1:], patch, strict=True):
        few = min(part, _PER_AXIS)
        within = ((np.arange(few) + 0.5) * part / few).astype(int)
        axes.append((np.arange(0, side, part)[:, None] + within).ravel())
    lattice = np.ascontiguousarray(label_VZYX[np.ix_(range(len(label_VZYX)), *axes)])
    z, y, x = (min(part, _PER_AXIS) for part in patch)
    return patchify(torch.from_numpy(lattice)[:, None], (z, y, x)).flatten(0, 1)
