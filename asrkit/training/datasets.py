"""From manifests to the cuts a run trains on: opened, checked, and left out or refused if they cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from lhotse.cut import Cut

from asrkit.data.bucketing import BucketPlan
from asrkit.data.checks import Finding, find_bad_cuts
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import digest_of, is_labeled, open_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import AudioConfig, DataConfig, TrainBatches
from asrkit.errors import UserError
from asrkit.run_dir import TOKENIZER
from asrkit.training.distributed import World, broadcast_object, from_main
from asrkit.training.own_data import Report
from asrkit.training.run_writer import LEFT_OUT, read_sealed


@dataclass(frozen=True)
class Datasets:
    """What a run trains on: the cuts of the manifest, of ``data.also``, and of the dev manifest."""

    main: CutTable
    others: list[CutTable]
    dev: CutTable | None

    @cached_property
    def training(self) -> CutTable:
        """Every cut to train on."""
        return CutTable.joined([self.main, *self.others])


def read_datasets(
    manifest: Path,
    dev: Path | None,
    data: AudioConfig,
    policy: str,
    run: Leaves,
    languages: Sequence[str],
    check_cuts: Callable[[Iterable[Cut]], list[str]] | None = None,
    least: int = 1,
) -> Datasets:
    """Open the manifests and leave out, or refuse, the cuts that cannot be trained on with any tokenizer.

    Args:
        languages: those the model takes as an input, if any.
        check_cuts: returns findings about cuts that the stage cannot train on; [] if there are none.
        least: encoder frames that a cut must have.

    Raises:
        UserError: unusable manifests or cuts.
    """
    _check_join(data, languages)
    words = data.needs_text

    def usable(path: Path) -> CutTable:
        cuts = _open(path, words, run.world)
        return usable_cuts(cuts, None, policy, run, need_text=words, languages=languages, least=least)

    main, *others = map(usable, (manifest, *data.also))
    datasets = Datasets(main, others, read_dev(dev, data, policy, run, languages, least))
    if findings := [] if check_cuts is None else check_cuts(datasets.training):
        raise UserError.of(findings)
    return datasets


def read_dev(
    dev: Path | None, data: AudioConfig, policy: str, run: Leaves, languages: Sequence[str], least: int = 1
) -> CutTable | None:
    """The cuts of the dev manifest that can be used."""
    if dev is None:
        return None
    words = data.needs_text
    return usable_cuts(
        _open(dev, words, run.world), None, policy, run, need_text=words, languages=languages, least=least
    )


def _open(path: Path, words: bool, world: World) -> CutTable:
    """Open a manifest in all processes, first in the main one: the others need not check again what it remembers."""

    def check() -> None:
        open_cuts(path, words)

    from_main(world, check)
    return open_cuts(path, words)


def _check_join(data: AudioConfig, languages: Sequence[str]) -> None:
    if data.augment.join > 0 and languages:
        raise UserError(
            "data.augment.join joins utterances of any language, but this model takes one per utterance; set data.augment.join=0"
        )


def check_own_cuts(
    data: AudioConfig,
    tokenizer: Path,
    policy: str,
    languages: Sequence[str],
    check_cuts: Callable[[Iterable[Cut]], list[str]] | None,
    left_out: dict[str, str] | None,
    manifest: Path,
) -> Report:
    """Check a replica's own manifest, in the replica's process, as ``read_datasets`` and ``check_training_cuts`` check a shared one.

    Args:
        left_out: what the run left out at its start; None if this is its start.

    Raises:
        UserError: an unusable manifest or cuts.
    """
    if not manifest.exists():
        raise UserError(f"{manifest}: no such file (--manifest)")
    found = _Found(left_out is None, dict(left_out or {}))
    before = set(found.left_out)
    datasets = read_datasets(manifest, None, data, policy, found, languages, check_cuts)
    check_training_cuts(manifest, data, Tokenizer(tokenizer), policy, found)
    cuts = datasets.main.without(found.left_out)
    new = {name: reason for name, reason in found.left_out.items() if name not in before}
    return Report(digest_of(manifest, sound=False), len(cuts), float(cuts.durations.sum()), new)


class Leaves(Protocol):
    """What notes the cuts that are left out: a ``RunWriter``, or a replica for its own data."""

    @property
    def world(self) -> World: ...
    @property
    def fresh(self) -> bool: ...
    @property
    def left_out(self) -> dict[str, str]: ...

    def leave_out(self, cut_id: str, reason: str) -> None: ...


@dataclass
class _Found:
    fresh: bool
    left_out: dict[str, str]
    world: World = field(default_factory=lambda: World(0, 1, torch.device("cpu")))

    def leave_out(self, cut_id: str, reason: str) -> None:
        self.left_out[cut_id] = reason


def check_training_cuts(
    manifest: Path,
    data: AudioConfig,
    tokenizer: Tokenizer | None,
    policy: str,
    run: Leaves,
    least: int = 1,
    every: bool = False,
) -> None:
    """Leave out, or refuse, the cuts that cannot be trained on: their texts are tokenized, and their audio is read, but for what is
    checked as it is trained on (``data.check_first``); of ``every`` cut, where all are read before the training.

    Raises:
        UserError: bad cuts under ``refuse``, or none left.
    """
    words, first = data.needs_text, None if every else data.check_first
    for path in (manifest, *data.also):
        cuts = _open(path, words, run.world)
        usable_cuts(cuts, tokenizer, policy, run, True, need_text=words, least=least, first=first)
    if data.noise is not None:
        cuts = _open(data.noise, False, run.world)
        usable_cuts(cuts, None, policy, run, True, need_text=False, first=data.check_first)


def training_batches(manifest: Path, data: DataConfig, out: Path, slices: int, seed: int) -> TrainBatches:
    """The batches of a run, from its manifests without the cuts that its directory ``out`` leaves out.

    Args:
        slices: batches per step, over all processes.
    """
    table, noise = open_tables(manifest, data, out)
    plan = bucket_plan(table.durations, data, slices, seed)
    return TrainBatches(table, plan, slices, data, Tokenizer(out / TOKENIZER), noise, seed)


def open_tables(manifest: Path, data: AudioConfig, out: Path) -> tuple[CutTable, CutTable | None]:
    """The cuts to train on, and those of the noise, without the ones that the run directory ``out`` leaves out."""
    left_out = read_sealed(out / LEFT_OUT) if (out / LEFT_OUT).is_file() else {}
    main, *others = (open_cuts(path, data.needs_text).without(left_out) for path in (manifest, *data.also))
    table = CutTable.joined([main] * data.repeat + others)
    if data.noise is None:
        return table, None
    return table, open_cuts(data.noise, False).without(left_out)


def bucket_plan(durations: np.ndarray, data: AudioConfig, slices: int, seed: int) -> BucketPlan:
    """Which cuts make a batch, such that it fits even with the slowest perturbation."""
    heard = durations + 2 * data.augment.silence
    return BucketPlan(heard, data.max_duration * slices / data.longest, data.num_buckets, slices, seed)


def usable_cuts(
    cuts: CutTable,
    tokenizer: Tokenizer | None,
    policy: str,
    run: Leaves,
    read_audio: bool = False,
    need_text: bool = True,
    languages: Sequence[str] = (),
    least: int = 1,
    first: int | None = None,
) -> CutTable:
    """The cuts that can be trained on; the others are listed by id, and refused or left out according to ``policy``. Cuts that a
    teacher has transcribed are always left out, because nobody can fix their texts.

    A resumed run leaves out the same cuts as at its start, without checking again.

    Raises:
        UserError: bad cuts under ``refuse``, or none left.
    """
    findings: list[Finding] = []
    if run.fresh:
        bad = find_bad_cuts(cuts, tokenizer, read_audio, languages, least, first=first) if run.world.is_main else []
        bad = [finding for finding in bad if need_text or finding.kind != "text"]
        bad = [finding for finding in bad if finding.cut_id not in run.left_out]
        findings = broadcast_object(run.world, bad)  # type: ignore[assignment]
    rows = cuts.rows_of({finding.cut_id for finding in findings})
    labeled = {cut.id for cut in map(cuts.__getitem__, rows.tolist()) if is_labeled(cut)}
    refused = [finding for finding in findings if finding.cut_id not in labeled]
    if refused and policy == "refuse":
        raise UserError.of(
            [f"cut {f.cut_id}: {f.kind}: {f.detail}" for f in refused]
            + [f"{len(refused)} unusable cuts: fix the manifest, or leave them out with --set bad_cuts=skip"]
        )
    for finding in findings:
        run.leave_out(finding.cut_id, f"{finding.kind}: {finding.detail}")
    usable = cuts.without(run.left_out)
    if not len(usable):
        raise UserError("no usable cut is left in the manifest")
    return usable
