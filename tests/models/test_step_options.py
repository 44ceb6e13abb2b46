"""Options that change what a step costs and nothing that it computes."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmae_ray.config import PretrainConfig
from glmae_ray.errors import UserError
from glmae_ray.models.compiling import compile_blocks
from glmae_ray.models.glmae import GLMAE
from glmae_ray.models.vit3d import Block
from tests.conftest import tiny_config
from tests.models.test_glmae import ONLY_LOCAL, build, make_batch

# Dynamo looks at the .grad of inner tensors, and inductor imports what torch itself deprecates.
tracing = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:`torch.jit.script:DeprecationWarning"
)
needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"
)


def gradients(module: GLMAE, cfg: PretrainConfig, samples: int = 2) -> dict[str, torch.Tensor]:
    module.zero_grad()
    outputs = module(make_batch(cfg, samples))
    outputs["loss"].backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"loss": outputs["loss"].detach(), **found}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=tolerance, rtol=tolerance, msg=name)


def test_activation_checkpointing_gives_the_same_gradients_to_the_bit():
    cfg, plain = build()
    _, frugal = build("model.activation_checkpointing=true")
    assert_equal(gradients(frugal, cfg), gradients(plain, cfg), 0)


def test_activation_checkpointing_runs_each_trained_block_again_and_no_block_of_the_teacher():
    cfg, module = build("model.activation_checkpointing=true")
    calls: dict[str, int] = {}
    for name, part in module.named_modules():
        if isinstance(part, Block):
            part.norm1.register_forward_pre_hook(
                lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
            )
    gradients(module, cfg)
    again = {name: n for name, n in calls.items() if not name.startswith("teacher")}
    assert set(again.values()) == {4}  # two kinds of view, twice
    assert {n for name, n in calls.items() if name.startswith("teacher")} == {1}


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    cfg, plain = build("model.depth=6")
    _, frugal = build("model.depth=6", "model.activation_checkpointing=true")
    assert kept_bytes(frugal, cfg) < kept_bytes(plain, cfg) / 2


def kept_bytes(module: GLMAE, cfg: PretrainConfig) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(make_batch(cfg, 2))
    return sum(kept.values())


def test_bfloat16_autocast_stays_near_float32_and_its_terms_are_float32():
    cfg, module = build()
    exact = module(make_batch(cfg))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(make_batch(cfg))
    for name, value in rounded.items():
        assert value.dtype == torch.float32, name
        if name.startswith("loss"):
            torch.testing.assert_close(value, exact[name], rtol=0.02, atol=0.02, msg=name)


@tracing
def test_compiled_blocks_give_the_same_names_and_gradients():
    cfg, plain = build()
    _, compiled = build()
    compile_blocks(compiled, backend="aot_eager")
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert_equal(gradients(compiled, cfg), gradients(plain, cfg), 1e-5)


@tracing
@needs_compiler
def test_compiled_kernels_give_the_same_gradients():
    cfg, plain = build(*ONLY_LOCAL, "model.depth=1")
    _, compiled = build(*ONLY_LOCAL, "model.depth=1", "model.compile=true")
    assert_equal(gradients(compiled, cfg), gradients(plain, cfg), 1e-4)


@tracing
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("words", [(), ("model.activation_checkpointing=true",)])
def test_nothing_is_compiled_after_the_second_step_not_even_around_a_validation(words, bf16):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cfg, module = build(*words)
    compile_blocks(module, backend="aot_eager")
    held_out = make_batch(cfg, 1)
    graphs = []
    for step in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            gradients(module, cfg)
        module.update_teacher(0.99)
        if step in (0, 3):
            module.train(False)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                module(held_out, task="held_out")
            module.train(True)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[1]] * 5
    # Student and decoder see two kinds of view, with and without gradient; the teacher one. Last
    # blocks of decoder and teacher give fewer tokens.
    assert graphs[-1] <= 14
    torch._dynamo.reset()


def test_compiling_with_weights_in_pieces_is_refused():
    with pytest.raises(UserError, match=r"model\.compile: .*engine\.zero_stage 3"):
        tiny_config("model.compile=true", "engine.zero_stage=3")


class NoLookAtValues(TorchDispatchMode):
    """Fails where an operation brings a value to the host: on a device that is a wait.

    On a CPU it cannot see copies from device to host; `test_a_step_never_waits_for_the_device` can.
    """

    _LOOKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(look in str(function) for look in self._LOOKS), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [(), ("views.flips=0.5", "views.jitter_scale=0.2")])
def test_a_step_looks_at_no_value(words):
    cfg, module = build(*words)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    batch = make_batch(cfg)
    with NoLookAtValues():
        module(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        module.update_teacher(0.99)
    with pytest.raises(AssertionError), NoLookAtValues():
        float(module.center.sum())


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device(cuda):
    cfg, module = build()
    module.to(cuda)
    batch = {name: part.to(cuda) for name, part in make_batch(cfg).items()}
    module(batch)["loss"].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(batch)["loss"].backward()
        module.update_teacher(0.99)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_the_teacher_gives_needs_no_graph_and_can_be_saved_for_one():
    cfg, module = build()
    seen: list[bool] = []
    module.teacher_encoder.register_forward_hook(lambda *_: seen.append(_[2].is_inference()))
    gradients(module, cfg)
    assert seen == [True]
    assert not module.center.is_inference()
    assert not module.teacher_sum.is_inference()
