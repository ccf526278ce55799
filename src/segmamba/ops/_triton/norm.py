"""Kernels of the instance norm, and what launches them.

In channels-last memory a case is N rows of C channels, one after the other. The kernels
read it as rows of WIDTH = G * C elements, which fill COLUMNS, a power of two, better
than C does (48 channels: 240 of 256): threads take 16 bytes each and few are idle.
Column j holds channel j mod C.

A norm is three launches: sums over chunks of rows, one small merge of the chunks, and a
pass that writes. There are no atomics, so the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

NORMED = 2
"""`join` of a residual that is normed too. 0 is no residual, 1 is one that is added
before the activation, 3 one that is added after it."""

TILE = 4096
"""Elements that a program holds at a time."""
WARPS = 8
CHUNKS = 1024
"""Programs of a sum, over all cases: two or three for each place of a large GPU."""
TILES = 4
"""Tiles that a program of a writing pass works through."""
MERGED = 8
"""Channels of one program of a merge: 32 bytes."""


# --- kernels --------------------------------------------------------------------------


@triton.jit
def _normed(x, inside, mean, rstd):
    value = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    return (value - mean) * rstd


@triton.jit
def _row_of(numbers, case, kind, kinds, channels, column, ok):
    """Load one number a column from (B, kinds, C)."""
    at = numbers + (case * kinds + kind) * channels + column % channels
    return tl.load(at, mask=ok, other=0.0)[None, :]


@triton.jit
def _sum_statistics(
    x,
    parts,
    elements,
    rows,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Give each column's mean and sum of squared deviations over a chunk of rows.

    Sums are of differences from the chunk's first row, a value of the channel itself:
    what cancels is then at most the count times what remains.
    """
    chunk, case = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = chunk.to(tl.int64) * rows * WIDTH
    left = tl.minimum(elements - start, rows * WIDTH).to(tl.int32)
    x += case * elements + start
    column = tl.arange(0, COLUMNS)
    wide = column < WIDTH
    offset = tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]
    shift = tl.load(x + column, mask=wide & (column < left), other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    full = left // (ROWS * WIDTH)
    for _ in range(full):
        # Idle columns hold zero and are shifted by zero.
        value = tl.load(x + offset, mask=wide[None, :], other=0.0).to(tl.float32)
        delta = value - shift[None, :]
        total += delta
        squares += delta * delta
        x += ROWS * WIDTH
    inside = wide[None, :] & (offset < left - full * ROWS * WIDTH)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    delta = tl.where(inside, value - shift[None, :], 0.0)
    total += delta
    squares += delta * delta
    number = tl.maximum((left - column + WIDTH - 1) // WIDTH, 1).to(tl.float32)
    sums = tl.sum(total, axis=0)
    rest = tl.maximum(tl.sum(squares, axis=0) - sums * sums / number, 0.0)
    parts += (case * tl.num_programs(0) + chunk) * 2 * WIDTH + column
    tl.store(parts, shift + sums / number, mask=wide)
    tl.store(parts + WIDTH, rest, mask=wide)


@triton.jit
def _entries(
    parts,
    begin,
    elements,
    rows,
    chunks,
    channels,
    channel,
    WIDTH,
    ENTRIES: tl.constexpr,
):
    """Find entries, each one of the G channel groups of a chunk.

    Gives pointers, what is there, and the number of values behind each.
    """
    groups = WIDTH // channels
    entry = begin + tl.arange(0, ENTRIES)
    chunk, first = entry // groups, (entry % groups) * channels
    left = tl.minimum(elements - chunk.to(tl.int64) * rows * WIDTH, rows * WIDTH)
    count = tl.where(chunk < chunks, (left - first + WIDTH - 1) // WIDTH, 0)
    inside = (count > 0)[:, None] & (channel < channels)[None, :]
    here = parts + (chunk * (2 * WIDTH) + first)[:, None] + channel[None, :]
    return here, inside, count.to(tl.float32)[:, None]


@triton.jit
def _merge_statistics(
    parts,
    stats,
    elements,
    rows,
    chunks,
    channels,
    eps,
    first_kind: tl.constexpr,
    KINDS: tl.constexpr,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merge the chunks by Chan's formula, to mean and 1 / deviation."""
    case = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    groups = WIDTH // channels
    parts += case * chunks * 2 * WIDTH
    first = tl.load(parts + channel, mask=there, other=0.0)
    drift = tl.zeros([ENTRIES, CHANNELS], tl.float32)
    for begin in range(0, chunks * groups, ENTRIES):
        here, inside, count = _entries(
            parts, begin, elements, rows, chunks, channels, channel, WIDTH, ENTRIES
        )
        mean = tl.load(here, mask=inside, other=0.0)
        drift += tl.where(inside, count * (mean - first[None, :]), 0.0)
    number = (elements // channels) * 1.0
    middle = first + tl.sum(drift, axis=0) / number
    squares = tl.zeros([ENTRIES, CHANNELS], tl.float32)
    for begin in range(0, chunks * groups, ENTRIES):
        here, inside, count = _entries(
            parts, begin, elements, rows, chunks, channels, channel, WIDTH, ENTRIES
        )
        mean = tl.load(here, mask=inside, other=0.0)
        rest = tl.load(here + WIDTH, mask=inside, other=0.0)
        delta = mean - middle[None, :]
        squares += tl.where(inside, rest + count * delta * delta, 0.0)
    variance = tl.sum(squares, axis=0) / number
    stats += (case * KINDS + first_kind) * channels + channel
    tl.store(stats, middle, mask=there)
    tl.store(stats + channels, 1.0 / tl.sqrt(variance + eps), mask=there)


@triton.jit
def _normalise(
    x,
    residual,
    stats,
    out,
    elements,
    channels,
    slope,
    JOIN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write the activation of the normed values, a residual joined to them."""
    case = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * (ROWS * TILES * WIDTH)
    left = tl.minimum(elements - start, ROWS * TILES * WIDTH).to(tl.int32)
    base = case * elements + start
    column = tl.arange(0, COLUMNS)
    wide = column < WIDTH
    offset = tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]
    kinds = 4 if JOIN == 2 else 2
    mean = _row_of(stats, case, 0, kinds, channels, column, wide)
    rstd = _row_of(stats, case, 1, kinds, channels, column, wide)
    if JOIN == 2:
        mean2 = _row_of(stats, case, 2, kinds, channels, column, wide)
        rstd2 = _row_of(stats, case, 3, kinds, channels, column, wide)
    for tile in range(TILES):
        inside = wide[None, :] & (offset < left - tile * ROWS * WIDTH)
        y = _normed(x + base + offset, inside, mean, rstd)
        if JOIN == 2:
            y += _normed(residual + base + offset, inside, mean2, rstd2)
        if JOIN == 1:
            y += tl.load(residual + base + offset, mask=inside).to(tl.float32)
        y = tl.where(y > 0, y, y * slope)
        if JOIN == 3:
            y += tl.load(residual + base + offset, mask=inside).to(tl.float32)
        tl.store(out + base + offset, y.to(out.dtype.element_ty), mask=inside)
        base += ROWS * WIDTH


@triton.jit
def _sum_gradients(
    grad,
    x,
    residual,
    stats,
    parts,
    elements,
    rows,
    channels,
    slope,
    JOIN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum, over a chunk, the gradient behind the activation; alone, times normed x."""
    chunk, case = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = chunk.to(tl.int64) * rows * WIDTH
    left = tl.minimum(elements - start, rows * WIDTH).to(tl.int32)
    base = case * elements + start
    column = tl.arange(0, COLUMNS)
    wide = column < WIDTH
    offset = tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]
    kinds = 4 if JOIN == 2 else 2
    mean = _row_of(stats, case, 0, kinds, channels, column, wide)
    rstd = _row_of(stats, case, 1, kinds, channels, column, wide)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    along = tl.zeros([ROWS, COLUMNS], tl.float32)
    if JOIN == 2:
        mean2 = _row_of(stats, case, 2, kinds, channels, column, wide)
        rstd2 = _row_of(stats, case, 3, kinds, channels, column, wide)
        along2 = tl.zeros([ROWS, COLUMNS], tl.float32)
    for done in range(0, left, ROWS * WIDTH):
        inside = wide[None, :] & (offset < left - done)
        normed = _normed(x + base + offset, inside, mean, rstd)
        y = normed
        if JOIN == 2:
            normed2 = _normed(residual + base + offset, inside, mean2, rstd2)
            y += normed2
        if JOIN == 1:
            y += tl.load(residual + base + offset, mask=inside, other=0.0).to(
                tl.float32
            )
        # Outside, the gradient is zero, and so is all that is added.
        g = tl.load(grad + base + offset, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(y > 0, g, g * slope)
        total += g
        along += g * normed
        if JOIN == 2:
            along2 += g * normed2
        base += ROWS * WIDTH
    sums = 3 if JOIN == 2 else 2
    parts += (case * tl.num_programs(0) + chunk) * sums * WIDTH + column
    tl.store(parts, tl.sum(total, axis=0), mask=wide)
    tl.store(parts + WIDTH, tl.sum(along, axis=0), mask=wide)
    if JOIN == 2:
        tl.store(parts + 2 * WIDTH, tl.sum(along2, axis=0), mask=wide)


@triton.jit
def _merge_sums(
    parts,
    means,
    elements,
    chunks,
    channels,
    WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add the chunks' sums up, and divide by the number of voxels."""
    kind, kinds = tl.program_id(1), tl.num_programs(1)
    case = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = channel < channels
    groups = WIDTH // channels
    parts += (case * chunks * kinds + kind) * WIDTH
    total = tl.zeros([ENTRIES, CHANNELS], tl.float32)
    for begin in range(0, chunks * groups, ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)
        inside = there[None, :] & (entry < chunks * groups)[:, None]
        at = (entry // groups) * (kinds * WIDTH) + (entry % groups) * channels
        total += tl.load(parts + at[:, None] + channel[None, :], mask=inside, other=0.0)
    number = (elements // channels) * 1.0
    at = means + (case * kinds + kind) * channels + channel
    tl.store(at, tl.sum(total, axis=0) / number, mask=there)


@triton.jit
def _differentiate(
    grad,
    x,
    residual,
    stats,
    means,
    grad_x,
    grad_residual,
    elements,
    channels,
    slope,
    JOIN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write the gradients of x and, unless it joins after, of the residual."""
    case = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * (ROWS * TILES * WIDTH)
    left = tl.minimum(elements - start, ROWS * TILES * WIDTH).to(tl.int32)
    base = case * elements + start
    column = tl.arange(0, COLUMNS)
    wide = column < WIDTH
    offset = tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]
    kinds = 4 if JOIN == 2 else 2
    sums = 3 if JOIN == 2 else 2
    mean = _row_of(stats, case, 0, kinds, channels, column, wide)
    rstd = _row_of(stats, case, 1, kinds, channels, column, wide)
    total = _row_of(means, case, 0, sums, channels, column, wide)
    along = _row_of(means, case, 1, sums, channels, column, wide)
    if JOIN == 2:
        mean2 = _row_of(stats, case, 2, kinds, channels, column, wide)
        rstd2 = _row_of(stats, case, 3, kinds, channels, column, wide)
        along2 = _row_of(means, case, 2, sums, channels, column, wide)
    for tile in range(TILES):
        inside = wide[None, :] & (offset < left - tile * ROWS * WIDTH)
        normed = _normed(x + base + offset, inside, mean, rstd)
        y = normed
        if JOIN == 2:
            normed2 = _normed(residual + base + offset, inside, mean2, rstd2)
            y += normed2
        if JOIN == 1:
            y += tl.load(residual + base + offset, mask=inside).to(tl.float32)
        g = tl.load(grad + base + offset, mask=inside).to(tl.float32)
        g = tl.where(y > 0, g, g * slope)
        back = (g - total - normed * along) * rstd
        tl.store(grad_x + base + offset, back.to(grad_x.dtype.element_ty), mask=inside)
        if JOIN == 1:
            back = g
        if JOIN == 2:
            back = (g - total - normed2 * along2) * rstd2
        if JOIN == 1 or JOIN == 2:
            back = back.to(grad_residual.dtype.element_ty)
            tl.store(grad_residual + base + offset, back, mask=inside)
        base += ROWS * WIDTH


# --- launches -------------------------------------------------------------------------


def _ceil_divide(number: int, size: int) -> int:
    return -(-number // size)


def _power_of_two(number: int) -> int:
    """Give the first power of two that isn't smaller."""
    return 1 << (number - 1).bit_length()


class _Plan:
    """How the work on a tensor is cut up; see the module's first lines.

    Args:
        x: (B, C, D, H, W), channels-last.
    """

    def __init__(self, x: Tensor) -> None:
        self.batch, self.channels = x.shape[:2]
        self.elements = x[0].numel()
        self.width, self.columns = row_width(self.channels)
        self.tile_rows = max(TILE // self.columns, 1)
        wide_rows = _ceil_divide(self.elements, self.width)
        self.tiles = _ceil_divide(wide_rows, self.tile_rows)
        wanted = max(CHUNKS // self.batch, 1)
        chunk_tiles = _ceil_divide(self.tiles, wanted)
        self.chunk_rows = chunk_tiles * self.tile_rows
        self.chunks = _ceil_divide(self.tiles, chunk_tiles)

    @property
    def sum_grid(self) -> tuple[int, int]:
        return self.chunks, self.batch

    @property
    def write_grid(self) -> tuple[int, int]:
        return _ceil_divide(self.tiles, TILES), self.batch

    @property
    def merge_blocks(self) -> int:
        return _ceil_divide(self.channels, MERGED)

    @property
    def row_shape(self) -> dict[str, int]:
        return {"WIDTH": self.width, "COLUMNS": self.columns, "ROWS": self.tile_rows}

    @property
    def merge_shape(self) -> dict[str, int]:
        entries = self.chunks * (self.width // self.channels)
        rows = min(max(_power_of_two(entries), 16), TILE // MERGED)
        return {"WIDTH": self.width, "ENTRIES": rows, "CHANNELS": MERGED}


def row_width(channels: int) -> tuple[int, int]:
    """Choose how many elements the kernels take as a row.

    Args:
        channels: Channels C, at most 4096.

    Returns:
        A multiple of C, of 8 too so that 16-byte accesses stay aligned, and the power
        of two it lies in: the first that it fills to 7 / 8, else the best filled.
    """
    step = math.lcm(channels, 8)
    sizes = [256, 512, 1024, 2048, 4096]
    fits = [(size // step * step, size) for size in sizes if size >= step]
    if not fits:
        return channels, _power_of_two(channels)
    full = [fit for fit in fits if fit[0] >= fit[1] * 7 / 8]
    return full[0] if full else max(fits, key=lambda fit: fit[0] / fit[1])


def _statistics(x: Tensor, stats: Tensor, first_kind: int, plan: _Plan, eps: float):
    shape = (plan.batch, plan.chunks, 2, plan.width)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    rows = plan.chunk_rows
    _sum_statistics[plan.sum_grid](
        x, parts, plan.elements, rows, **plan.row_shape, num_warps=WARPS
    )
    _merge_statistics[(plan.merge_blocks, plan.batch)](
        parts,
        stats,
        plan.elements,
        rows,
        plan.chunks,
        plan.channels,
        eps,
        first_kind=first_kind,
        KINDS=stats.shape[1],
        **plan.merge_shape,
        num_warps=WARPS,
    )


def norm(
    x: Tensor, residual: Tensor | None, join: int, slope: float, eps: float, dtype
) -> tuple[Tensor, Tensor]:
    """Normalise, join a residual, and apply a leaky ReLU.

    Args:
        x: (B, C, D, H, W), channels-last, float32, bfloat16 or float16.
        residual: As x, of any of these types, or None.
        join: How the residual joins; see `NORMED`.
        slope: Negative slope of the activation; 1 for none.
        eps: Added to the variance.
        dtype: The result's type.

    Returns:
        The result, as x; and mean and 1 / deviation of x, (B, 2, C) float32, or of x
        and of the residual, (B, 4, C).
    """
    plan = _Plan(x)
    out = torch.empty_like(x, dtype=dtype)
    kinds = 4 if join == NORMED else 2
    shape = (plan.batch, kinds, plan.channels)
    stats = torch.empty(shape, dtype=torch.float32, device=x.device)
    other = x if residual is None else residual
    with torch.cuda.device_of(x):
        _statistics(x, stats, 0, plan, eps)
        if join == NORMED:
            _statistics(other, stats, 2, plan, eps)
        _normalise[plan.write_grid](
            x,
            other,
            stats,
            out,
            plan.elements,
            plan.channels,
            slope,
            JOIN=join,
            TILES=TILES,
            **plan.row_shape,
            num_warps=WARPS,
        )
    return out, stats


def norm_backward(
    grad: Tensor,
    x: Tensor,
    residual: Tensor | None,
    stats: Tensor,
    join: int,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """Give the gradients of `norm`.

    Args:
        grad: Of the result, channels-last.
        x: As given to `norm`.
        residual: As given to `norm`; None also where it joins after.
        stats: What `norm` gave.
        join: As given to `norm`.
        slope: As given to `norm`.

    Returns:
        Gradients of x and of the residual; the latter empty where there is none, or
        where it joins after and its gradient is `grad` itself.
    """
    plan = _Plan(x)
    kinds = 3 if join == NORMED else 2
    shape = (plan.batch, plan.chunks, kinds, plan.width)
    parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    means = torch.empty(
        (plan.batch, kinds, plan.channels), dtype=torch.float32, device=x.device
    )
    grad_x = torch.empty_like(x)
    grad_residual = x.new_empty(0) if residual is None else torch.empty_like(residual)
    other = x if residual is None else residual
    sizes, shape = (plan.elements, plan.channels), plan.row_shape
    with torch.cuda.device_of(x):
        _sum_gradients[plan.sum_grid](
            grad,
            x,
            other,
            stats,
            parts,
            plan.elements,
            plan.chunk_rows,
            plan.channels,
            slope,
            JOIN=join,
            **shape,
            num_warps=WARPS,
        )
        _merge_sums[(plan.merge_blocks, kinds, plan.batch)](
            parts,
            means,
            plan.elements,
            plan.chunks,
            plan.channels,
            **plan.merge_shape,
            num_warps=WARPS,
        )
        _differentiate[plan.write_grid](
            grad,
            x,
            other,
            stats,
            means,
            grad_x,
            grad_x if residual is None else grad_residual,
            *sizes,
            slope,
            JOIN=join,
            TILES=TILES,
            **shape,
            num_warps=WARPS,
        )
    return grad_x, grad_residual
