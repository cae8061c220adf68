"""The sum over the paths of a transducer lattice, walked in two ways: by diagonals, fast on a CPU, and by rows, with few operators for a GPU.

Shapes: B batch, T frames, U symbols, S kept positions of a frame. ``losses/transducer.py`` says what the nodes and arcs are.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Topology = Literal["regular", "modified"]

# What an impossible blank counts as by rows, which subtract sums of blanks: in double precision, room for 1e-4 beside it.
_IMPOSSIBLE = -1e9


def sum_lattice(
    px: Tensor,
    py: Tensor,
    starts: Tensor,
    num_symbols: int,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    topology: Topology,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability (B,) of all paths, and the posteriors of the arcs px and py (B, T, S).

    px and py (B, T, S) are the log-probabilities of the symbol and blank arcs. starts (B, T), or (1, 1) for a full lattice with
    S = U + 1, is each frame's first position, non-decreasing. encoder_out_lens and symbol_lens int64 (B,).
    """
    walk = by_diagonals if px.device.type == "cpu" else by_rows
    return walk(px, py, starts, num_symbols, encoder_out_lens, symbol_lens, topology)


def by_rows(
    px: Tensor,
    py: Tensor,
    starts: Tensor,
    num_symbols: int,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    topology: Topology,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_lattice`` with two operators a symbol, whatever the number of frames: a row, the nodes at u, is one cumulative sum.

    A node (t, u) is in column t of its row; in the modified topology in column t - u, so that a symbol arc keeps its column
    there too. With K[c, u] the sum of the row's blanks before column c, the log-probability of reaching a node is

        alpha[c, u] = K[c, u] + logcumsumexp over c of (alpha[c, u - 1] + px[c, u - 1] - K[c, u]).

    Each utterance is walked twice at once, from its beginning and, as a second one with everything reversed, from its end. In
    double precision, because K may be far larger than what is left of it.
    """
    batch, rows, columns = len(px), num_symbols + 1, px.shape[1] + 1
    t, u, has_px, has_py = _arcs(px, starts, encoder_out_lens, symbol_lens, topology)
    last_u, end = symbol_lens.view(-1, 1, 1), encoder_out_lens.view(-1, 1, 1)
    column = t
    if topology == "modified":
        column, end = t - u, end - last_u
    # Nodes that no path can reach, or leave to the end, may lie outside the columns.
    inside = (column >= 0) & (column <= end)
    has_px, has_py = has_px & inside, has_py & inside & (column < end)

    # Cells (rows, 2 B, columns): one utterance forwards, then backwards; the cell after the last takes arcs that are not there.
    row, beyond = 2 * batch * columns, rows * 2 * batch * columns
    first = columns * torch.arange(batch, device=px.device).view(-1, 1, 1)
    node = u * row + first + column
    back = (last_u - u) * row + first + batch * columns + end - column  # the same node, reversed
    # Of a symbol arc its beginning and, reversed, its end; of a blank arc the same, one column on.
    reached = torch.stack([node, back - row]).masked_fill_(~has_px, beyond)
    passed = torch.stack([node + 1, back]).masked_fill_(~has_py, beyond)
    arcs = torch.stack([px, py]).double()
    symbol = arcs.new_full((beyond + 1,), -math.inf).scatter_(
        0, reached.flatten(), arcs[0].expand_as(reached).flatten()
    )
    floored = arcs[1].clamp(min=_IMPOSSIBLE)
    blank = arcs.new_zeros(beyond + 1).scatter_(0, passed.flatten(), floored.expand_as(passed).flatten())
    symbol, blank = (cells[:-1].view(rows, 2 * batch, columns) for cells in (symbol, blank))

    blanks = blank.cumsum(2)
    entering = symbol[:-1].add_(blanks[:-1]).sub_(blanks[1:]).unbind()
    sums = torch.zeros_like(blanks)
    for above, arc, below in zip(sums[:-1].unbind(), entering, sums[1:].unbind(), strict=True):
        torch.logcumsumexp(arc.add_(above), 1, out=below)
    sums.add_(blanks)

    # A path's probability is that of its beginning, an arc and, reversed, its end.
    sums = sums.view(-1)
    last = (last_u * row + first + end.clamp(min=0)).flatten()
    total = sums[last]
    possible = (end.flatten() >= 0) & ~(total < _IMPOSSIBLE / 2)  # nan is no impossible one
    total = total.masked_fill(~possible, -math.inf)
    nowhere = ~(torch.stack([has_px, has_py]) & possible.view(-1, 1, 1))
    ahead = sums[torch.stack([back - row, back - 1]).masked_fill_(nowhere, 0)]
    posteriors = sums[node.masked_fill(nowhere[0] & nowhere[1], 0)] + arcs + ahead - total.view(-1, 1, 1)
    posteriors = posteriors.exp_().clamp_(max=1.0).masked_fill_(nowhere, 0.0).to(px.dtype)
    return total.to(px.dtype), posteriors[0], posteriors[1]


def _arcs(
    px: Tensor, starts: Tensor, encoder_out_lens: Tensor, symbol_lens: Tensor, topology: Topology
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each node's t (1, T, 1) and u (B or 1, T or 1, S), and whether its symbol and its blank arc are there, (B, T, S) bool.

    They are inside the utterance and lead to a kept node; the last blank leads to the end.
    """
    t = torch.arange(px.shape[1], device=px.device).view(1, -1, 1)
    u = starts.unsqueeze(2) + torch.arange(px.shape[2], device=px.device)
    frames, last_u = encoder_out_lens.view(-1, 1, 1), symbol_lens.view(-1, 1, 1)
    next_starts = F.pad(starts[:, 1:], (0, 1)).unsqueeze(2)
    has_px = (t < frames) & (u < last_u)
    if topology == "regular":
        has_px[:, :, -1] = False
    else:
        reached = (u + 1 >= next_starts) & (u + 1 < next_starts + px.shape[2])
        has_px &= torch.where(t < frames - 1, reached, u + 1 == last_u)
    has_py = ((t < frames - 1) & (u <= last_u) & (u >= next_starts)) | ((t == frames - 1) & (u == last_u))
    return t, u, has_px, has_py


# long: both directions share a dozen views of the same two tensors, which is what makes it fast
def by_diagonals(
    px: Tensor,
    py: Tensor,
    starts: Tensor,
    num_symbols: int,
    encoder_out_lens: Tensor,
    symbol_lens: Tensor,
    topology: Topology,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum_lattice`` in T + U steps, each of a few operators on B x S numbers.

    The lattice is walked by anti-diagonals t + u = step, T + U of them. A diagonal has at most S kept nodes,
    at consecutive u, so node (t, u) has slot u mod S of its step to itself: a blank arc keeps the slot, a
    symbol arc goes to the next one, circularly. In the modified topology every arc leads to the next frame, so
    the steps are the frames, and the slots are the same.
    """
    batch, num_frames, width = px.shape
    regular = topology == "regular"
    num_steps = num_frames + 1 + (num_symbols if regular else 0)
    b = torch.arange(batch, device=px.device).view(-1, 1, 1)
    t, u, has_px, has_py = _arcs(px, starts, encoder_out_lens, symbol_lens, topology)

    # arcs stand in cells (step, B, S + 1) at the node they reach; column 0 of the symbol arcs is column S
    columns = width + 1
    row = batch * columns
    node_step = t + u if regular else t
    node = (node_step * row + u.remainder(width) + b * columns).flatten()
    arcs = px.new_full((2, num_steps, batch, columns), -math.inf)
    px_cells, py_cells = arcs[0].view(-1)[row + 1 :], arcs[1].view(-1)[row:]
    px_cells.scatter_(0, node, px.masked_fill(~has_px, -math.inf).flatten())
    py_cells.scatter_(0, node, py.masked_fill(~has_py, -math.inf).flatten())
    arcs[0, :, :, 0] = arcs[0, :, :, width]
    # an utterance that ended waits in its slot for the longest one
    step = torch.arange(num_steps, device=px.device).view(-1, 1, 1)
    end_slot = symbol_lens.remainder(width).view(1, -1, 1).expand(num_steps, -1, -1)
    last_step = encoder_out_lens + symbol_lens if regular else encoder_out_lens
    waiting = step > last_step.view(1, -1, 1)
    arcs[1].scatter_(2, end_slot, arcs[1].gather(2, end_slot).masked_fill(waiting, 0.0))

    # forward: column 0 of the sums is column S, so "the slot before" and "the same slot" are views of one row
    sums = px.new_full((num_steps, batch, columns), -math.inf)
    sums[0, :, 1] = 0.0
    sums[0, :, 0] = sums[0, :, width]
    pairs = arcs[..., :width].unbind(1)
    sources = sums.as_strided((num_steps, 2, batch, width), (row, 1, columns, 1)).unbind(0)
    targets, firsts, lasts = sums[..., 1:].unbind(0), sums[..., 0].unbind(0), sums[..., width].unbind(0)
    by_symbol, by_blank = arcs[0, ..., :width].unbind(0), arcs[1, ..., :width].unbind(0)
    for k in range(1, num_steps):
        pairs[k].add_(sources[k - 1])
        torch.logaddexp(by_symbol[k], by_blank[k], out=targets[k])
        firsts[k].copy_(lasts[k])
    total = targets[-1].gather(1, end_slot[0]).squeeze(1)

    # backward: a node's posterior is shared out over the two arcs that reach it; the shares sum to 1 whatever
    # the rounding of long sums, as exp(alpha + arc + beta - total) would not; nan: no path reaches a node
    odds = arcs[0] - arcs[1]
    torch.sigmoid(odds, out=arcs[0])
    torch.sigmoid(odds.neg_(), out=arcs[1])
    arcs.nan_to_num_(0.0)
    possible = (total > -math.inf).to(px.dtype).unsqueeze(1)
    posterior = torch.zeros_like(targets[-1]).scatter_(1, end_slot[0], possible)
    symbols = arcs[0]
    next_symbol, firsts, lasts = (
        symbols[..., 1:].unbind(0),
        symbols[..., 0].unbind(0),
        symbols[..., -1].unbind(0),
    )
    for k in range(num_steps - 1, 0, -1):
        pairs[k].mul_(posterior)
        lasts[k].copy_(firsts[k])
        torch.add(by_blank[k], next_symbol[k], out=posterior)
    px_post, py_post = px_cells.gather(0, node).view_as(px), py_cells.gather(0, node).view_as(py)
    return total, px_post, py_post.masked_fill_(~has_py, 0.0)  # not those of waiting
