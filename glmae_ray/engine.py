"""The only door to DeepSpeed: build, forward, backward, step, save, load, change of world size.

Autocast runs over float32 parameters (`torch_autocast`), never with bfloat16 ones: in bfloat16 a
teacher update of 0.4 % rounds to nothing.

At stage 0 torch's DistributedDataParallel averages the gradients, bucket after bucket while others
are computed; from stage 1 on DeepSpeed does.

A step whose loss or gradient is not finite on any rank is skipped on all, in every ZeRO stage:
weights, moments, teacher and centre stay as they were. Such a loss makes its whole gradient NaN,
so that the sum over ranks carries it into the norm that all ranks know. At stage 0 the device
itself skips, as fused AdamW can, and nobody waits; from stage 1 on DeepSpeed looks at the norm on
the host and skips by itself.
"""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable import replicate

from glmae_ray.config_train import TrainConfig
from glmae_ray.costs_memory import reduce_bucket
from glmae_ray.loss_scale import LossScale
from glmae_ray.optim import Group, parameter_groups
from glmae_ray.universal import SAVED, UNIVERSAL, read_rest

_SCALE = "loss_scale"  # in what is saved
_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


class Engine:
    """A module under DeepSpeed, and the few verbs that a training loop needs."""

    def __init__(
        self,
        module: nn.Module,
        *,
        cfg: TrainConfig,
        device: torch.device,
        groups: list[Group] | None = None,
    ) -> None:
        """Join the process group that runs, shard what the ZeRO stage shards.

        Args:
            module: Parameters in float32; its `forward` holds all computation.
            cfg: Precision, stage, batch arithmetic and optimizer settings.
            device: Where this worker computes.
            groups: Parameters that are trained, as `glmae_ray.optim` gives them; None: all.
        """
        deepspeed = _import_deepspeed(device)
        if groups is None:
            named, decay = module.named_parameters(), cfg.optim.weight_decay
            groups = parameter_groups(named, weight_decay=decay)
        optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.optim.betas, fused=True)
        trained = sum(weights.numel() for group in groups for weights in group["params"])
        self.device = device
        self.zero_stage = cfg.engine.zero_stage
        self._overlaps = self.zero_stage == 0 and torch.distributed.get_world_size() > 1
        self._gathered = deepspeed.zero.GatheredParameters
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=module.to(device), optimizer=optimizer, config=_settings(cfg, trained)
        )
        if self.zero_stage == 0:
            self._exchange_while_backward()
        self._clip, self._norm = cfg.optim.clip, torch.tensor(torch.nan)
        # Under fp16 gradients overflow by design: they are found and skipped.
        self._scaled = cfg.engine.precision == "fp16"
        self._scale = self._loss_scale() if self._scaled else None
        self._lost = torch.zeros((), dtype=torch.bool, device=device)
        self._skipped = torch.zeros((), device=device)
        self._kept = self._engine.checkpoint_engine = _kept_in_memory()
        # Stage 0 clips with this method of DeepSpeed's, which forgets the norm.
        self._engine.clip_fp32_gradients = self._clip_and_remember

    @property
    def module(self) -> Any:
        """The module itself; under stage 3 its parameters are in pieces."""
        return self._engine.module

    def __call__(self, batch: dict[str, Tensor], **options: Any) -> Any:
        """Run the module's forward under the run's precision."""
        if self._overlaps:
            ends = self._engine.is_gradient_accumulation_boundary()
            self.module.set_requires_gradient_sync(ends)
        return self._engine(batch, **options)

    def _exchange_while_backward(self) -> None:
        """In place of DeepSpeed, which puts all of them into one buffer and back afterwards.

        Also where there is nobody to send to. `replicate` is DistributedDataParallel that leaves
        the module and the names of its weights as they are.
        """
        self._engine.enable_backward_allreduce = False
        if self._overlaps:
            replicate(self.module, gradient_as_bucket_view=True)

    def train(self, mode: bool = True) -> None:
        """Switch the module between training and evaluation."""
        self._engine.train(mode)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch, scaled for accumulation.

        Args:
            loss: Scalar. One that overflows may have a finite gradient; it is made NaN.
        """
        finite = torch.isfinite(loss.detach())
        if self._scaled:
            self._lost = self._lost | ~finite
        self._engine.backward(loss * torch.where(finite, 1.0, torch.nan))

    def step(self, *, lr: float) -> None:
        """Count one micro-batch; the last one of a step clips and updates the parameters.

        Not where loss or gradient is not finite: see `skipped`.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        ends = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if ends and isinstance(self._scale, LossScale):
            self._scale.follow(overflow=self._optimizer.overflow)
            self._optimizer.override_loss_scale(self._scale.value)
        if ends and self.zero_stage:
            self._note_skipped(torch.as_tensor(self._engine.get_global_grad_norm()))

    @property
    def skipped(self) -> Tensor:
        """1 where the last step was skipped for a number that is not finite, else 0.

        A float32 scalar on the device, the same on every rank. Under fp16 only the loss counts,
        not the overflows for which its loss scaler skips.
        """
        return self._skipped

    def update_teacher(self, momentum: float) -> None:
        """Let the module's teacher follow its student, whatever the ZeRO stage did to both.

        After a skipped step neither teacher nor centre moves.
        """
        if not self.module.loss.uses_teacher:
            return
        teacher, student = self.module.teacher_and_student()
        with self._whole([*teacher, *student], change=True):
            self.module.update_teacher(momentum, skipped=self._skipped)

    def gradient_norm(self) -> float:
        """Norm of the last step's whole gradient before clipping."""
        return float(self._engine.get_global_grad_norm() if self.zero_stage else self._norm)

    def _loss_scale(self) -> LossScale | torch.amp.GradScaler:
        """At stage 0 DeepSpeed's; from stage 1 on ours.

        There DeepSpeed 0.19.8 clips before it unscales, to a norm of 1 / 65536 of the one that is
        asked for, and where a gradient overflows it never lowers its scale.
        """
        if self.zero_stage == 0:
            return self._engine.torch_autocast_z0_gradscaler
        scale = LossScale()
        self._optimizer.torch_autocast_gradscaler = None
        self._optimizer.override_loss_scale(scale.value)
        return scale

    def _clip_and_remember(self) -> None:
        self._norm = nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self._note_skipped(self._norm)
        if not self._scaled:
            # What a GradScaler would set: 1 makes the fused kernels leave weights and moments.
            self._optimizer.found_inf = self._skipped

    def _note_skipped(self, norm: Tensor) -> None:
        """Note whether any rank lost a number in this step; the norm is the same on all."""
        if self._scaled:
            # The norm does not tell an overflow from a loss that is no number; ranks have to.
            skipped, self._lost = self._lost.float(), torch.zeros_like(self._lost)
            torch.distributed.all_reduce(skipped, op=torch.distributed.ReduceOp.MAX)
        else:
            # DeepSpeed says -1 for a norm that is no number.
            skipped = (~torch.isfinite(norm) | (norm < 0)).float()
        self._skipped = skipped.to(self.device)

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Inside, the module's parameters are whole on every rank, to be read."""
        return self._whole(list(self.module.parameters()), change=False)

    @contextmanager
    def _whole(self, parameters: list[Tensor], *, change: bool) -> Iterator[None]:
        if self.zero_stage < 3:
            yield
            return
        # Without modifier_rank stage 3 throws an edit away on leaving (OpenRLHF issue 1357).
        with self._gathered(parameters, modifier_rank=0 if change else None):
            yield

    def snapshot(self) -> dict[str, bytes]:
        """This rank's share of parameters and optimizer state, as files. Collective.

        Returns:
            Name -> content of the files that `load` expects in a folder; training may go on.
        """
        # DeepSpeed 0.19.8 saves nothing of the loss scale.
        state = {} if self._scale is None else {_SCALE: self._scale.state_dict()}
        # It wants a folder, and puts a script of its own there.
        with tempfile.TemporaryDirectory(prefix="glmae-snapshot-") as folder:
            self._engine.save_checkpoint(folder, tag=SAVED, client_state=state, save_latest=False)
            paths, self._kept.files = self._kept.files, {}
            return {Path(path).relative_to(folder).as_posix(): d for path, d in paths.items()}

    def load(self, folder: Path, *, saved_workers: int | None = None) -> None:
        """Read what `snapshot` gave at the same ZeRO stage, before or in the middle of a run.

        Collective.

        Args:
            folder: With the files of all ranks. From stage 1 on, where another number of workers
                wrote them, what `to_universal` made of them is read in their place.
            saved_workers: How many wrote it; None: as many as there are now.

        Raises:
            FileNotFoundError: What `to_universal` makes is needed, and not there or not whole.
        """
        workers = torch.distributed.get_world_size()
        if self.zero_stage and saved_workers not in (None, workers):
            self._load_universal(folder)
        else:
            self._load(folder, SAVED)

    def _load(self, folder: Path, tag: str) -> None:
        if not any((folder / tag).glob("*_model_states.pt")):
            raise FileNotFoundError(f"{folder / tag}: holds no checkpoint")
        loaded, state = self._engine.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint to load")
        if self._scale is not None and _SCALE in state:
            self._scale.load_state_dict(state[_SCALE])
        if isinstance(self._scale, LossScale):
            self._optimizer.override_loss_scale(self._scale.value)

    def _load_universal(self, folder: Path) -> None:
        """Load through DeepSpeed, and mend what DeepSpeed 0.19.8 leaves wrong."""
        rest = read_rest(folder)
        optimizer = self._optimizer.optimizer  # torch's, over this rank's share
        kept = [{**group, "params": None} for group in optimizer.param_groups]
        config = self._engine._config  # of all that it holds, DeepSpeed asks this at each load
        config.load_universal_checkpoint = True
        try:
            self._load(folder, UNIVERSAL)
        finally:
            config.load_universal_checkpoint = False
        for group, own in zip(optimizer.param_groups, kept, strict=True):
            # Stage 3 gives every group the first one's, its weight decay included.
            group.update(own, params=group["params"])
        for moments in optimizer.state.values():
            # On the CPU, where fused AdamW cannot use it, and in stage 3 one for all groups,
            # each of which would count every step.
            moments["step"] = moments["step"].to(self.device, copy=True)
        # DeepSpeed leaves as they are, in every stage, frozen parameters and buffers.
        trained = {name for name, p in self.module.named_parameters() if p.requires_grad}
        frozen = [p for p in self.module.parameters() if not p.requires_grad]
        with self._whole(frozen, change=True):
            found = self.module.load_state_dict(rest, strict=False)
        if found.unexpected_keys or set(found.missing_keys) != trained:
            raise RuntimeError(f"{folder}: frozen parts and buffers are of another module")


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed so that it needs neither a compiler nor MPI on a machine without GPU."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if device.type == "cpu":
        # The first CPU run would compile a shared-memory collective for 100 s; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def _kept_in_memory() -> Any:
    """A checkpoint engine of DeepSpeed's that keeps what it is to write, and loads from disk.

    So a disk that is slow or full meets whoever writes, not the ranks in the midst of a collective.
    """
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Kept(TorchCheckpointEngine):
        def __init__(self) -> None:
            super().__init__()
            self.files: dict[str, bytes] = {}
            # By name of the file. Fresh pages cost more than what is copied into them: where the
            # last content is no longer held, the next goes to the same pages, else to others.
            self._buffers: dict[str, io.BytesIO] = {}

        def save(self, state_dict: Any, path: str) -> None:
            buffer = self._buffers.setdefault(Path(path).name, io.BytesIO())
            buffer.seek(0)
            with _no_crc32():
                torch.save(state_dict, buffer)
            buffer.truncate()
            self.files[path] = buffer.getvalue()  # no copy

    return Kept()


@contextmanager
def _no_crc32() -> Iterator[None]:
    """Let `torch.save` leave out a checksum that `torch.load` does not look at.

    It takes longer than to copy the tensors; checkpoints have a CRC32C of each file.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _settings(cfg: TrainConfig, trained: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; the global batch follows from the other two numbers."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": cfg.micro_batch,
        "gradient_accumulation_steps": cfg.accumulation,
        "gradient_clipping": cfg.optim.clip,
        "zero_optimization": {
            "stage": cfg.engine.zero_stage,
            "reduce_bucket_size": reduce_bucket(trained),
        },
        "steps_per_print": 10**9,
        # It would wait for the device at every forward and step to time them.
        "timers": {"throughput": {"enabled": False}},
    }
    if cfg.engine.precision != "float32":
        dtype = _AUTOCAST[cfg.engine.precision]
        settings["torch_autocast"] = {"enabled": True, "dtype": dtype}
    return settings
