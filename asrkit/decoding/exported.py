"""An exported directory as an acoustic model: the same searches and commands as for torch.

Shapes: B utterances or streams, T feature frames of 10 ms, T' encoder frames of 40 ms, c encoder frames of a chunk,
N hypotheses of any utterances, J joiner dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from asrkit.data.features import LOG_EPS
from asrkit.decoding.acoustic import EncoderOutput
from asrkit.export.directory import CTC, ENCODER
from asrkit.export.runtime import ExportedModel
from asrkit.frames import SUBSAMPLING, count_window
from asrkit.nn.conformer import subsampled_lens
from asrkit.nn.context import Context

States = dict[str, Tensor]  # by file


class ExportedAcousticModel:
    """The files of an exported directory as an ``AcousticModel``, in the context they are fixed to.

    The transducer's encoder and CTC are files of their own, each with the whole encoder; what is not loaded
    is not computed: ``joiner_in`` is then (B, T', 0), or ``ctc_log_probs`` (B, 0, V).
    """

    blank = 0

    def __init__(self, onnx: ExportedModel, context: Context, vocab_size: int, context_size: int) -> None:
        self.onnx, self.context = onnx, context
        self.vocab_size, self.context_size = vocab_size, context_size
        self.encoders = [file for file in (ENCODER, CTC) if file in onnx.programs]

    def encode(self, features: Tensor, feature_lens: Tensor, languages: Sequence[str] | None = None) -> EncoderOutput:
        """See ``AcousticModel``; ``languages`` are not used: the files are for one."""
        if self.context.chunk is not None:
            return self._encode_by_chunks(features, feature_lens, self.context.chunk)
        outputs = {file: self.onnx.encode(file, features, feature_lens) for file in self.encoders}
        lens = subsampled_lens(feature_lens)
        num_frames = int(lens.max())
        return self._output({file: out[:, :num_frames] for file, (out, _) in outputs.items()}, lens, num_frames)

    def start(self, batch: int = 1) -> States:
        """What ``batch`` streams remember before their first chunk."""
        return {file: self.onnx.initial_state(batch) for file in self.encoders}

    def step(self, features: Tensor, caches: States, frame_lens: Tensor | None = None) -> tuple[EncoderOutput, States]:
        """The next chunk of each stream: (B, 4 c + 3, 80) to c encoder frames, and the states after it.

        Where a stream ends within the chunk, ``frame_lens`` (B,) says how many of its c frames there are.
        """
        assert self.context.chunk is not None
        size = self.context.chunk
        lens = torch.full((len(features),), size) if frame_lens is None else frame_lens
        outputs = {file: self.onnx.step(file, features, caches[file], size - lens) for file in self.encoders}
        encoded = self._output({file: out for file, (out, _) in outputs.items()}, lens, size)
        return encoded, {file: state for file, (_, state) in outputs.items()}

    def predict(self, contexts: Tensor) -> Tensor:
        return self.onnx.predict(contexts)

    def join(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return self.onnx.join(encoded, predicted)

    def _encode_by_chunks(self, features: Tensor, feature_lens: Tensor, size: int) -> EncoderOutput:
        lens = subsampled_lens(feature_lens)
        num_frames = int(lens.max())
        last = count_window(-(-num_frames // size) * size)
        features = pad(features, (0, 0, 0, max(0, last - features.shape[1])), value=LOG_EPS)
        caches, parts = self.start(len(features)), []
        for begin in range(0, num_frames, size):
            window = features[:, SUBSAMPLING * begin : count_window(begin + size)]
            encoded, caches = self.step(window, caches, (lens - begin).clamp(0, size))
            parts.append(encoded)
        joined = {
            ENCODER: [part.joiner_in for part in parts],
            CTC: [part.ctc_log_probs for part in parts if part.ctc_log_probs is not None],
        }
        whole = {file: torch.cat(chunks, dim=1)[:, :num_frames] for file, chunks in joined.items() if chunks}
        return self._output(whole, lens, num_frames)

    def _output(self, outputs: dict[str, Tensor], lens: Tensor, num_frames: int) -> EncoderOutput:
        nothing = torch.zeros(len(lens), num_frames, 0)
        log_probs = torch.zeros(len(lens), 0, self.vocab_size) if CTC in self.encoders else None
        return EncoderOutput(outputs.get(ENCODER, nothing), lens, outputs.get(CTC, log_probs))
