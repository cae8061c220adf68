"""A Whisper teacher: the frames of its encoder on disk, for a student's encoder to resemble.

Whisper gives a frame every 20 ms; two are averaged to one of the student's, every 40 ms. It hears whole windows of 30 s of unperturbed
audio, whatever the student's context is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from asrkit.config import digest
from asrkit.data.batch import Batch
from asrkit.data.cut_audio import cut_samples
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import language_of
from asrkit.data.train_batches import DataConfig
from asrkit.decoding.external.interface import identify
from asrkit.decoding.external.whisper import NEEDED, WhisperRecognizer, find_whisper
from asrkit.losses.distillation import Distance, delayed, encoder_distance
from asrkit.methods.distillation.cache import TensorCache
from asrkit.training.distributed import World

NAME = "whisper"  # of its linear map among the student's


@dataclass(frozen=True)
class WhisperTeacher:
    """A Whisper model that teaches, as the user named it; ``sha256`` is of its files."""

    spec: str
    path: Path
    sha256: str

    @classmethod
    def find(cls, spec: str) -> WhisperTeacher:
        """The model that ``whisper:NAME_OR_PATH`` names.

        Raises:
            UserError: see ``find_whisper``.
        """
        path = find_whisper(spec)
        return cls(spec, path, identify([path / file for file in NEEDED])[0])

    def load(self, device: torch.device | str = "auto") -> WhisperRecognizer:
        """The model itself, greedy."""
        return WhisperRecognizer(self.spec, "greedy", device=str(device))

    def check_languages(self, cuts: Iterable[Cut]) -> list[str]:
        """Findings about cuts of languages that it does not know; [] if there are none."""
        counts, whisper = Counter(map(language_of, cuts)), self.load("cpu")
        problems = ((whisper.check_language(language), count) for language, count in counts.items())
        return [
            f"--teacher {self.spec}: {problem} ({count} cuts)" for problem, count in problems if problem is not None
        ]


class FeatureCache(TensorCache):
    """The frames of a Whisper teacher, float16 (T', D), 19 kB for a second of tiny's; see ``TensorCache``."""

    def __init__(self, path: Path, teacher: WhisperTeacher) -> None:
        super().__init__(path, {"whisper": teacher.sha256, "layer": "last", "frames": "mean of 2"}, "features")
        self.teacher = teacher

    def key(self, cut: Cut) -> str:
        """A digest of the sound: the text may change."""
        return digest({name: value for name, value in cut.to_dict().items() if name != "supervisions"})

    def fill(self, table: CutTable, world: World) -> Iterator[int]:
        """Run Whisper's encoder on every cut of ``table`` without frames; see ``fill_by``."""
        whisper = self.teacher.load(world.device)

        def compute(cuts: list[Cut]) -> Iterator[tuple[str, Tensor]]:
            for cut in cuts:
                yield cut.id, whisper.encode(cut_samples(cut)).half()

        return self.fill_by(table, world, compute)

    @property
    def width(self) -> int:
        """Numbers in a frame."""
        opened = next(iter(self._files.values()))
        return int(opened.get_slice(next(iter(opened.keys()))).get_shape()[1])

    def distances(
        self, encoder_out: Tensor, encoder_out_lens: Tensor, batch: Batch, kind: Distance, delay: int
    ) -> Tensor:
        """Distance of the student's mapped frames (B, T', D) from Whisper's, summed over each utterance, (B,)."""
        frames = pad_sequence(self.tensors(batch), batch_first=True).to(encoder_out.device).float()
        frames = torch.nn.functional.pad(frames, (0, 0, 0, max(0, encoder_out.shape[1] - frames.shape[1])))
        later = delayed(frames[:, : encoder_out.shape[1]], encoder_out_lens, delay)
        return encoder_distance(encoder_out, later, encoder_out_lens, kind)


def needed_feature_settings(data: DataConfig) -> list[str]:
    """The settings under which frames on disk would not be those of what the student hears, as findings."""
    augment = data.augment
    changed = {"speed": augment.speed, "tempo": augment.tempo, "silence": augment.silence, "join": augment.join}
    return [
        f"hears unperturbed audio; set data.augment.{name}=0, not {value}"
        for name, value in changed.items()
        if value != 0
    ]
