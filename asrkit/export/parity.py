"""Torch against the exported files, output by output, on what the model may hear. Nothing is published that fails it.

Shapes: N utterances or streams, T feature frames, T' encoder frames, c encoder frames of a chunk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from asrkit.data.features import LOG_EPS
from asrkit.errors import UserError
from asrkit.export.directory import CTC, DECODER, ENCODER, JOINER, DifferenceRecord
from asrkit.export.graphs import StateLayout
from asrkit.export.integers import layer_alone, layer_constants
from asrkit.export.runtime import ExportedModel, run_graph
from asrkit.frames import SUBSAMPLING, count_encoder_frames, count_window
from asrkit.models.asr import AsrModel
from asrkit.models.encoder import join_streams
from asrkit.nn.compression import CompressedLinear
from asrkit.nn.context import Context

# Of the largest magnitude. Float32 kernels that add in another order stay a hundred times below it.
TOLERANCE = 1e-4
# With integer inputs, a number that lies between two codes falls to either side, and what follows moves by a step. So each
# layer must agree by itself to the last bit, and the whole model on average, to this share of a step (which is 1/127 at 8 bits).
SHARE_OF_STEP = 0.64
EXACT, LAYERS = "integer products, layer by layer", "other compressed layers, one by one"
VOCABULARY = (f"{CTC}: log_probs", f"{JOINER}: logit")  # outputs with a column for each token
MAX_CHUNKS = 200


@dataclass
class Differences:
    """Absolute differences gathered by output, as ``file: output``.

    ``input_bits``: of the coarsest inputs that layers round to, None where all are float. ``ignored``: columns of logits and
    log-probabilities that are not compared.
    """

    input_bits: int | None = None
    ignored: Collection[int] = ()
    _parts: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, output: str, expected: Tensor, computed: Tensor) -> None:
        """Note torch's ``expected`` and what the exported file ``computed``.

        Raises:
            UserError: their shapes differ.
        """
        if expected.shape != computed.shape:
            raise UserError(
                f"{output}: shape {tuple(computed.shape)} in the exported file but {tuple(expected.shape)} in torch; {_REPORT}"
            )
        if output in VOCABULARY and self.ignored:
            columns = [column for column in range(expected.shape[-1]) if column not in self.ignored]
            expected, computed = expected[..., columns], computed[..., columns]
        self._parts[output].append((expected.double(), computed.double()))

    def _measured(self) -> dict[str, dict[str, Any]]:
        """The fields of each output's record, as they are: a difference may be NaN, which a record refuses."""
        measured = {}
        for output, parts in self._parts.items():
            gaps = torch.cat([(a - b).abs().flatten() for a, b in parts])
            magnitude = max(float(a.abs().max()) for a, _ in parts)
            measured[output] = {"max": float(gaps.max()), "mean": float(gaps.mean()), "magnitude": magnitude}
            measured[output] |= self._tolerated(output)
        return measured

    def _tolerated(self, output: str) -> dict[str, Any]:
        if output == EXACT or output.endswith(("_lens", "frame counter")):
            return {"measure": "max", "tolerance": 0.0}
        if self.input_bits is not None and output not in (LAYERS, f"{DECODER}: decoder_out"):
            return {"measure": "mean", "tolerance": SHARE_OF_STEP / (2 ** (self.input_bits - 1) - 1)}
        return {"measure": "max", "tolerance": TOLERANCE}

    def check(self) -> dict[str, DifferenceRecord]:
        """By output: greatest and mean difference, the greatest magnitude of torch's numbers, and what is tolerated.

        Raises:
            UserError: a line for each output that is not.
        """
        measured = self._measured()
        findings = [
            f"{output}: the exported file differs from torch by up to {one['max']:.2g} (mean {one['mean']:.2g}) where "
            f"numbers reach {one['magnitude']:.2g}; {_REPORT}"
            for output, one in measured.items()
            if not one[one["measure"]] <= one["tolerance"] * max(1.0, one["magnitude"])  # NaN fails too
        ]
        if findings:
            raise UserError.of(findings)
        return {output: DifferenceRecord(**one) for output, one in measured.items()}


_REPORT = "nothing was exported; try another version of the runtime, and report this with the versions of both"


@torch.no_grad()
def compare_layers(layers: Mapping[str, CompressedLinear], directory: Path, differences: Differences) -> None:
    """Each compressed layer by itself, with inputs of all sizes (integer products must agree to the last bit), and its codes,
    scales and masks in the files, number by number.

    Raises:
        UserError: the runtime cannot express a layer, a layer computes something else, or a file holds something else.
    """
    from onnx import load, numpy_helper

    stored: dict[str, dict[str, Any]] = {}
    for onnx_file in sorted(directory.glob("*.onnx")):
        stored[onnx_file.name] = {tensor.name: tensor for tensor in load(onnx_file).graph.initializer}
    generator = torch.Generator().manual_seed(1)
    findings = []
    for path, layer in layers.items():
        x = torch.randn(3, 7, layer.in_features, generator=generator) * torch.logspace(-3, 1, 7).view(1, 7, 1)
        x[0, 0] = 0.0
        integers = layer.how.activations is not None and layer.multiplies_integers
        expected, computed = layer(x), run_graph(layer_alone(path, layer), x)
        differences.add(EXACT if integers else LAYERS, expected, computed)
        if not (expected - computed).abs().max() <= (0.0 if integers else TOLERANCE * expected.abs().max()):
            findings.append(f"{path}: computes something else in onnxruntime than in torch; {_REPORT}")
        constants = layer_constants(path, layer)
        holding = [file for file, tensors in stored.items() if any(name in tensors for name in constants)]
        for file in holding:
            for name, array in constants.items():
                tensor = stored[file].get(name)
                if tensor is None or not np.array_equal(numpy_helper.to_array(tensor), array):
                    findings.append(f"{file}: {name} is not what was trained; {_REPORT}")
        if not holding:
            findings.append(f"{path}: its integers and masks are in no file; {_REPORT}")
    if findings:
        raise UserError.of(findings)


@torch.no_grad()
def compare_offline(
    model: AsrModel, variant: str, onnx: ExportedModel, features: Tensor, feature_lens: Tensor, differences: Differences
) -> None:
    """Whole utterances (N, T, 80), (N,), together and the last one alone."""
    for rows, length in ((slice(None), features.shape[1]), (slice(-1, None), int(feature_lens[-1]))):
        x, x_lens = features[rows, :length], feature_lens[rows]
        encoder_out, lens = model.encode(x, x_lens, variant)
        for file, name, expected in (
            (ENCODER, "encoder_out", model.joiner.project_encoder(encoder_out)),
            (CTC, "log_probs", model.ctc_log_probs(encoder_out)),
        ):
            out, out_lens = onnx.encode(file, x, x_lens)
            differences.add(f"{file}: {name}", expected, out)
            differences.add(f"{file}: {name}_lens", lens, out_lens)


@torch.no_grad()
def compare_streaming(
    model: AsrModel, variant: str, context: Context, onnx: ExportedModel, features: Tensor, differences: Differences
) -> None:
    """Chunk by chunk, the torch loop with its caches against the flat states: features (N, T, 80).

    The last stream begins later than the others, and ends within its last chunk.
    """
    assert context.chunk is not None
    size, submodels = context.chunk, model.submodels_of(variant)
    layout = StateLayout(model, submodels, context.left)
    count = count_encoder_frames(features.shape[1]) // size
    late, rows = max(1, count // 3), len(features) - 1
    caches = model.encoder.initial_caches(rows, context.left, submodels)
    states = dict.fromkeys((ENCODER, CTC), onnx.initial_state(rows))
    for number in range(count):
        if number == late:
            caches = join_streams([caches, model.encoder.initial_caches(1, context.left, submodels)])
            states = {file: torch.cat([state, onnx.initial_state(1)], dim=1) for file, state in states.items()}
        begin = SUBSAMPLING * size * number
        x = features[: len(caches.frames), begin : begin + count_window(size)]
        missing = torch.zeros(len(x), dtype=torch.int64)
        if number == count - 1:
            missing[-1] = size // 2
        encoder_out, caches = model.streaming_step(x, caches, variant, size - missing)
        for file, name, state_name, expected in (
            (ENCODER, "encoder_out", "next_h", model.joiner.project_encoder(encoder_out)),
            (CTC, "log_probs", "next_key", model.ctc_log_probs(encoder_out)),
        ):
            out, states[file] = onnx.step(file, x, states[file], missing)
            differences.add(f"{file}: {name}", expected, out)
            if number in (0, late, count - 1):
                count_expected, expected = layout.pack(caches).unsqueeze(0).split([1, layout.size - 1], dim=2)
                count_computed, out = states[file].split([1, layout.size - 1], dim=2)
                differences.add(f"{file}: {state_name}, frame counter", count_expected, count_computed)
                differences.add(f"{file}: {state_name}", expected, out)


@torch.no_grad()
def compare_predictor_and_joiner(
    model: AsrModel, onnx: ExportedModel, joiner_in: Tensor, differences: Differences
) -> None:
    """Every token in a context, the start's -1 too, each joined with a frame of ``joiner_in`` (frames, J)."""
    tokens = torch.arange(-1, model.vocab_size)
    contexts = torch.stack([tokens.roll(-shift) for shift in range(model.context_size)], dim=1)
    predicted = model.joiner.project_predictor(model.predictor(contexts))
    differences.add(f"{DECODER}: decoder_out", predicted, onnx.predict(contexts))
    frames = joiner_in[torch.arange(len(tokens)) % len(joiner_in)]
    differences.add(f"{JOINER}: logit", model.joiner(frames, predicted), onnx.join(frames, predicted))


def random_log_mel(model: AsrModel, num_frames: int, count: int = 3, seed: int = 1) -> Tensor:
    """(count, num_frames, 80) that looks like the model's training data: its mean and deviation in each band, loudness
    and color that wander, pauses, and digital silence."""
    generator = torch.Generator().manual_seed(seed)
    bins = model.spec.features.num_mel_bins
    steps = torch.randn(count, num_frames, bins, generator=generator)
    wandering = torch.zeros_like(steps)
    for t in range(num_frames):
        wandering[:, t] = 0.9 * wandering[:, max(0, t - 1)] + 0.436 * steps[:, t]
    loudness = torch.repeat_interleave(torch.randn(count, num_frames // 20 + 1, 1, generator=generator), 20, dim=1)
    normalize = model.encoder.normalize
    features = normalize.mean + normalize.std * (wandering + loudness[:, :num_frames])
    features[:, num_frames // 2 : num_frames // 2 + 20] = LOG_EPS
    return features.clamp(min=LOG_EPS)


def streaming_frames(model: AsrModel, variant: str, context: Context) -> int:
    """Feature frames in which every mask of a streaming variant takes all its forms."""
    assert context.chunk is not None
    layout = StateLayout(model, model.submodels_of(variant), context.left)
    # A third passes before the last stream begins; the others turn their counter round at least once.
    chunks = 3 + 3 * (context.left + 2 * layout.period) // (2 * context.chunk)
    return count_window(context.chunk * min(max(chunks, 6), MAX_CHUNKS))
