"""`glmae VERB [CONFIG.yaml] [key=value ...]`: parse the words, build the config, run the job."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from glmae_ray import __version__
from glmae_ray.config import DemoConfig, DoctorConfig, ExportConfig, PretrainConfig
from glmae_ray.config_finetune import EvaluateConfig, FinetuneConfig, PredictConfig
from glmae_ray.config_loading import load
from glmae_ray.config_search import SearchConfig
from glmae_ray.config_store import IngestConfig, InspectConfig
from glmae_ray.config_train import JobConfig
from glmae_ray.errors import StoppedError, UserError
from glmae_ray.paths import is_url, publish, to_place

VERBS: dict[str, tuple[type[JobConfig], str]] = {
    "demo": (DemoConfig, "the whole path on phantom people, in minutes on 2 cores"),
    "ingest": (IngestConfig, "scans (source=...) into a Zarr store (store=...)"),
    "inspect": (InspectConfig, "what a store holds; with case=ID a picture and facts of a case"),
    "pretrain": (PretrainConfig, "a store into a pre-trained encoder; again to continue"),
    "finetune": (FinetuneConfig, "an encoder (init=...) and labels into a segmenter or classifier"),
    "tune": (SearchConfig, "a search over finetuning runs (search.FIELD=...); again to continue"),
    "evaluate": (EvaluateConfig, "a finetuned run against the labels of a split of a store"),
    "predict": (PredictConfig, "label maps (out=...) of scans (source=... or store=...)"),
    "export": (ExportConfig, "an encoder or a finetuned run as files for others (out=...)"),
    "doctor": (
        DoctorConfig,
        "whether a pre-training run can start, here or on a cluster; what it costs",
    ),
}
# What a verb prints, not what it does: no field of its config.
_JSON = {"json": "print one JSON object instead of text"}
FLAGS: dict[str, dict[str, str]] = {"inspect": _JSON, "doctor": _JSON}


def main(argv: list[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done; 2 the user can fix it (a line each on stderr); 1 anything else; 128 and the
        number of a signal, such as 130 and 143, where one asked it to stop.
    """
    words = _parser().parse_args(argv)
    kind, _ = VERBS[words.verb]
    flags = {f"as_{name}": getattr(words, name) for name in FLAGS.get(words.verb, {})}
    try:
        cfg = load(kind, words.words)
        if words.dry_run:
            print(json.dumps(cfg.model_dump(mode="json"), indent=2))
            return 0
        # A job brings Ray and torch with it: seconds that --help and a typo should not cost.
        importlib.import_module(f"glmae_ray.jobs.{words.verb}").run(cfg, **flags)
    except UserError as error:
        print(*(f"glmae {words.verb}: {line}" for line in error.lines), sep="\n", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except StoppedError as stopped:
        command = shlex.join(["glmae", *(sys.argv[1:] if argv is None else argv)])
        print(f"glmae {words.verb}: {stopped}; continue with: {command}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print(f"glmae {words.verb}: interrupted; the same command continues", file=sys.stderr)
        return 130
    except Exception as error:
        print(_failure(words.verb, cfg, error), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmae",
        description="Pre-train 3-D vision transformers on archives of CT and MR scans.",
        epilog="Every field of a config can be given as key=value, sections with dots: "
        "glmae pretrain configs/pretrain/base.yaml store=ct.zarr run=runs/a steps=2000",
    )
    parser.add_argument("--version", action="version", version=f"glmae-ray {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (kind, what) in VERBS.items():
        fields = ", ".join(kind.model_fields)
        sub = verbs.add_parser(verb, help=what, description=what, epilog=f"fields: {fields}")
        sub.add_argument("words", nargs="*", metavar="[CONFIG.yaml] key=value")
        sub.add_argument("--dry-run", action="store_true", help="print the config and stop")
        for name, effect in FLAGS.get(verb, {}).items():
            sub.add_argument(f"--{name}", action="store_true", help=effect)
    return parser


def _failure(verb: str, cfg: JobConfig, error: Exception) -> str:
    """One line for the screen; the whole story goes into the run folder where there is one."""
    story = "".join(traceback.format_exception(error))
    run = getattr(cfg, "run", "")
    if run and (is_url(run) or Path(run).is_dir()):
        log = to_place(run) / "error.log"
        with suppress(OSError, UserError):  # a folder that cannot be written may be the reason
            publish(log, story)
            reason = (str(error).strip().splitlines() or [repr(error)])[-1]
            return f"glmae {verb}: failed: {reason}\nrun: {log.parent}\nlog: {log}"
    return f"{story}glmae {verb}: failed: {error!r}"


if __name__ == "__main__":
    sys.exit(main())
