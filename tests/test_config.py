"""The config tree, its loading, and the command line that uses both."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks._compare_config import CompareConfig
from glmae_ray.cli import VERBS, main
from glmae_ray.config import LossConfig, PretrainConfig
from glmae_ray.config_finetune import FinetuneConfig
from glmae_ray.config_loading import load
from glmae_ray.config_model import PRESETS
from glmae_ray.config_store import IngestConfig
from glmae_ray.errors import UserError
from tests.conftest import tiny_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*/*.yaml"))


def mistakes(*words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(PretrainConfig, ["store=s", "run=r", "steps=10", "global_batch=8", *words])
    return list(caught.value.lines)


def test_a_word_overrides_the_file_and_a_later_word_the_earlier(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\nglobal_batch: 2\noptim: {base_lr: 1e-4}\n")
    cfg = load(PretrainConfig, [str(path), "store=s", "run=007", "steps=6", "steps=7"])
    assert (cfg.steps, cfg.global_batch, cfg.run) == (7, 2, "007")
    assert cfg.optim.base_lr == 1e-4  # PyYAML reads this as text


def test_every_mistake_is_told_at_once_with_its_path_and_value():
    lines = mistakes(
        "views.globl_size=3", "views.local_size=50", "model.width=100", "seed=x", "typo"
    )
    assert len(lines) == 6
    assert any("typo" in line and "key=value" in line for line in lines)
    assert any(line.startswith("views.globl_size: unknown key") for line in lines)
    assert any("did you mean global_size" in line for line in lines)
    assert any(line.startswith("seed: 'x'") for line in lines)
    assert "views.local_size: (50, 50, 50) is not a multiple of model.patch (16, 16, 16)" in lines
    assert any(line.startswith("model.width: 100 is not divisible by 6") for line in lines)


def test_a_rule_about_a_field_that_is_wrong_itself_stays_silent():
    lines = mistakes("model.patch=[a,b,8]", "views.local_size=40")
    assert len(lines) == 1
    assert lines[0].startswith("model.patch: 'a'")


def test_missing_fields_are_named_and_the_rules_between_the_others_speak():
    with pytest.raises(UserError) as caught:
        load(PretrainConfig, ["store=s", "views.local_scale=[0.5,0.2]"])
    text = str(caught.value)
    for name in ("run", "steps", "global_batch"):
        assert f"{name}: is missing" in text
    assert "views.local_scale: 0.5 has to be below 0.2" in text


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("resources.workers=3", "global_batch: 8 is not a multiple of resources.workers 3"),
        ("engine.micro_batch=3", "global_batch: 8 is not a multiple of engine.micro_batch 3"),
        ("resources.workers=[2,3]", "global_batch: 8 is not a multiple of resources.workers 3"),
        ("resources.workers=[3,1]", "resources.workers: [3, 1] is wrong: the least come first"),
        ("resources.workers=0", "resources.workers: 0 is wrong: it has to be a number from 1 on"),
        ("resources.workers=many", "resources.workers: 'many' is wrong: it has to be a number"),
        ("resources.workers=[1,2,3]", "resources.workers: [1, 2, 3] is wrong: it has to be a"),
        ("resources.workers=[0,2]", "resources.workers: [0, 2] is wrong: it has to be a number"),
        ("resources.workers={least: 1}", "resources.workers: {'least': 1} is wrong: it has to"),
        ("views.local_size=16", "holds one patch"),
        ("loss={w_rl: 0, w_rg: 0, w_gg: 0, w_gl: 0}", "every weight is 0"),
        ("optim.warmup_steps=11", "is more than steps 10"),
        ("engine.precision=int8", "'float32', 'bf16' or 'fp16'"),
        ("steps.more=1", "steps.more: steps is not a section"),
        ("views=3", "views: 3 is wrong"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_one_clear_line(word, line):
    lines = mistakes(word)
    assert len(lines) == 1
    assert line in lines[0]


def test_fewer_micro_batches_than_workers_are_one_clear_line():
    (line,) = mistakes("resources.workers=[1,9]", "engine.micro_batch=1")
    assert line == "global_batch: 8 is less than resources.workers 9 times engine.micro_batch 1"


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (PretrainConfig, "store"),
        (PretrainConfig, "run"),
        (PretrainConfig, "init"),
        (PretrainConfig, "probe.targets"),
        (PretrainConfig, "ray.address"),
        (FinetuneConfig, "store"),
        (IngestConfig, "source"),
    ],
)
def test_a_password_in_a_url_is_refused_and_not_shown(kind, field, tmp_path):
    path = tmp_path / "run.yaml"
    *sections, leaf = field.split(".")
    tree = {leaf: "s3://someone:hunter2@bucket/a"}
    for section in reversed(sections):
        tree = {section: tree}
    path.write_text(yaml.safe_dump(tree))
    needed = {"store": "s", "run": "r", "source": "d", "init": "none"}
    known = [f"{k}={v}" for k, v in needed.items() if k in kind.model_fields and k != field]
    more = ["steps=1", "global_batch=1"] if "steps" in kind.model_fields else []
    with pytest.raises(UserError) as caught:
        load(kind, [str(path), *known, *more])
    told = f"{field}: has a password in its URL; credentials come from the environment"
    assert len([line for line in caught.value.lines if line.startswith(told)]) == 1
    assert "hunter2" not in str(caught.value)


def test_keys_are_no_fields_and_are_not_shown():
    (line,) = mistakes("aws_secret_access_key=hunter2")
    assert line.startswith("aws_secret_access_key: unknown key")
    assert "hunter2" not in line


def test_a_config_file_that_cannot_be_read_is_named(tmp_path):
    broken, listing = tmp_path / "broken.yaml", tmp_path / "list.yaml"
    broken.write_text("a: [")
    listing.write_text("- a")
    for path, why in (
        (tmp_path / "no.yaml", "No such file"),
        (broken, "not YAML"),
        (listing, "list"),
    ):
        with pytest.raises(UserError, match=why) as caught:
            load(PretrainConfig, [str(path)])
        assert str(path) in str(caught.value)


def test_a_preset_fills_what_is_not_stated():
    cfg = tiny_config()
    assert cfg.model.width == 24
    for name, numbers in PRESETS.items():
        model = load(PretrainConfig, ["store=s", "run=r", "steps=1", "global_batch=1",
                                      f"model.preset={name}", "model.depth=1"]).model  # fmt: skip
        assert model.model_dump().items() >= (numbers | {"depth": 1}).items()


def test_batch_arithmetic_follows_from_the_global_batch():
    cfg = tiny_config("global_batch=24", "resources.workers=3", "engine.micro_batch=2")
    assert (cfg.micro_batch, cfg.accumulation) == (2, 4)
    assert tiny_config("global_batch=24", "resources.workers=3").micro_batch == 8
    assert tiny_config("global_batch=512").lr == pytest.approx(2 * 1.5e-4)
    assert tiny_config("steps=1600").warmup_steps == 40


def test_a_range_of_workers_is_the_least_and_the_most():
    cfg = tiny_config("resources.workers=[1,3]", "global_batch=6")
    assert cfg.resources.workers == (1, 3)
    assert (cfg.resources.least, cfg.resources.most, cfg.workers) == (1, 3, 3)
    assert PretrainConfig.model_validate_json(cfg.model_dump_json()) == cfg
    assert tiny_config("resources.workers=03", "global_batch=6").resources.workers == 3


@st.composite
def batches(draw) -> tuple[PretrainConfig, int]:
    """A run that states its micro-batch, or leaves it to the most of its workers; and a step."""
    micro, most = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    states_micro = draw(st.booleans())
    turns = draw(st.integers(most, 30)) if states_micro else most * draw(st.integers(1, 4))
    words = [f"global_batch={turns * micro}", f"resources.workers=[1,{most}]"]
    cfg = tiny_config(*words, *([f"engine.micro_batch={micro}"] if states_micro else []))
    return cfg.on(draw(st.integers(1, most))), draw(st.integers(0, 1000))


@given(batches())
def test_every_sample_of_a_step_counts_once_on_any_number_of_workers(drawn):
    cfg, step = drawn
    turns = range(step * cfg.accumulation, (step + 1) * cfg.accumulation)
    everyone = [(rank, turn) for rank in range(cfg.workers) for turn in turns]
    weights = [cfg.weight_of(turn, rank=rank) for rank, turn in everyone]
    of_step = range(step * cfg.global_batch, (step + 1) * cfg.global_batch)
    made = [cfg.samples_of(turn, rank=rank) for rank, turn in everyone]
    assert all(len(samples) == cfg.micro_batch and set(samples) <= set(of_step) for samples in made)
    counted = [n for samples, weight in zip(made, weights, strict=True) if weight for n in samples]
    assert sorted(counted) == list(of_step)
    assert len(set(weights) - {0.0}) == 1  # each sample counts alike
    assert sum(weights) / len(weights) == pytest.approx(1)


@given(batches())
def test_what_one_worker_computes_at_a_time_stays_where_workers_come_and_go(drawn):
    cfg, _ = drawn
    alone = cfg.on(1)
    assert alone.micro_batch == cfg.micro_batch
    assert (alone.turns, alone.accumulation) == (cfg.turns, cfg.turns)
    # As in a checkpoint of that many workers.
    assert PretrainConfig.model_validate(cfg.model_dump(mode="json")) == cfg


def test_an_ablation_uses_only_what_its_weights_ask_for():
    local_mae = LossConfig(w_rg=0, w_gg=0, w_gl=0)
    assert (local_mae.kinds, local_mae.uses_teacher) == (("local",), False)
    local_to_teacher = LossConfig(w_rl=0, w_rg=0, w_gg=0)
    assert local_to_teacher.kinds == ("local", "global")
    assert local_to_teacher.masked_kinds == ("local",)
    assert local_to_teacher.reconstructed == ()


def test_split_shares_have_to_sum_to_one():
    with pytest.raises(UserError, match=r"sum to 1\.1, not 1"):
        load(IngestConfig, ["source=a", "store=b", "splits=[0.9,0.1,0.1]"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_shipped_config_loads_and_opens_with_its_command(path):
    kind = CompareConfig if path.parent.name == "compare" else VERBS[path.parent.name][0]
    names = {"store": "s", "run": "r", "source": "x", "init": "e", "targets": "t.csv", "out": "o"}
    required = names.items()
    words = [f"{key}={value}" for key, value in required if key in kind.model_fields]
    load(kind, [str(path), *words])
    first, *rest = path.read_text().splitlines()
    assert first.startswith("#")
    assert f"configs/{path.parent.name}/{path.name}" in first
    assert len(rest) < 40


# Of the paper's Table I: crop along Z, Y, X, spacing in mm along the same, window in HU.
TABLE = {
    "btcv": ((96, 96, 96), (1.5, 1.5, 1.5), (-175, 250)),
    "mmwhs": ((96, 96, 96), (1.5, 1.5, 1.5), (0, 1700)),
    "spleen": ((96, 96, 96), (1.5, 1.5, 1.5), (-175, 250)),
    "amos": ((96, 96, 96), (1.5, 1.5, 1.5), (-175, 250)),
    "word": ((96, 96, 96), (1.5, 1.5, 1.5), (-175, 250)),
    "covid": ((32, 192, 192), (5, 1.25, 1.25), (-1000, 500)),
    # 120 planes are no multiple of the patch, 16.
    "braintumour": ((112, 224, 224), (1, 1, 1), "zscore"),
    "ccccii": ((32, 384, 384), None, (0, 255)),
}


@pytest.mark.parametrize("name", TABLE)
def test_recipes_have_the_numbers_of_the_table(name):
    size, spacing, intensity = TABLE[name]
    words = ["store=s", "run=r", "init=e", *(["targets=t.csv"] if name == "ccccii" else [])]
    cfg = load(FinetuneConfig, [f"configs/finetune/{name}.yaml", *words])
    assert (cfg.crops.size, cfg.crops.spacing) == (size, spacing)
    assert intensity in (cfg.crops.intensity, cfg.crops.window)
    if cfg.task == "segmentation":
        assert cfg.head.feature_size == 48


def test_dry_run_prints_the_resolved_config_and_does_nothing(tmp_path, capsys):
    words = ["pretrain", "--dry-run", f"store={tmp_path}/s", "run=r", "steps=3", "global_batch=2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["model"]["width"] == 768
    assert PretrainConfig.model_validate(yaml.safe_load(printed)).steps == 3
    assert list(tmp_path.iterdir()) == []


def test_mistakes_exit_with_2_and_name_the_verb(capsys):
    assert main(["pretrain", "store=s"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert all(line.startswith("glmae pretrain: ") for line in streams.err.splitlines())


def test_help_and_mistakes_answer_within_half_a_second_and_without_torch():
    for words in (["--help"], ["pretrain", "no=1"]):
        code = (
            "import sys; from glmae_ray.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "heavy = {'torch', 'ray', 'zarr', 'pyarrow', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        # The bound is on a machine with nothing else to do, so the best of three counts.
        best = min(_seconds([sys.executable, "-c", code, *words]) for _ in range(3))
        assert best < 0.5


def _seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began
