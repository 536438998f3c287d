"""Near-far attention over a sequence that lies on several ranks of ``torch.distributed``.

Every rank holds the tokens outside the image and whole rows of its tiles. A query meets keys of four kinds, each a
partial, and ``merge_partials`` joins them as if they had been on one rank: exact tokens and tiles of the rank's own
rows with a border of its neighbours' rows, the pooled tiles of all other rows, and chosen tiles of other rows. What
travels are the borders, one pooled key and value per tile, and, where tiles are chosen, every slab once round the
ring; ``received_bytes`` says how much that is.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from attn_kernels.checks import check_qkv, resolve_scale
from attn_kernels.grid import TokenGrid
from attn_kernels.impl import Impl
from attn_kernels.landmark import landmark_attention
from attn_kernels.near_far.api import near_far_attention
from attn_kernels.near_far.tiles import near_tiles, pool_tiles, tile_sizes
from attn_kernels.partial import Partial, merge_partials
from attn_kernels.sequence_shards import Shards, tile_tokens
from attn_kernels.softmax import attend_scores

_SCORES_AT_ONCE = 1 << 24
"""Elements of the score block held at a time."""


class SequenceParallelNearFar:
    """Answers near-far attention on the tokens of one rank; every rank of the group calls it at the same time.

    The answer is that of ``near_far_attention`` on one rank up to rounding. No gradient, no key mask, one image.

    Args:
        shards: Which rows lie where; one share per rank of the group.
        group: The ranks; the default group if ``None``.
        impl: Which implementation computes the rank's own part.

    Attributes:
        received: Bytes received so far.

    Raises:
        ValueError: The group has another number of ranks than ``shards``.
    """

    def __init__(self, shards: Shards, *, group: dist.ProcessGroup | None = None, impl: Impl | str = Impl.AUTO) -> None:
        self.shards = shards
        self.group = group
        self.impl = Impl(impl)
        self.rank = dist.get_rank(group)
        self.received = 0
        if dist.get_world_size(group) != shards.ranks:
            raise ValueError(f"shards are for {shards.ranks} ranks, the group has {dist.get_world_size(group)}")

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Partial:
        """Attend.

        Args:
            q: ``[B, H, Nr, D]``, after RoPE; the tokens outside the image, equal on all ranks, then the rank's rows.
            k: ``[B, H, Nr, D]``, likewise.
            v: ``[B, H, Nr, Dv]``, likewise.
            scale: Score scale; ``1 / sqrt(D)`` if ``None``.

        Returns:
            ``Partial`` over the keys of all ranks for the queries of this one.

        Raises:
            ValueError: Shapes do not fit the rank's share.
        """
        check_qkv(q, k, v)
        start, expected = self.shards.grid.start, self._local_grid().stop
        if q.shape[2] != expected or k.shape[2] != expected:
            raise ValueError(f"rank {self.rank} holds {expected} tokens, got q {tuple(q.shape)} and k {tuple(k.shape)}")
        scale = resolve_scale(scale, q.shape[-1])
        both = torch.cat([k, v], dim=-1)
        means = self._all_means(both)
        chosen = self._choose(q, means[..., : q.shape[-1]], scale)
        parts = [self._own(q, both, chosen, scale)]
        if self.shards.seen(self.rank) != (0, means.shape[2]):
            parts.append(self._pooled(q, means, chosen, scale))
        if chosen is not None and self.shards.ranks > 1:
            parts.append(self._ring(q, both, chosen, scale))
        joined = merge_partials(*parts)
        if start == 0 or self.shards.config.exact_queries == "pooled":
            return Partial(joined.out.to(v.dtype), joined.lse)
        text = self._text(q[:, :, :start], k, v, scale)
        out = torch.cat([text.out.to(v.dtype), joined.out[:, :, start:].to(v.dtype)], dim=2)
        return Partial(out, torch.cat([text.lse, joined.lse[:, :, start:]], dim=2))

    def _local_grid(self, *, above: int = 0, below: int = 0) -> TokenGrid:
        grid = self.shards.grid
        return TokenGrid(grid.start, above + self.shards.rows(self.rank) + below, grid.columns)

    def _all_means(self, both: Tensor) -> Tensor:
        """Mean key and value of every tile of the image, ``[B, H, T, D + Dv]``."""
        (own,), _ = pool_tiles([both], [self._local_grid()], self.shards.config.tile_shape, None)
        sizes = [last - first for first, last in map(self.shards.tiles, range(self.shards.ranks))]
        parts = self._gather(F.pad(own, (0, 0, 0, max(sizes) - own.shape[2])))
        return torch.cat([part[:, :, :size] for part, size in zip(parts, sizes, strict=True)], dim=2)

    def _choose(self, q: Tensor, keys: Tensor, scale: float) -> Tensor | None:
        """Chosen tiles of the rank's query tiles, ``[B, H, Tr, top_k]`` int64 over the whole image, -1 = none."""
        config, (first, last) = self.shards.config, self.shards.tiles(self.rank)
        if config.top_k == 0:
            return None
        (means,), _ = pool_tiles([q], [self._local_grid()], config.tile_shape, None)
        near = near_tiles([self.shards.grid], config.tile_shape, config.radius, q.device)[first:last]
        padded = F.pad(keys, (0, 0, 0, 1)).transpose(-1, -2)  # The tile T does not exist.
        kept = min(config.top_k, keys.shape[2])
        found = []
        step = max(1, _SCORES_AT_ONCE // (keys.shape[0] * keys.shape[1] * padded.shape[-1]))
        for rows, close in zip(torch.split(means, step, dim=2), torch.split(near, step), strict=True):
            scores = scale * (rows @ padded)
            scores[..., -1] = -torch.inf
            scores.scatter_(-1, close.expand(*scores.shape[:2], -1, -1), -torch.inf)
            best = scores.topk(kept, dim=-1)
            found.append(torch.where(best.values == -torch.inf, -1, best.indices))
        return F.pad(torch.cat(found, dim=2), (0, config.top_k - kept), value=-1)

    def _own(self, q: Tensor, both: Tensor, chosen: Tensor | None, scale: float) -> Partial:
        """Near-far attention over the rank's rows and their borders."""
        shards, (above, below) = self.shards, self.shards.border(self.rank)
        start, columns, width = shards.grid.start, shards.grid.columns, q.shape[-1]
        over, under = self._borders(both[:, :, start:], above * columns, below * columns)
        keys = torch.cat([both[:, :, :start], over, both[:, :, start:], under], dim=2)
        # Rows of other ranks have no queries here.
        queries = torch.cat(
            [q[:, :, :start], q.new_zeros(*q.shape[:2], above * columns, width), q[:, :, start:]], dim=2
        )
        queries = F.pad(queries, (0, 0, 0, below * columns))
        selection = None
        if chosen is not None:
            (first, last), (own, after) = shards.seen(self.rank), shards.tiles(self.rank)
            inside = (chosen >= first) & (chosen < last)
            local = torch.where(inside, chosen - first, -1)
            selection = F.pad(local, (0, 0, own - first, last - after), value=-1)
        out, lse = near_far_attention(
            queries,
            keys[..., :width].contiguous(),
            keys[..., width:].contiguous(),
            grids=[self._local_grid(above=above, below=below)],
            config=replace(shards.config, exact_queries="pooled"),
            scale=scale,
            selection=selection,
            impl=self.impl,
        )
        place = start + above * columns
        mine = [slice(0, start), slice(place, place + shards.rows(self.rank) * columns)]
        return Partial(torch.cat([out[:, :, part] for part in mine], dim=2), torch.cat([lse[:, :, p] for p in mine], 2))

    def _pooled(self, q: Tensor, means: Tensor, chosen: Tensor | None, scale: float) -> Partial:
        """Attention to the pooled tiles outside the rank's rows and their borders, without the chosen ones."""
        shards, (first, last), tiles = self.shards, self.shards.seen(self.rank), means.shape[2]
        far = torch.cat([torch.arange(first, device=q.device), torch.arange(last, tiles, device=q.device)])
        counts = tile_sizes([shards.grid], shards.config.tile_shape, q.device)[far].to(means.dtype)
        pooled = means.index_select(2, far)
        keys, values = pooled[..., : q.shape[-1]], pooled[..., q.shape[-1] :]
        hidden = None
        if chosen is not None:
            hidden = torch.zeros(*chosen.shape[:3], tiles + 1, dtype=torch.bool, device=q.device)
            hidden = hidden.scatter(-1, torch.where(chosen < 0, tiles, chosen), True).index_select(-1, far)
            # Queries outside the image have chosen nothing: a last row for them.
            hidden = F.pad(hidden, (0, 0, 0, 1), value=False)
        own = tile_tokens(self._local_grid(), shards.config, q.device)
        tile_of = F.pad(own.tile_of, (shards.grid.start, 0), value=-1)
        step = max(1, _SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * far.numel()))
        parts = []
        for rows, tile in zip(torch.split(q, step, dim=2), torch.split(tile_of, step), strict=True):
            scores = scale * (rows.to(means.dtype) @ keys.transpose(-1, -2)) + counts.log()
            if hidden is not None:
                scores = scores.masked_fill(hidden[:, :, tile], -torch.inf)
            parts.append(attend_scores(scores, values))
        return Partial(*(torch.cat(side, dim=2) for side in zip(*parts, strict=True)))

    def _ring(self, q: Tensor, both: Tensor, chosen: Tensor, scale: float) -> Partial:
        """Attention to the chosen tiles of other ranks; every rank's slab passes by once."""
        shards, start, (low, high) = self.shards, self.shards.grid.start, self.shards.seen(self.rank)
        most = max(map(shards.rows, range(shards.ranks))) * shards.grid.columns
        slab = F.pad(both[:, :, start:], (0, 0, 0, most - both.shape[2] + start))
        outside = (chosen < low) | (chosen >= high)
        area = shards.config.tile_shape[0] * shards.config.tile_shape[1]
        keys = both.new_zeros(*chosen.shape, area, both.shape[-1])  # [B, H, Tr, top_k, tokens, D + Dv]
        seen = torch.zeros(*chosen.shape, area, dtype=torch.bool, device=q.device)
        for step in range(1, shards.ranks):
            slab = self._pass_on(slab)
            owner = (self.rank - step) % shards.ranks
            first, last = shards.tiles(owner)
            mine = (outside & (chosen >= first) & (chosen < last)).unsqueeze(-1)
            grid = TokenGrid(0, shards.rows(owner), shards.grid.columns)
            tokens, inside, *_ = tile_tokens(grid, shards.config, q.device)
            local = (chosen - first).clamp(0, last - first - 1)
            index = tokens[local].flatten(2).unsqueeze(-1)  # [B, H, Tr * top_k * tokens, 1]
            arrived = slab.gather(2, index.expand(-1, -1, -1, slab.shape[-1])).view(keys.shape)
            keys = torch.where(mine.unsqueeze(-1), arrived, keys)
            seen = torch.where(mine, inside[local], seen)
        own = tile_tokens(self._local_grid(), shards.config, q.device)
        wide = torch.promote_types(q.dtype, torch.float32)
        queries = q[:, :, start:].index_select(2, own.tokens.flatten()).to(wide)
        queries = queries.view(*q.shape[:2], *own.tokens.shape, -1)  # [B, H, Tr, tokens, D]
        keys, seen = keys.flatten(3, 4).to(wide), seen.flatten(3)
        scores = scale * (queries @ keys[..., : q.shape[-1]].transpose(-1, -2))
        out, lse = attend_scores(scores.masked_fill(~seen.unsqueeze(3), -torch.inf), keys[..., q.shape[-1] :])
        out, lse = (part.flatten(2, 3).index_select(2, own.place) for part in (out, lse))
        return Partial(F.pad(out, (0, 0, start, 0)), F.pad(lse, (start, 0), value=-torch.inf))

    def _text(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Partial:
        """Exact attention of the queries outside the image, joined over all ranks; equal on each of them."""
        start = q.shape[2]
        image = landmark_attention(q, k, v, torch.arange(start, k.shape[2], device=q.device), scale=scale)
        packed = torch.cat([image.out.to(image.lse.dtype), image.lse.unsqueeze(-1)], dim=-1)
        parts = [Partial(part[..., :-1], part[..., -1]) for part in self._gather(packed)]
        own = landmark_attention(q, k, v, torch.arange(start, device=q.device), scale=scale)
        return merge_partials(*parts, Partial(own.out.to(own.lse.dtype), own.lse))

    def _gather(self, x: Tensor) -> list[Tensor]:
        """Tensors of one size from every rank, in order."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.shards.ranks)]
        dist.all_gather(parts, x, group=self.group)
        self.received += (self.shards.ranks - 1) * x.nbytes
        return parts

    def _borders(self, slab: Tensor, above: int, below: int) -> tuple[Tensor, Tensor]:
        """Exchange the nearest rows with both neighbours; ``above`` and ``below`` are tokens wanted."""
        shards, columns = self.shards, self.shards.grid.columns
        over, under = (slab.new_empty(*slab.shape[:2], tokens, slab.shape[-1]) for tokens in (above, below))
        operations = []
        if self.rank > 0 and above:
            wanted = shards.border(self.rank - 1)[1] * columns
            operations += [self._send(slab[:, :, :wanted], self.rank - 1), self._receive(over, self.rank - 1)]
        if self.rank + 1 < shards.ranks and below:
            wanted = shards.border(self.rank + 1)[0] * columns
            operations += [
                self._send(slab[:, :, slab.shape[2] - wanted :], self.rank + 1),
                self._receive(under, self.rank + 1),
            ]
        self._exchange(operations)
        return over, under

    def _pass_on(self, slab: Tensor) -> Tensor:
        """Hand a slab to the next rank and take that of the one before."""
        arrived = torch.empty_like(slab)
        after, before = (self.rank + 1) % self.shards.ranks, (self.rank - 1) % self.shards.ranks
        self._exchange([self._send(slab, after), self._receive(arrived, before)])
        return arrived

    def _send(self, x: Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(dist.isend, x.contiguous(), self._peer(rank), self.group)

    def _receive(self, x: Tensor, rank: int) -> dist.P2POp:
        self.received += x.nbytes
        return dist.P2POp(dist.irecv, x, self._peer(rank), self.group)

    def _peer(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def _exchange(self, operations: list[dist.P2POp]) -> None:
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
