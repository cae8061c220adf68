"""From manifests to the cuts a run trains on: opened, checked, and left out or refused where they cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lhotse import CutSet
from lhotse.cut import Cut

from asrkit.data.checks import Finding, find_bad_cuts
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import is_labeled, open_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import DataConfig
from asrkit.errors import UserError
from asrkit.methods.distillation.teachers import Teachers, check_languages, each
from asrkit.training.distributed import broadcast_object
from asrkit.training.run_writer import RunWriter


def usable_cuts(
    cuts: CutSet,
    tokenizer: Tokenizer | None,
    policy: str,
    run: RunWriter,
    read_audio: bool = False,
    need_text: bool = True,
    languages: Sequence[str] = (),
) -> CutSet:
    """The cuts that can be trained on; the others are listed by id, and refused or left out as ``policy`` says; those
    whose text is a teacher's are left out, as nobody can mend them.

    A resumed run leaves out what the run left out when it began, without looking again.

    Raises:
        UserError: bad cuts under ``refuse``, or none left.
    """
    findings: list[Finding] = []
    if run.fresh:
        found = find_bad_cuts(cuts, tokenizer, read_audio, languages=languages) if run.world.is_main else []
        found = [finding for finding in found if need_text or finding.kind != "text"]
        findings = broadcast_object(run.world, found)  # type: ignore[assignment]
    labeled = {cut.id for cut in cuts if is_labeled(cut)} if findings else set()
    refused = [finding for finding in findings if finding.cut_id not in labeled]
    if refused and policy == "refuse":
        raise UserError.of(
            [f"cut {f.cut_id}: {f.kind}: {f.detail}" for f in refused]
            + [f"{len(refused)} unusable cuts: mend the manifest, or leave them out with --set bad_cuts=skip"]
        )
    for finding in findings:
        run.leave_out(finding.cut_id, f"{finding.kind}: {finding.detail}")
    kept = CutSet.from_cuts(cut for cut in cuts if cut.id not in run.left_out) if run.left_out else cuts
    if not len(kept):
        raise UserError("no usable cut is left in the manifest")
    return kept


@dataclass(frozen=True)
class Datasets:
    """What a run trains on: the cuts of the manifest, of ``data.also``, and of the dev manifest."""

    main: CutSet
    others: list[CutSet]
    dev: CutSet | None

    @property
    def every(self) -> Iterator[Cut]:
        return chain(self.main, *self.others)


def read_datasets(
    manifest: Path,
    dev: Path | None,
    data: DataConfig,
    policy: str,
    run: RunWriter,
    languages: Sequence[str],
    teachers: Teachers,
) -> Datasets:
    """Open the manifests and leave out, or refuse, the cuts that no tokenizer could make trainable.

    Args:
        languages: those the model is told apart, if any.

    Raises:
        UserError: unusable manifests or cuts, or cuts that the ``teachers`` cannot teach.
    """
    if data.augment.join > 0 and (languages or any(teacher.model.spec.languages for teacher in each(teachers))):
        raise UserError("data.augment.join joins utterances of any language, and a model is told one; set it to 0")

    def usable(path: Path) -> CutSet:
        return usable_cuts(open_cuts(path), None, policy, run, languages=languages)

    main, *others = map(usable, (manifest, *data.also))
    material = Datasets(main, others, None if dev is None else usable(dev))
    if findings := check_languages(teachers, material.every) if teachers else []:
        raise UserError.of(findings)
    return material


def training_table(
    material: Datasets, data: DataConfig, tokenizer: Tokenizer, policy: str, run: RunWriter
) -> tuple[CutTable, CutTable | None]:
    """The training cuts, read once and checked with the tokenizer, and the noise to mix in, if any."""
    main, *others = (
        usable_cuts(cuts, tokenizer, policy, run, read_audio=True) for cuts in (material.main, *material.others)
    )
    noise = None if data.noise is None else CutTable(open_cuts(data.noise))
    return CutTable(chain(*[main] * data.repeat, *others)), noise
