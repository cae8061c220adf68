"""submodel list: the sub-models of a run. Read from its files, without torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from asrkit.config import to_dict
from asrkit.models.registry import spec_of
from asrkit.models.sizes import part_of
from asrkit.run_dir import open_run


def describe_submodels(path: Path) -> dict[str, Any]:
    """The sub-models and variants of a run, as plain data.

    Raises:
        UserError: the directory is incomplete or damaged.
    """
    run = open_run(path)
    spec = spec_of(run)
    shapes = run.tensor_shapes()
    submodels = [
        {
            "name": name,
            **to_dict(submodel),
            "parameters": sum(math.prod(shape) for key, shape in shapes.items() if part_of(key) == f"submodel {name}"),
            "variants": [key for key, variant in spec.variants.items() if name in variant.submodels],
        }
        for name, submodel in spec.submodels.items()
    ]
    return {"path": str(path), "submodels": submodels, "variants": to_dict(spec)["variants"], "variant": spec.variant}
