"""quantize: a trained model's weights as integers, without training: the baseline that quantization-aware training must beat."""

from __future__ import annotations

from pathlib import Path

from asrkit.config import to_dict
from asrkit.errors import UserError
from asrkit.models import load_model
from asrkit.models.compression import QuantizationConfig, quantized_spec
from asrkit.models.surgery import rebuild
from asrkit.run_dir import occupied, open_run
from asrkit.training.run_writer import write_untrained_run


def quantize(parent: Path, out: Path, settings: QuantizationConfig, *, command: str = "") -> Path:
    """Write the run directory ``out``, the model of ``parent`` with the chosen layers quantized; returns ``out``.

    Raises:
        UserError: an unusable parent or ``out``, or layers that cannot be quantized so.
    """
    if findings := occupied(out):
        raise UserError.of(findings)
    source = open_run(parent)
    origin = load_model(source)
    model = rebuild(quantized_spec(origin, settings), origin)
    return write_untrained_run(out, source, "quantize", to_dict(settings), model, command=command)
