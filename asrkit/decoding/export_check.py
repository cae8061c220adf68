"""The check of an export before it is published: every output of every file, and the tokens found in them, against torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import islice
from pathlib import Path

import torch

from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.manifests import open_cuts
from asrkit.data.shar import shards_of
from asrkit.decoding.acoustic import TorchAcousticModel
from asrkit.decoding.exported import ExportedAcousticModel
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.search import Method, search
from asrkit.errors import UserError
from asrkit.export.directory import CTC, ENCODER, ParityRecord, TokenRecord
from asrkit.export.parity import (
    Differences,
    compare_layers,
    compare_offline,
    compare_predictor_and_joiner,
    compare_streaming,
    random_log_mel,
    streaming_frames,
)
from asrkit.nn.compression import CompressedLinear
from asrkit.reporting.wer import ErrorCounts, align, count
from asrkit.run_dir import RunDir

OFFLINE_FRAMES = 400  # feature frames of the longest random utterance
SEARCHES: tuple[Method, ...] = ("greedy", "ctc")
MAX_CUTS, MAX_SECONDS = 4, 20.0  # recordings decoded in the check


def check_export(
    original: TorchAcousticModel,
    exported: ExportedAcousticModel,
    recordings: Batch | None,
    layers: Mapping[str, CompressedLinear],
    written: Mapping[str, CompressedLinear],
    special_ids: Collection[int],
) -> ParityRecord:
    """Compare an export with the model it was made from, on random features and on ``recordings``.

    Each layer of ``written``, which the files hold as it is, is compared by itself; of the model, whose compressed ``layers``
    they imitate, every output of every file, and the tokens that greedy searches find. ``special_ids`` are left out: both
    have given them logits that no other number should be measured by.

    Raises:
        UserError: an output differs by more than the tolerance, or a token differs.
    """
    model, context = original.model, original.context
    variant = original.variant or model.spec.variant
    input_bits = [layer.how.activations.bits for layer in layers.values() if layer.how.activations is not None]
    differences = Differences(min(input_bits, default=None), set(special_ids) - {model.blank})
    if written:
        compare_layers(written, exported.onnx.path, differences)
    num_frames = streaming_frames(model, variant, context) if context.streaming else OFFLINE_FRAMES
    features = random_log_mel(model, num_frames)
    lens = torch.tensor([num_frames, num_frames * 2 // 3, num_frames // 4])
    if context.streaming:
        compare_streaming(model, variant, context, exported.onnx, features, differences)
    else:
        compare_offline(model, variant, exported.onnx, features, lens, differences)
    inputs = {"random log-mel": (features, lens)}
    if recordings is not None:
        inputs[", ".join(recordings.cut_ids)] = (recordings.features, recordings.feature_lens)
    outputs = {name: (original.encode(*batch), exported.encode(*batch)) for name, batch in inputs.items()}
    for expected, computed in outputs.values():
        assert expected.ctc_log_probs is not None and computed.ctc_log_probs is not None
        differences.add(f"{ENCODER}: encoder_out", expected.joiner_in, computed.joiner_in)
        differences.add(f"{CTC}: log_probs", expected.ctc_log_probs, computed.ctc_log_probs)
    joiner_in = next(iter(outputs.values()))[0].joiner_in[0]
    compare_predictor_and_joiner(model, exported.onnx, joiner_in, differences)
    records = differences.check()
    tokens: dict[str, TokenRecord] = {}
    for method in SEARCHES:
        total = ErrorCounts()
        for name, (expected, computed) in outputs.items():
            pairs = zip(
                search(original, expected, method, special_ids=special_ids),
                search(exported, computed, method, special_ids=special_ids),
                strict=True,
            )
            errors = sum((count(align(_symbols(ref), _symbols(hyp))) for ref, hyp in pairs), ErrorCounts())
            # Inputs that round to one code in torch and to the next in the runtime tip a token that is as good as another.
            if errors.errors and not input_bits:
                raise UserError(
                    f"{method}: the exported files give other tokens than torch in {name} ({errors.errors} of "
                    f"{errors.words}), though every output agrees; nothing was exported; report this with the versions of "
                    "both"
                )
            total += errors
        tokens[method] = TokenRecord(tokens=total.words, differing=total.errors)
    return ParityRecord(heard=list(inputs), outputs=records, tokens=tokens)


def recordings_of(run: RunDir, warn: Callable[[str], None]) -> Batch | None:
    """A few short cuts of the first manifest or Shar directory of the lineage, the last stages first, that can still be read."""
    manifests = dict.fromkeys(Path(name) for entry in reversed(run.lineage) for name in entry.get("manifests") or {})
    unread = []
    for path in manifests:
        if not shards_of(path) and not (path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file()):
            continue
        try:
            cuts = list(islice((cut for cut in open_cuts(path) if cut.duration < MAX_SECONDS), MAX_CUTS))
            if (batch := next(evaluation_batches(cuts, MAX_CUTS * MAX_SECONDS), None)) is not None:
                return batch
            unread.append(f"{path}: no cut is shorter than {MAX_SECONDS:.0f} s")
        except Exception as error:  # audio that has moved raises whatever its reader does
            unread.append(f"{path}: {(str(error).splitlines() or [type(error).__name__])[0]}")
    reasons = "; ".join(unread) or "none of the manifests in its lineage is here"
    warn(
        f"{run.path}: the check runs on random features only, not on recordings ({reasons}); to include recordings, export from "
        "the folder that the lineage's paths are relative to"
    )
    return None


def _symbols(hypothesis: Hypothesis) -> list[str]:
    return [str(token) for token in hypothesis.tokens]
