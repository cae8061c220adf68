"""sequence-train: train a recognizer further on the errors that count, or on lattices of what it could have said.

mwer and sampled-mbr lower expected word errors over hypotheses (arXiv 1712.01818, arXiv 1706.02776). mmi, bmmi, smbr and mpe train the
CTC head on lattices of a denominator graph (Heigold et al., ICASSP 2014; US10019985).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from asrkit.data.batch import Batch
from asrkit.data.manifests import text_of
from asrkit.data.train_batches import TrainBatches
from asrkit.decoding.lattices import graph_lattice
from asrkit.methods.sequence.config import SequenceTrainConfig, check_sequence
from asrkit.methods.sequence.denominator import (
    DIGEST,
    load_denominator,
    make_denominator,
    save_denominator,
)
from asrkit.methods.sequence.lattices import k2_for_lattices
from asrkit.methods.sequence.loss import SEARCHER, SequenceLoss
from asrkit.methods.sequence.search_cache import COMPLETE, SearchCache, fill_cache, no_path
from asrkit.methods.supernet.members import others_of_a_supernet
from asrkit.models import AsrModel, load_model
from asrkit.models.surgery import rebuild, with_variant
from asrkit.nn.context import Context, parse_context
from asrkit.run_dir import open_run
from asrkit.training.asynchronous.drivers import make_driver
from asrkit.training.distributed import from_main
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import fine_tune
from asrkit.training.step import TrainTask

SAMPLE = 2  # training batches in which every utterance must have a path through the denominator


def sequence_train(
    parent: Path,
    manifests: Sequence[Path],
    out: Path,
    settings: SequenceTrainConfig,
    *,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train the model of ``parent`` on a sequence criterion, or resume an interrupted run; returns ``out``.

    Args:
        manifests: one, or the data of each replica.

    Raises:
        UserError: an unusable parent, contradictory settings, no k2 for lattices, a denominator that is too large or through which
            cuts have no path, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    source = open_run(parent)
    check_sequence(settings, source, len(manifests))
    if settings.lattices:
        k2_for_lattices()
    with_variant(load_model(source).spec, settings.variant, settings.contexts.train)  # refuses an unknown variant
    driver = make_driver(settings.asynchronous, manifests)
    return fine_tune(
        "sequence-train",
        source,
        manifests,
        out,
        settings,
        partial(build_task, settings, parent, out),
        prepare=partial(prepare, settings, parent) if settings.lattices or settings.cache else None,
        driver=driver,
        other_losses=True,
        every_cut=settings.cache,
        dev=dev,
        device=device,
        command=command,
    )


def build_task(settings: SequenceTrainConfig, parent: Path, out: Path, batches: TrainBatches) -> TrainTask:
    """The parent's model and the loss of the criterion; see ``TaskRecipe``. The run ``out`` has the denominator, if there is one."""
    origin = load_model(open_run(parent))
    spec = with_variant(origin.spec, settings.variant, settings.contexts.train)
    model = rebuild(spec, origin)
    graph = None
    facts: dict[str, Any] = {"criterion": settings.criterion, "losses": settings.trained_heads}
    if settings.lattices:
        graph, facts["denominator_sha256"] = load_denominator(out)
    start = None
    if settings.l2 > 0:
        start = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    contexts = [parse_context(text) for text in spec.variants[spec.variant].contexts]
    cache = SearchCache(out) if settings.cache else None
    loss = SequenceLoss(settings, contexts, batches.tokenizer, graph, start, cache)
    notes = others_of_a_supernet(spec, spec.variant)
    method: Literal["ctc", "greedy"] = "ctc" if settings.trained_head == "ctc" else "greedy"
    task = TrainTask(model, loss, batches, facts=facts, notes=notes, dev_method=method)
    if settings.search_every == 1:
        return task
    searcher = copy.deepcopy(model).requires_grad_(False)
    model.snapshots[SEARCHER] = searcher
    return replace(task, frozen=[searcher], before_step=partial(renew, settings.search_every))


def renew(every: int, model: AsrModel, optimizer: torch.optim.Optimizer, step: int, batch: Batch) -> None:
    """Every N steps: search with the current weights from here on."""
    if step % every == 0:
        weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("snapshots.")}
        model.snapshots[SEARCHER].load_state_dict(weights)


def prepare(settings: SequenceTrainConfig, parent: Path, run: RunWriter, batches: TrainBatches) -> None:
    """Make the denominator graph of the training texts, and search all cuts if they are to be searched once, unless the run has
    them.

    Raises:
        UserError: a graph that is too large, or cuts without a path through it.
    """
    if settings.lattices:
        from_main(run.world, partial(make_graph, settings, parent, run, batches))
    if settings.cache and not (run.path / COMPLETE).is_file():
        model, context = _start(settings, parent, run.world.device)
        graph = load_denominator(run.path)[0] if settings.lattices else None
        found = fill_cache(settings, model, context, graph, run.path, batches, run.world)
        run.note(f"{run.path}: searched {found} utterances")


def make_graph(settings: SequenceTrainConfig, parent: Path, run: RunWriter, batches: TrainBatches) -> None:
    """Write the denominator graph of the training texts, after the utterances of the first batches have found a path through it; once."""
    if (run.path / DIGEST).is_file():
        return
    tokenizer, how = batches.tokenizer, settings.lattice.denominator
    texts = [tokenizer.encode(text_of(batches.table[number])) for number in range(len(batches.table))]
    emitted = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special_ids))
    graph = make_denominator(texts, how, emitted)
    k2, device = k2_for_lattices(), run.world.device
    fsa = graph.fsa(k2, device)
    model, context = _start(settings, parent, device)
    pathless: list[str] = []
    for number in range(SAMPLE):
        batch = batches[number].to(device)
        with torch.no_grad():
            languages = model.language_ids(batch.languages)
            encoded, lens = model.encode(batch.features, batch.feature_lens, settings.variant, context, None, languages)
            outputs = model.ctc_log_probs(encoded)
        lattice = graph_lattice(k2, fsa, outputs, lens.clamp(min=1), settings.lattice.kappa, how)
        found = set(lattice.rows.tolist())
        pathless += [cut_id for row, cut_id in enumerate(batch.cut_ids) if row not in found]
    if pathless:
        raise no_path(pathless)
    save_denominator(run.path, graph, {"order": how.order, "texts": len(texts)})
    run.note(f"{run.path}: denominator graph of order {how.order}: {graph.num_states} states, {len(graph.arcs)} arcs")


def _start(settings: SequenceTrainConfig, parent: Path, device: torch.device) -> tuple[AsrModel, Context]:
    """The parent's model, and the first context it is trained in."""
    model = load_model(open_run(parent)).to(device)
    variant = model.spec.variants[settings.variant or model.spec.variant]
    return model, parse_context((settings.contexts.train or variant.contexts)[0])
