"""A run directory made from another without training: parts taken out, put in or rearranged."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from asrkit.config import digest, to_dict
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.models import AsrModel
from asrkit.run_dir import (
    CONFIG,
    DIGESTS,
    LINEAGE,
    MODEL,
    TOKENIZER,
    WEIGHTS,
    RunDir,
    atomic_directory,
    sha256_of,
    write_yaml,
)
from asrkit.training.checkpoint import save_weights
from asrkit.training.run_writer import DONE, stage_entry


def write_untrained_run(
    out: Path,
    parent: RunDir,
    stage: str,
    settings: Mapping[str, Any],
    model: AsrModel,
    *,
    inputs: Mapping[str, Path] | None = None,
    extra: Mapping[str, Any] | None = None,
    command: str = "",
) -> Path:
    """Write ``model`` as a complete run directory that continues the lineage of ``parent``; returns ``out``.

    Everything is written beside ``out`` and renamed at the end, so that ``out`` is whole or not there.

    Args:
        settings: what the stage was told; config.yaml and the config digest are of these, the inputs and the parent.
        inputs: files other than the parent that went in, by the name of their option; the lineage holds their digests.
        extra: what else the lineage should say.

    Raises:
        UserError: ``out`` is taken or cannot be written.
    """
    began = time.monotonic()
    files: dict[str, Path | None] = dict(inputs or {})
    content = {
        "stage": stage,
        "from": str(parent.path),
        "from_weights_sha256": sha256_of(parent.path / WEIGHTS),
        **settings,
        "inputs": {name: str(file) for name, file in files.items()},
    }
    with atomic_directory(out) as folder:
        write_yaml(folder / CONFIG, content)
        write_yaml(folder / MODEL, to_dict(model.spec))
        Tokenizer(parent.tokenizer_path).copy_to(folder / TOKENIZER)
        save_weights(folder / WEIGHTS, model)
        entry = {
            **stage_entry(stage, digest(content), files, command),
            **(extra or {}),
            "metrics": {},
            "seconds": round(time.monotonic() - began, 1),
            **{key: sha256_of(folder / name) for key, name in DIGESTS.items()},
        }
        write_yaml(folder / LINEAGE, [*parent.lineage, entry])
        (folder / DONE).write_text("")
    return out
