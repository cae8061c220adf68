"""What commands that only look at files import, and that they count what the modules would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asrkit.config import to_dict
from asrkit.models import load_model
from asrkit.models.compression import linear_layers
from asrkit.models.registry import spec_of
from asrkit.models.sizes import linear_paths, sizes, stored_sizes
from asrkit.reporting.results import RESULT, Errors, Result
from asrkit.run_dir import WEIGHTS, open_run, sha256_of
from helpers.small_runs import SUBMODELS, write_run

HEAVY = ("torch", "lhotse", "k2", "onnxruntime")
# Runs the command line and then prints which of the heavy packages it imported.
LOOK = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr))
from asrkit.cli import main
main()
"""
COMPRESSION: dict[str, Any] = {
    "encoder.blocks.0.conv.out": {"mask": {"keep": 2, "group": 4}, "weights": {"bits": 4}},
    "encoder.blocks.0.feedforward1.narrow": {"weights": {"bits": 8, "scale": "tensor"}, "activations": {"bits": 8}},
    "encoder.blocks.0.feedforward2.narrow": {"weights": {"bits": 4, "scale": "block", "block_size": 8}},
    "encoder.blocks.0.feedforward2.widen": {"mask": {"sparsity": 0.5, "block": [4, 1]}},
    "encoder.submodels.near.layers.0.query": {"weights": {"bits": 2, "symmetric": False}},
    "joiner.out": {"mask": {"sparsity": 0.5}},
    "ctc_head": {"weights": {"bits": 2}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with sub-models, languages, a training-only head, masks and integers, and an evaluation."""
    variants = {**SUBMODELS["variants"], "dense": {"masks": False}, "float": {"integers": False}}
    heads = {"phones": {"unit": "phone", "classes": 9, "hidden": 8}}
    spec = {**SUBMODELS, "variants": variants, "compression": COMPRESSION, "languages": ["en", "fr"], "heads": heads}
    path = write_run(tmp_path_factory.mktemp("exp") / "run", spec, layers=2)
    total = Errors(utterances=2, words=8, wer=0.25, wer_95=(0.1, 0.4), substitutions=2, insertions=0, deletions=0,
                   characters=40, cer=0.1)  # fmt: skip
    result = Result(
        run=str(path), weights_sha256=sha256_of(path / WEIGHTS), variant="near", context="full", latency_ms=None,
        manifest="dev.jsonl.gz", manifest_sha256=None, method="greedy", beam=None, total=total, languages={},
        emission_latency=None, audio_seconds=2.0, decode_seconds=1.0, real_time_factor=0.5, device="cpu", threads=1, warnings=[],
    )  # fmt: skip
    file = path / "evaluation" / "dev" / RESULT
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(to_dict(result)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["--help"], ["config"], ["config", "train-backbone"], ["info", "RUN"], ["info", "RUN", "--json"], ["summary", "RUN"], ["submodel", "list", "RUN"]]
)  # fmt: skip
def test_commands_that_only_look_import_neither_torch_nor_lhotse(run: Path, command: list[str]) -> None:
    arguments = [str(run) if word == "RUN" else word for word in command]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout and done.stderr.splitlines()[-1].strip() == "imported:"


def test_sizes_from_files_are_those_of_the_modules(run: Path) -> None:
    opened = open_run(run)
    spec, model = spec_of(opened), load_model(opened)
    assert sorted(linear_paths(opened.tensor_shapes())) == sorted(linear_layers(model))
    for variant in spec.variants:
        model.select(variant)
        assert stored_sizes(opened, spec, variant) == sizes(model)
