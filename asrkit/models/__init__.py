"""From a spec to an ``nn.Module``."""

from asrkit.models.asr import AsrModel
from asrkit.models.registry import load_model
from asrkit.models.spec import SIZES, ModelSpec

__all__ = ["SIZES", "AsrModel", "ModelSpec", "load_model"]
