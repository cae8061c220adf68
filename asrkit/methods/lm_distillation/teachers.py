"""Language models as teachers, and checks that the alignments of the cuts are in their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asrkit.data.alignment import symbols_of
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import open_cuts, text_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.text.units import Inventory, Unit
from asrkit.errors import UserError
from asrkit.models.lm import LanguageModel
from asrkit.models.registry import load_lm
from asrkit.run_dir import open_run

SUPERVISED = "supervised"  # the head trained on the alignment's own labels
SHOWN = 10  # cuts or symbols that an error names


@dataclass(frozen=True)
class LmTeacher:
    """A language model, its tokenizer, and the inventory of its units."""

    model: LanguageModel
    tokenizer: Tokenizer
    inventory: Inventory


def check_alignments(
    table: CutTable, inventories: Mapping[str, Inventory], tokenizers: Mapping[str, Tokenizer], unaligned: str
) -> dict[Unit, list[str]]:
    """Refuse training cuts whose alignment is missing or has units that a language model does not know.

    Returns the ids of the cuts without an alignment, by unit, if these are allowed.

    Args:
        tokenizers: of the bpe language models, by name. They must segment each text into the pieces of its alignment.

    Raises:
        UserError: names the cuts and units.
    """
    bare: dict[Unit, dict[str, None]] = {}
    strange: dict[str, dict[str, None]] = {}
    differing: dict[str, list[str]] = {}
    for index in range(len(table)):
        cut = table[index]
        for name, inventory in inventories.items():
            symbols = symbols_of(cut, inventory.unit)
            if symbols is None:
                bare.setdefault(inventory.unit, {})[cut.id] = None
            else:
                strange.setdefault(name, {}).update((s, None) for s in symbols if s not in inventory)
                if name in tokenizers and symbols != tokenizers[name].pieces(text_of(cut)):
                    differing.setdefault(name, []).append(cut.id)
    without = {unit: list(cut_ids) for unit, cut_ids in bare.items()}
    findings = []
    if unaligned == "refuse":
        findings += [
            f"{listed(cut_ids)} have no {unit} alignment; run asrkit align --unit {unit}, "
            "or let them train the recognizer alone with --set unaligned=allow"
            for unit, cut_ids in without.items()
        ]
    else:
        aligned = {inventories[name].unit for name in strange}
        findings += [
            f"no cut has a {unit} alignment for a head to learn from; run asrkit align --unit {unit}"
            for unit in without
            if unit not in aligned
        ]
    for name, missing in strange.items():
        # A unit unknown to the supervised head is unknown to the language model of that unit, which is named instead.
        if missing and name != SUPERVISED:
            findings.append(
                f"--lm {name}: does not know {len(missing)} of the alignments' {inventories[name].unit} units, such as "
                f"{' '.join(list(missing)[:SHOWN])}; train it on the units that align wrote"
            )
    for name, cut_ids in differing.items():
        findings.append(
            f"--lm {name}: its tokenizer segments {len(cut_ids)} texts differently from their bpe alignments: cuts "
            f"{', '.join(cut_ids[:SHOWN])}; train it with the tokenizer they were aligned with (train-lm --tokenizer)"
        )
    if findings:
        raise UserError.of(findings)
    return without


def listed(cut_ids: Sequence[str]) -> str:
    return f"{len(cut_ids)} cuts ({', '.join(cut_ids[:SHOWN])}{', ...' if cut_ids[SHOWN:] else ''})"


def load_lm_teacher(path: Path) -> LmTeacher:
    run = open_run(path)
    model = load_lm(run).requires_grad_(False)
    tokenizer = Tokenizer(run.tokenizer_path)
    return LmTeacher(model, tokenizer, Inventory.of(tokenizer, model.spec.unit))


def inventories_of(teachers: Mapping[str, LmTeacher], unit: Unit | None, table: CutTable) -> dict[str, Inventory]:
    """The units of each head, by name: those of its language model. The supervised head, if ``unit`` is given, has the units of
    the language model of that unit, or those of the alignments if there is none."""
    inventories = {name: teacher.inventory for name, teacher in teachers.items()}
    if unit is None:
        return inventories
    for teacher in teachers.values():
        if teacher.inventory.unit == unit:
            return {**inventories, SUPERVISED: teacher.inventory}
    symbols = {symbol for index in range(len(table)) for symbol in symbols_of(table[index], unit) or ()}
    return {**inventories, SUPERVISED: Inventory(sorted(symbols), unit)}


def check_dev(dev: Path, unit: Unit) -> None:
    """Refuse a dev manifest with cuts that have no alignment to measure frame accuracy on."""
    bare = [cut.id for cut in open_cuts(dev) if symbols_of(cut, unit) is None]
    if bare:
        raise UserError(
            f"{dev}: {len(bare)} cuts have no {unit} alignment to measure the supervised head on: "
            f"{', '.join(bare[:SHOWN])}; run asrkit align --unit {unit} on it too"
        )
