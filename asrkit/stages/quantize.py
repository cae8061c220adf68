"""quantize: convert a trained model's weights to integers without training, as a baseline for quantization-aware training."""

from __future__ import annotations

from pathlib import Path

from asrkit.config import to_dict
from asrkit.disk import occupied
from asrkit.errors import UserError
from asrkit.models import load_model
from asrkit.models.compression import QuantizationConfig, quantized_spec
from asrkit.models.surgery import rebuild
from asrkit.run_dir import open_run
from asrkit.training.run_writer import write_untrained_run


def quantize(parent: Path, out: Path, settings: QuantizationConfig, *, command: str = "") -> Path:
    """Write the run directory ``out``, the model of ``parent`` with the selected layers quantized; returns ``out``.

    Raises:
        UserError: an unusable parent or ``out``, or layers that cannot be quantized that way.
    """
    if findings := occupied(out):
        raise UserError.of(findings)
    source = open_run(parent)
    origin = load_model(source)
    model = rebuild(quantized_spec(origin, settings), origin)
    return write_untrained_run(out, source, "quantize", to_dict(settings), model, command=command)
