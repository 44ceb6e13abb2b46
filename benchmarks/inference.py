"""Label a CT of 512x512x300 with sliding windows: ours and MONAI's, time and peak memory.

    python -m benchmarks.inference [--quick] --out FILE.json

Windows of 96^3 overlap by half and go two at a time through a network of 8 outputs: a small one,
beside which the work around it counts, and without `--quick` a UNETR too. Each way runs in a
process of its own: int16 voxels in memory become uint8 labels. Mean scores of both are compared
apart from that, on the small network.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._report import arguments, environment, report, spread

SHAPE, SPACING = (300, 512, 512), (1.0, 0.8, 0.8)  # Z, Y, X
WINDOW, OVERLAP, BATCH, OUTPUTS = (96, 96, 96), 0.5, 2, 8
HU = (-175.0, 250.0)
PACKAGES = ["monai", "numpy", "torch"]


def write_phantom(path: Path) -> None:
    """A body of noise with organs of other densities, air around it."""
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[tuple(slice(-1, 1, side * 1j) for side in SHAPE)]
    volume = rng.integers(-1020, -980, SHAPE, np.int16)
    volume[(y / 0.7) ** 2 + (x / 0.9) ** 2 + 0 * z < 1] = 20
    for _ in range(24):
        centre, radius = rng.uniform(-0.5, 0.5, 3), rng.uniform(0.05, 0.25)
        inside = sum((a - c) ** 2 for a, c in zip((z, y, x), centre, strict=True)) < radius**2
        volume[inside] = rng.integers(-120, 240)
    volume += rng.integers(-20, 20, SHAPE, np.int16)
    np.save(path, volume)


def network(name: str) -> Callable[[Any], Any]:
    """Probabilities of 8 outputs, from weights that are the same in every process."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "small":
        layers = nn.Sequential(
            nn.AvgPool3d(4), nn.Conv3d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, OUTPUTS, 1),
            nn.Upsample(scale_factor=4, mode="trilinear"), nn.Softmax(dim=1),
        )  # fmt: skip
        return layers.eval().requires_grad_(False)
    from glmae_ray.models.unetr import UNETR
    from glmae_ray.models.vit3d import Encoder

    encoder = Encoder(channels=1, patch=(16, 16, 16), width=192, depth=12, heads=3)
    unetr = UNETR(encoder, size=WINDOW, outputs=OUTPUTS, feature_size=16)
    return nn.Sequential(unetr, nn.Softmax(dim=1)).eval().requires_grad_(False)


def ours(volume: np.ndarray, predict: Callable[[Any], Any], scores: Path | None) -> np.ndarray:
    """Through `segment`."""
    from glmae_ray.config_finetune import CropsConfig, InferenceConfig
    from glmae_ray.intensity import Window
    from glmae_ray.scans import Scan
    from glmae_ray.sliding import segment

    window = Window(np.array([HU]), clips=True)
    scan = Scan(volume[np.newaxis], SPACING, window, np.zeros(1, np.float32))
    crops, inference = CropsConfig(size=WINDOW), InferenceConfig(overlap=OVERLAP, batch=BATCH)
    room = None
    if scores is not None:
        room = np.memmap(scores, np.float32, "w+", shape=(OUTPUTS, *SHAPE))
    return segment(scan, predict, crops=crops, inference=inference, probabilities=room)


def monai(volume: np.ndarray, predict: Callable[[Any], Any], scores: Path | None) -> np.ndarray:
    """Through `sliding_window_inference`, called as its examples do."""
    import torch
    from monai.inferers import sliding_window_inference
    from monai.transforms import ScaleIntensityRange

    scale = ScaleIntensityRange(*HU, b_min=0.0, b_max=1.0, clip=True)
    with torch.inference_mode():
        image = torch.as_tensor(scale(volume[np.newaxis]))[None].as_subclass(torch.Tensor)
        means = sliding_window_inference(
            image, WINDOW, BATCH, predict, overlap=OVERLAP, mode="gaussian"
        )
        if scores is not None:
            means[0].numpy().tofile(scores)
        return means.argmax(dim=1)[0].to(torch.uint8).numpy()


WAYS = {way.__name__: way for way in (ours, monai)}


def peak_mib() -> float:
    """The most memory that this process has held since it was last asked to forget."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def measure(way: str, name: str, folder: Path, *, keep: bool = False) -> dict[str, float]:
    """Label the phantom in this process, libraries and voxels loaded before the clock starts."""
    predict, volume = network(name), np.load(folder / "phantom.npy")
    WAYS[way](volume[:96, :96, :96], lambda x: x.repeat(1, OUTPUTS, 1, 1, 1), None)
    Path("/proc/self/clear_refs").write_text("5")
    start, work = time.perf_counter(), time.process_time()
    labels = WAYS[way](volume, predict, folder / way if keep else None)
    seconds, cpu, peak = time.perf_counter() - start, time.process_time() - work, peak_mib()
    np.save(folder / f"{way}-{name}.npy", labels)
    return {"seconds": seconds, "seconds of CPU": cpu, "peak MiB": peak}


def farthest(folder: Path) -> float:
    """The largest difference of any mean score."""
    every = [np.memmap(folder / way, np.float32, "r", shape=(OUTPUTS, *SHAPE)) for way in WAYS]
    return max(float(np.abs(a - b).max()) for a, b in zip(*every, strict=True))


def main() -> None:
    """Write the phantom, and run every way in fresh processes, in turn."""
    options = arguments(__doc__.splitlines()[0])
    facts, rows, ratios = environment(PACKAGES), [], {}
    names, repeats = (["small"], 1) if options.quick else (["small", "UNETR"], 3)
    context = multiprocessing.get_context("spawn")

    def alone(*args: Any, **more: Any) -> dict[str, float]:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(measure, *args, **more).result()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_phantom(folder / "phantom.npy")
        for name in names:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(repeats):
                for way, runs in found.items():  # in turn: what else the machine does hits both
                    runs.append(alone(way, name, folder))
            for key in ("seconds", "seconds of CPU", "peak MiB"):
                spreads = [spread([run[key] for run in runs]) for runs in found.values()]
                rows += [{"what": f"{name}, {key}", **dict(zip(WAYS, spreads, strict=True))}]
                first, second = (figures["median"] for figures in spreads)
                ratios[f"{name}: {key} ours / monai"] = first / second
            labels = [np.load(folder / f"{way}-{name}.npy") for way in WAYS]
            ratios[f"{name}: voxels labelled alike"] = float(np.equal(*labels).mean())
        for way in WAYS:
            alone(way, "small", folder, keep=True)
        ratios["largest difference of a mean score"] = farthest(folder)
    report("inference", rows=rows, ratios=ratios, facts=facts, out=options.out)


if __name__ == "__main__":
    main()
