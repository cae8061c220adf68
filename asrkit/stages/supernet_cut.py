"""supernet-cut: one member of a supernet as a run by itself, without training (arXiv 2110.08352)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch, evaluation_batches, with_symbols
from asrkit.data.checks import decodable_cuts
from asrkit.data.manifests import text_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.devices import choose_device
from asrkit.disk import occupied
from asrkit.errors import UserError
from asrkit.methods.supernet.cut import (
    Genome,
    Group,
    SearchConfig,
    byte_costs,
    check_supernet,
    cut,
    groups,
    levels_of,
    search,
    sparsities,
)
from asrkit.methods.supernet.loss import at_levels
from asrkit.methods.supernet.members import SPARSE
from asrkit.models import AsrModel, load_model
from asrkit.nn.context import parse_context
from asrkit.run_dir import CONFIG, RunDir, open_run, read_yaml
from asrkit.training.asr_loss import LossConfig, forward_losses
from asrkit.training.dev_eval import even_subset
from asrkit.training.run_writer import write_untrained_run


def supernet_cut(
    parent: Path,
    out: Path,
    settings: SearchConfig,
    *,
    chosen: list[float] | None = None,
    budget: float | None = None,
    dev: Path | None = None,
    device: str = "auto",
    tell: Callable[[str], None] = lambda line: None,
    command: str = "",
) -> Path:
    """Write a member of the supernet ``parent`` as the run directory ``out``; returns ``out``.

    Args:
        chosen: its sparsity, or one for each group of layers (see ``methods/supernet/cut.py``).
        budget: instead, share of the float bytes that it may take; the sparsities are those with the lowest loss on ``dev``
            that a search finds.
        tell: is given lines on what the search has found so far.

    Raises:
        UserError: no supernet, sparsities that it was not trained with, a budget below its sparsest member, cuts that cannot be
            used, ``out`` is taken.
    """
    if findings := occupied(out):
        raise UserError.of(findings)
    run = open_run(parent)
    model = load_model(run)
    check_supernet(model, str(parent))
    inputs = {} if dev is None else {"dev": dev}
    if budget is not None and dev is not None:
        best = _found(model.to(choose_device(device)), run, dev, budget, settings, tell)
        member = dict(zip(groups(model), (sparsities(model)[choice] for choice in best), strict=True))
    else:
        member = _asked(model, chosen or [], parent)
    entry = {"sparsities": {_title(group): share for group, share in member.items()}}
    told = entry if budget is None else {"budget": budget, "search": to_dict(settings)}
    made = cut(model.cpu(), member)
    return write_untrained_run(out, run, "supernet-cut", told, made, inputs=inputs, extra=entry, command=command)


def _asked(model: AsrModel, chosen: list[float], parent: Path) -> dict[Group, float]:
    """The sparsity of each group, from one number for all or one for each."""
    order, known = groups(model), sparsities(model)
    if len(chosen) == 1:
        chosen = chosen * len(order)
    if len(chosen) != len(order):
        raise UserError(
            f"--sparsity: has {len(chosen)} numbers; give one, or {len(order)}, for {', '.join(map(_title, order))}"
        )
    possible = sorted({*known, 0.0} if set(chosen) == {0.0} else known)
    if missing := sorted({*chosen} - {*possible}):
        raise UserError(
            f"--sparsity {missing[0]}: no member of {parent} was trained with it; choose from "
            f"{', '.join(map(str, known))}, or 0 for the dense member"
        )
    return dict(zip(order, chosen, strict=True))


def _title(group: Group) -> str:
    return "outside of blocks" if group is None else f"block {group}"


def _found(
    model: AsrModel, run: RunDir, dev: Path, budget: float, settings: SearchConfig, tell: Callable[[str], None]
) -> Genome:
    """The choices with the lowest dev loss within the budget."""
    costs, rest, plain = byte_costs(model)
    measure = _measure(model, run, dev, settings)
    known, order = sparsities(model), groups(model)

    def report(generation: int, best: Genome, value: float) -> None:
        shares = ", ".join(f"{_title(group)} {known[choice]}" for group, choice in zip(order, best, strict=True))
        size = rest + sum(row[choice] for row, choice in zip(costs, best, strict=True))
        tell(f"generation {generation + 1}: loss {value:.4f}, {size:,.0f} bytes, {100 * size / plain:.1f} %: {shares}")

    return search(measure, costs, budget * plain - rest, settings, report)


def _measure(model: AsrModel, run: RunDir, dev: Path, settings: SearchConfig) -> Callable[[Genome], float]:
    """A function from a member's choices to its mean loss for each frame of the dev cuts, in the sparse variant's context."""
    tokenizer = Tokenizer.load(run.tokenizer_path)
    spoken = [cut for cut in decodable_cuts(dev, model.spec.languages)[0] if text_of(cut)]
    if not spoken:
        raise UserError(f"--dev {dev}: has no cut with a text to measure the loss on; give another manifest")
    cuts = even_subset(spoken, settings.max_cuts)
    device = model.ctc_head.weight.device
    batches = [with_symbols(batch, tokenizer).to(device) for batch in evaluation_batches(cuts, settings.max_duration)]
    context = parse_context(model.spec.variants[SPARSE].contexts[0])
    loss = trained_loss(run)

    def of(batch: Batch) -> torch.Tensor:
        return forward_losses(model, batch, 0, loss, SPARSE, context, None).losses.sum()

    @torch.no_grad()
    def measure(genome: Genome) -> float:
        with at_levels(model, levels_of(model, genome)):
            total = torch.stack([of(batch) for batch in batches]).sum()
        return float(total) / sum(batch.num_encoder_frames for batch in batches)

    return measure


def trained_loss(run: RunDir) -> LossConfig:
    """The loss that the run was trained with, after its warm-up; of a run whose own stage has none, the usual one of the losses that the
    stages before had."""
    content = read_yaml(run.path / CONFIG)
    if "loss" in content:
        return replace(from_dict(LossConfig, content["loss"], f"{run.path / CONFIG}: loss"), warm_up_steps=0)
    trained = next((entry["losses"] for entry in reversed(run.lineage) if "losses" in entry), None)
    if trained is None:
        raise UserError(f"{run.path}: lineage.yaml does not record the losses of any stage; restore it from a copy")
    scales = {
        f"{name}_scale": getattr(LossConfig(), f"{name}_scale") * (name in trained) for name in ("transducer", "ctc")
    }
    return LossConfig(warm_up_steps=0, **scales)
