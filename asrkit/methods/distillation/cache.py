"""Teachers' posteriors on disk, so that the teachers run once.

A directory of safetensors files. For each cut they hold the log-probabilities of the next symbol and of the blank at every node
of its lattice, float16 (2, T', U + 1), under a digest of the cut in the manifest; ``cache.yaml`` identifies the teachers.
safetensors instead of a Lhotse array, because one tensor can be read without the others and the manifest does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lhotse.cut import Cut
from torch import Tensor

from asrkit.config import differences, digest
from asrkit.data.batch import Batch, evaluation_batches, with_symbols
from asrkit.data.cut_table import CutTable
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import DataConfig
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.losses.distillation import delayed, three_classes
from asrkit.losses.transducer import arc_loss
from asrkit.methods.distillation.config import DistillationConfig
from asrkit.methods.distillation.teacher_outputs import TeacherOutputs
from asrkit.methods.distillation.teachers import Teachers
from asrkit.nn.conformer import subsampled_lens
from asrkit.run_dir import MODEL, WEIGHTS, read_yaml, write_yaml
from asrkit.training.asr_loss import LossConfig
from asrkit.training.checkpoint import SEAL, open_sealed, save_sealed
from asrkit.training.distributed import World, broadcast_object, gather_lists

ABOUT = "cache.yaml"
SHARD = 500  # cuts per file
FEATURES = (
    "whisper-features"  # the folder for a Whisper teacher's frames, in a cache of posteriors or in the run directory
)
CHUNK = 8  # frames whose logits are in memory at once


class TensorCache:
    """One tensor for each cut in a directory, which is made if it does not exist.

    Args:
        about: what the tensors depend on in addition to the cut. what: what they are, for messages. beside: a name in the directory that is
            no part of the cache.

    Raises:
        UserError: the directory holds other files, or tensors that depend on something else.
    """

    def __init__(self, path: Path, about: dict[str, Any], what: str, beside: str = "") -> None:
        self.path, self._about, self._what = path, about, what
        if path.exists() and not path.is_dir():
            raise UserError(f"--cache {path}: is a file; choose a directory")
        if (path / ABOUT).is_file():
            stored = read_yaml(path / ABOUT)
            if not isinstance(stored, dict):
                raise UserError(f"--cache {path}: {ABOUT} is damaged; choose another directory")
            if changed := differences(stored, about):
                raise UserError(
                    f"--cache {path}: holds the {what} of other teachers or another tokenizer ({'; '.join(changed)}); choose another directory"
                )
        elif path.is_dir() and any(child.name != beside for child in path.iterdir()):
            raise UserError(f"--cache {path}: holds other files; choose an empty or new directory")
        self._files: dict[str, Any] = {}  # by key, the open file
        self._known: set[Path] = set()
        self._keys: dict[str, str] = {}  # by cut id

    def key(self, cut: Cut) -> str:
        """A digest of what the cut's tensor depends on."""
        return digest(cut.to_dict())

    def fill_by(
        self, table: CutTable, world: World, compute: Callable[[list[Cut]], Iterator[tuple[str, Tensor]]]
    ) -> Iterator[int]:
        """``compute`` the tensors, by cut id, of every cut of ``table`` that has none; yields the number of cuts done so far.

        Every process does its share.

        Raises:
            UserError: two different cuts with the same id; a damaged file.
        """
        gather_lists(world, [])  # until every process has looked at the directory, as it was, nothing is written there
        if world.is_main and not (self.path / ABOUT).is_file():
            write_yaml(self.path / ABOUT, self._about)
        broadcast_object(world, None)
        missing = self._missing(table)
        gather_lists(world, [])  # the same to every process: nobody writes before all have looked
        # Longest first, so that the shares are about equal.
        ordered = sorted(missing.values(), key=lambda cut: (-cut.duration, cut.id))
        share = ordered[world.rank :: world.size]
        for first in range(0, len(share), SHARD):
            cuts = share[first : first + SHARD]
            tensors = {self._keys[cut_id]: tensor for cut_id, tensor in compute(cuts)}
            name = f"{digest(sorted(tensors))[:16]}.safetensors"
            save_sealed(self.path / name, tensors)
            yield first + len(cuts)
        broadcast_object(world, None)

    def open(self, table: CutTable) -> None:
        """Look up the tensor of every cut of ``table``.

        Raises:
            UserError: tensors are missing; two different cuts have the same id; a damaged file.
        """
        if missing := self._missing(table):
            raise UserError(
                f"--cache {self.path}: the {self._what} of {len(missing)} cuts have disappeared, such as {next(iter(missing))}; "
                "run the command again to compute them"
            )

    def tensors(self, batch: Batch) -> list[Tensor]:
        """The stored tensors of a batch's cuts."""
        return [self._files[key].get_tensor(key) for key in (self._keys[cut_id] for cut_id in batch.cut_ids)]

    def _missing(self, table: CutTable) -> dict[str, Cut]:
        """The cuts that have no tensor yet, by id."""
        self._find_files()
        missing: dict[str, Cut] = {}
        for index in range(len(table)):
            cut = table[index]
            key = self.key(cut)
            if self._keys.setdefault(cut.id, key) != key:
                raise UserError(
                    f"cut {cut.id}: two different cuts have this id; --cache needs unique ids, so rename one"
                )
            if key not in self._files:
                missing[cut.id] = cut
        return missing

    def _find_files(self) -> None:
        """Note which file holds each key. If several do, they hold the same tensor. One without a digest was not finished."""
        for file in sorted(self.path.glob("*.safetensors")):
            if file not in self._known and file.with_suffix(SEAL).is_file():
                opened = open_sealed(file)
                self._files.update(dict.fromkeys(opened.keys(), opened))
                self._known.add(file)


class PosteriorCache(TensorCache):
    """The posteriors of ``teachers`` over the symbols of ``tokenizer``; see ``TensorCache``."""

    def __init__(self, path: Path, teachers: Teachers, tokenizer: Tokenizer) -> None:
        about = {
            "teachers": {
                language: [sha256_of(teacher.run.path / file) for teacher in several for file in (MODEL, WEIGHTS)]
                for language, several in teachers.items()
            },
            "tokenizer": sha256_of(tokenizer.path),
        }
        super().__init__(path, about, "posteriors", beside=FEATURES)

    def fill(
        self, teachers: Teachers, table: CutTable, tokenizer: Tokenizer, world: World, max_duration: float
    ) -> Iterator[int]:
        """Run the teachers on every cut of ``table`` without posteriors; see ``fill_by``."""

        def compute(cuts: list[Cut]) -> Iterator[tuple[str, Tensor]]:
            for batch in evaluation_batches(cuts, max_duration):
                arcs = compute_arcs(teachers, with_symbols(batch, tokenizer).to(world.device))
                yield from zip(batch.cut_ids, arcs, strict=True)

        return self.fill_by(table, world, compute)

    def outputs(self, batch: Batch, encoder_out_lens: Tensor, symbol_lens: Tensor, delay: int) -> CachedOutputs:
        """The stored posteriors of a batch's cuts."""
        return CachedOutputs(self.tensors(batch), symbol_lens, encoder_out_lens, delay)


def needed_settings(data: DataConfig, how: DistillationConfig) -> list[str]:
    """The settings that posteriors on disk cannot serve, as findings; they are those of unperturbed audio and of the lattice only."""
    needed = {
        "data.augment.speed": (data.augment.speed, 0.0),
        "data.augment.tempo": (data.augment.tempo, 0.0),
        "data.augment.silence": (data.augment.silence, 0.0),
        "data.augment.join": (data.augment.join, 0.0),
        "data.bpe_dropout": (data.bpe_dropout, 0.0),
        "teacher.classes": (how.classes, "three"),
        "teacher.temperature": (how.temperature, 1.0),
        "teacher.input": (how.input, "clean"),
        "teacher.context": (how.context, "own"),
        "teacher.ctc_scale": (how.ctc_scale, 0.0),
        "teacher.encoder_scale": (how.encoder_scale, 0.0),
    }
    return [
        f"holds only the posteriors of next symbol and blank on unperturbed audio; set {key}={value}, not {setting}"
        for key, (setting, value) in needed.items()
        if setting != value
    ]


def compute_arcs(teachers: Teachers, batch: Batch) -> list[Tensor]:
    """The teachers' log-probabilities of next symbol and blank for each utterance of an unperturbed batch, (2, T', U + 1) float16, on the CPU."""
    lens = subsampled_lens(batch.feature_lens)
    symbol_lens = torch.minimum(batch.symbol_lens, lens)
    outputs = TeacherOutputs(
        teachers, batch.languages, batch.features, batch.feature_lens, batch.symbols, symbol_lens, lens
    )
    num_frames, rows = int(lens.max()), torch.arange(batch.symbols.shape[1] + 1, device=lens.device)
    parts = []
    for first in range(0, num_frames, CHUNK):
        frames = slice(first, min(first + CHUNK, num_frames))
        ranges = rows.expand(len(lens), frames.stop - first, -1)
        parts.append(outputs.node_log_probs(frames, ranges)[..., :2].half().cpu())
    sizes = zip(lens.tolist(), (batch.symbol_lens + 1).tolist(), strict=True)
    arcs = torch.cat(parts, dim=1).permute(0, 3, 1, 2)
    whole = torch.contiguous_format
    return [
        padded[:, :frames, :positions].clone(memory_format=whole)
        for padded, (frames, positions) in zip(arcs, sizes, strict=True)
    ]


class CachedOutputs:
    """Stands in for ``TeacherOutputs``: the nodes, in three classes, from each utterance's stored arcs (2, T', U + 1)."""

    def __init__(self, arcs: list[Tensor], symbol_lens: Tensor, encoder_out_lens: Tensor, delay: int = 0) -> None:
        frames, positions = (max(arc.shape[dim] for arc in arcs) for dim in (1, 2))
        together = torch.zeros(2, len(arcs), frames, positions, dtype=torch.float16)
        for row, arc in enumerate(arcs):
            together[:, row, : arc.shape[1], : arc.shape[2]] = arc
        self._arcs = together.to(symbol_lens.device).float()
        self._symbol_lens, self._encoder_out_lens, self._delay = symbol_lens, encoder_out_lens, delay

    def node_log_probs(self, frames: slice, ranges: Tensor) -> Tensor:
        """At the nodes ``ranges`` (B, c, S) of the ``frames``: log-probabilities (B, c, S, 3)."""
        symbol, blank = (
            delayed(arc, self._encoder_out_lens, self._delay)[:, frames].gather(2, ranges) for arc in self._arcs
        )
        # Rounding to float16 has changed their sum, so they are normalized again.
        return three_classes(symbol, blank, ranges, self._symbol_lens).log_softmax(dim=-1)

    def transducer_losses(self, loss: LossConfig) -> Tensor:
        """Each utterance's transducer loss (B,), over the whole lattice."""
        symbol, blank = self._arcs
        return arc_loss(symbol, blank, self._encoder_out_lens, self._symbol_lens, loss.topology)
