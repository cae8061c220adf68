"""Hypotheses or lattices of every cut, searched once with the weights of the start and kept in the run directory.

Training then only scores them with the current weights. A folder of safetensors files, from which one cut's can be read without the
others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from asrkit.config import digest
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.cut_table import CutTable
from asrkit.data.train_batches import TrainBatches
from asrkit.decoding.hypothesis import NBest
from asrkit.decoding.lattices import Lattice, graph_lattice
from asrkit.disk import remove
from asrkit.errors import UserError
from asrkit.methods.sequence.config import SequenceTrainConfig
from asrkit.methods.sequence.denominator import Denominator
from asrkit.methods.sequence.hypotheses import find_n_best
from asrkit.methods.sequence.lattices import k2_for_lattices
from asrkit.models.asr import AsrModel
from asrkit.nn.context import Context
from asrkit.run_dir import read_yaml, write_yaml
from asrkit.training.checkpoint import open_sealed, save_sealed
from asrkit.training.distributed import World, broadcast_object, gather_lists

FOLDER, COMPLETE = (
    "searched",
    "searched/searched.yaml",
)  # in the run directory; the second is there once the first is whole
SHARD = 500  # cuts per file


class SearchCache:
    """What ``fill_cache`` has found, by cut id.

    Raises:
        UserError: it is not there, or damaged.
    """

    def __init__(self, run: Path) -> None:
        if not (run / COMPLETE).is_file():
            raise UserError(f"{run / FOLDER}: missing; run the command again, which searches again")
        self._files: dict[str, Any] = {}
        for path in sorted((run / FOLDER).glob("*.safetensors")):
            opened = open_sealed(path)
            self._files.update(dict.fromkeys(opened.keys(), opened))
        cuts, about = {key.partition(" ")[2] for key in self._files}, read_yaml(run / COMPLETE)
        if not isinstance(about, dict) or about.get("cuts") != len(cuts):
            raise UserError(
                f"{run / FOLDER}: holds {len(cuts)} utterances, not all of them; delete it and run the command again"
            )

    def _get(self, kind: str, cut_ids: Sequence[str]) -> list[Tensor]:
        keys = [f"{kind} {cut_id}" for cut_id in cut_ids]
        return [self._files[key].get_tensor(key) for key in keys]

    def n_best(self, cut_ids: Sequence[str], device: torch.device) -> NBest:
        """The hypotheses of a batch's cuts; their scores are those of the search."""
        tokens, scores = self._get("tokens", cut_ids), self._get("scores", cut_ids)
        count, size = (max(each.shape[dim] for each in tokens) for dim in (0, 1))
        padded = torch.zeros(len(tokens), count, size, dtype=torch.int64)
        padded_scores = torch.full((len(tokens), count), -torch.inf)
        for row, (each, each_score) in enumerate(zip(tokens, scores, strict=True)):
            padded[row, : each.shape[0], : each.shape[1]] = each
            padded_scores[row, : len(each_score)] = each_score
        padded = padded.to(device)
        return NBest(padded, (padded > 0).sum(dim=2), padded_scores.to(device))

    def lattice(self, k2: ModuleType, cut_ids: Sequence[str], device: torch.device) -> Lattice:
        """The lattices of a batch's cuts."""
        arcs, graph = self._get("arcs", cut_ids), self._get("graph", cut_ids)
        single = [k2.Fsa(torch.cat([each[:, :3], torch.zeros_like(each[:, :1])], dim=1).to(device)) for each in arcs]
        fsas = k2.create_fsa_vec(single)
        together = torch.cat(arcs).to(device)
        fsas.current, fsas.begins = together[:, 4].contiguous(), together[:, 5].contiguous()
        rows = torch.repeat_interleave(torch.arange(len(arcs)), torch.tensor([len(each) for each in arcs])).to(device)
        return Lattice(fsas, rows, together[:, 3].long(), together[:, 2].long(), torch.cat(graph).to(device))


def fill_cache(
    settings: SequenceTrainConfig,
    model: AsrModel,
    context: Context,
    graph: Denominator | None,
    run: Path,
    batches: TrainBatches,
    world: World,
) -> int:
    """Search every cut of the training data, unperturbed; every process does its share. Returns the number of cuts.

    Args:
        model: of the start, in evaluation mode; runs in ``context``.

    Raises:
        UserError: two different cuts have the same id; cuts without a path through the denominator.
    """
    cuts = _unique(batches.table)
    if world.is_main:
        remove(run / FOLDER)
    broadcast_object(world, None)
    share = sorted(cuts.values(), key=lambda cut: (-cut.duration, cut.id))[world.rank :: world.size]
    pathless: list[str] = []
    for first in range(0, len(share), SHARD):
        tensors: dict[str, Tensor] = {}
        for batch in evaluation_batches(share[first : first + SHARD], settings.data.max_duration):
            on_device = batch.to(world.device)
            for key, tensor in _search(
                settings, model, context, graph, on_device, sorted(batches.tokenizer.special_ids)
            ):
                if tensor is None:
                    pathless.append(key)
                else:
                    tensors[key] = tensor.cpu().contiguous()
        save_sealed(run / FOLDER / f"{world.rank}-{first}.safetensors", tensors)
    if pathless := gather_lists(world, pathless):
        raise no_path(pathless)
    if world.is_main:
        write_yaml(run / COMPLETE, {"cuts": len(cuts)})
    broadcast_object(world, None)
    return len(cuts)


def no_path(cut_ids: Sequence[str]) -> UserError:
    """The error to raise for cuts through whose frames the pruned denominator has no path."""
    more = f" and {len(cut_ids) - 10} more" if len(cut_ids) > 10 else ""
    return UserError(
        f"cuts {', '.join(cut_ids[:10])}{more}: no path through the denominator graph is left; raise "
        "lattice.denominator.search_beam or max_active, or leave these cuts out"
    )


def _unique(table: CutTable) -> dict[str, Any]:
    """The cuts by their ids."""
    cuts: dict[str, Any] = {}
    for number in range(len(table)):
        cut = table[number]
        known = cuts.setdefault(cut.id, cut)
        if known is not cut and digest(known.to_dict()) != digest(cut.to_dict()):
            raise UserError(f"cut {cut.id}: two different cuts have this id; --cache needs unique ids, so rename one")
    return cuts


def _search(
    settings: SequenceTrainConfig,
    model: AsrModel,
    context: Context,
    graph: Denominator | None,
    batch: Batch,
    special_ids: Sequence[int],
) -> Iterator[tuple[str, Tensor | None]]:
    """Tensors by key: of each cut's hypotheses, or of its lattice; (cut id, None) for a cut without one."""
    with torch.no_grad():
        languages = model.language_ids(batch.languages)
        encoded, lens = model.encode(batch.features, batch.feature_lens, settings.variant, context, None, languages)
        if graph is None:
            n_best = find_n_best(model, settings.trained_head, encoded, lens, settings.hypotheses.beam, special_ids)
            for row, cut_id in enumerate(batch.cut_ids):
                there = n_best.scores[row] > -torch.inf
                yield f"tokens {cut_id}", n_best.tokens[row, there].to(torch.int32)
                yield f"scores {cut_id}", n_best.scores[row, there].float()
            return
        k2, how = k2_for_lattices(), settings.lattice
        outputs = model.ctc_log_probs(encoded)
        lattice = graph_lattice(
            k2, graph.fsa(k2, outputs.device), outputs, lens.clamp(min=1), how.kappa, how.denominator
        )
    fsas = lattice.fsas
    columns = [lattice.frames.int().unsqueeze(1), fsas.current.unsqueeze(1), fsas.begins.unsqueeze(1)]
    arcs = torch.cat([fsas.arcs.values()[:, :3], *columns], dim=1)
    for row, cut_id in enumerate(batch.cut_ids):
        mine = lattice.rows == row
        if not bool(mine.any()):
            yield cut_id, None
            continue
        yield f"arcs {cut_id}", arcs[mine]
        yield f"graph {cut_id}", lattice.graph[mine]
