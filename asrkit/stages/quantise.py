"""quantise: a trained model's weights as integers, without training: the baseline that quantisation-aware training must beat."""

from __future__ import annotations

from pathlib import Path

from asrkit.config import to_dict
from asrkit.errors import UserError
from asrkit.models import load_model
from asrkit.models.compress import QuantisationConfig, quantised_spec, rebuilt
from asrkit.run_dir import occupied, open_run
from asrkit.training.derived import derive_run


def quantise(parent: Path, out: Path, settings: QuantisationConfig, *, command: str = "") -> Path:
    """Write the run directory ``out``, the model of ``parent`` with the chosen layers quantised; returns ``out``.

    Raises:
        UserError: an unusable parent or ``out``, or layers that cannot be quantised so.
    """
    if findings := occupied(out):
        raise UserError.of(findings)
    source = open_run(parent)
    origin = load_model(source)
    model = rebuilt(quantised_spec(origin, settings), origin)
    return derive_run(out, source, "quantise", to_dict(settings), model, command=command)
