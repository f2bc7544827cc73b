"""Triton kernels over tiles of the score matrix: log-sum-exps of rows and columns, and sums over its gradient.

Scores exist only in registers: S2 = alpha2 · U Wᵀ + offset, in base 2; alpha and offsets are scaled by log2 e.
One program computes a sum, over its tiles in order: results are deterministic. The row stride of W is
W_units · ALIGNED numbers, which gives the compiler its alignment.

Masked entries are bits in tiles of 128 × 128: `slots` [row tiles, column tiles] holds the index into `bits`
[tiles, 2, 128], −1 without masked entries. A word holds 64 columns of a row; the first 128 words are the left half.

Shape legend: m queries of this rank, N columns of all ranks, D vector size; s splits: programs that share a sum.
"""

import triton
import triton.language as tl

# mypy: disable-error-code="no-untyped-def, misc"


# they change from batch to batch and must not trigger recompilation
_SIZES = ("first_block", "m", "N", "W_units", "column_tiles", "tiles_per_split")


@triton.jit
def _vectors(x_ptr, stride, start, num_rows, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows [start, start + ROWS) with row stride `stride` as [ROWS, BLOCK_D]; zeros out of range."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    inside = (start + rows < num_rows)[:, None]
    if BLOCK_D != D:
        inside = inside & (dims < D)[None, :]
    x_ptr += tl.cast(start, tl.int64) * stride
    return tl.load(x_ptr + (rows[:, None] * stride + dims[None, :]), mask=inside, other=0.0)


@triton.jit
def _drop(s, bits_ptr, slot, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BY_COLUMN: tl.constexpr):
    """Set the masked entries of the scores at (row, column) to −inf: [ROWS, COLUMNS], or transposed."""
    word_ptr = bits_ptr + tl.cast(slot, tl.int64) * 256 + (row % 128 + tl.arange(0, ROWS))
    columns = column % 128 + tl.arange(0, COLUMNS)
    first = tl.load(word_ptr + (column % 128 // 64) * 128)
    second = first
    if COLUMNS > 64:
        second = tl.load(word_ptr + 128)
    if BY_COLUMN:
        words = tl.where((columns < 64)[:, None], first[None, :], second[None, :]) if COLUMNS > 64 else first[None, :]
        bit = (words >> (columns % 64)[:, None]) & 1
    else:
        words = tl.where((columns < 64)[None, :], first[:, None], second[:, None]) if COLUMNS > 64 else first[:, None]
        bit = (words >> (columns % 64)[None, :]) & 1
    return tl.where(bit != 0, float("-inf"), s)


@triton.jit(do_not_specialize=_SIZES)
def sums_kernel(
    U_ptr, W_ptr, offset_ptr, neg_offset_ptr, slots_ptr, bits_ptr,
    row_max_ptr, row_sum_ptr, weighted_ptr, column_max_ptr, column_sum_ptr,
    first_block, m, N, W_units, column_tiles, tiles_per_split, alpha2,
    ALIGNED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    NEG_BIAS: tl.constexpr, OVER_ROWS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Write the maximum of each row and Σ_j 2^(S2 − maximum) [s, m], over the split's columns.

    The rows are those of the launch, from block `first_block` on.
    WEIGHTED: also Σ_j 2^(S2 − maximum) w_j [s, m, D];
    OVER_ROWS: also maximum and sum of each column over the block of rows [blocks of the launch, N], without neg_offset.
    """
    block, split = first_block + tl.program_id(0), tl.program_id(1)
    rows = block * ROWS + tl.arange(0, ROWS)
    u = _vectors(U_ptr, D, block * ROWS, m, ROWS, D, BLOCK_D)
    slots_ptr += (block * ROWS // 128) * column_tiles
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(N, COLUMNS))
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, BLOCK_D), tl.float32)
    slot = tl.load(slots_ptr + first * COLUMNS // 128)
    for tile in range(first, last):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        w = _vectors(W_ptr, W_units * ALIGNED, tile * COLUMNS, N, COLUMNS, D, BLOCK_D)
        offset = tl.load(offset_ptr + columns, mask=columns < N, other=float("-inf"))
        s = tl.dot(u, tl.trans(w), input_precision="ieee") * alpha2 + offset[None, :]
        if slot >= 0:
            s = _drop(s, bits_ptr, slot, block * ROWS, tile * COLUMNS, ROWS, COLUMNS, False)
        slot = tl.load(slots_ptr + (tile + 1) * COLUMNS // 128, mask=tile + 1 < last, other=-1)  # one tile ahead
        if OVER_ROWS:
            s = tl.where(rows[:, None] < m, s, float("-inf"))
            column_largest = tl.max(s, 0)
            shift = tl.where(column_largest == float("-inf"), 0.0, column_largest)
            column_total = tl.sum(tl.exp2(s - shift[None, :]), 0)
            offsets = tl.program_id(0).to(tl.int64) * N + columns
            tl.store(column_max_ptr + offsets, column_largest, mask=columns < N)
            tl.store(column_sum_ptr + offsets, column_total, mask=columns < N)
        if NEG_BIAS:
            s += tl.load(neg_offset_ptr + columns, mask=columns < N, other=float("-inf"))[None, :]
        above = tl.maximum(largest, tl.max(s, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)
        e = tl.exp2(s - shift[:, None])
        shrunk = tl.exp2(largest - shift)
        total = total * shrunk + tl.sum(e, 1)
        if WEIGHTED:
            weighted = tl.dot(e.to(w.dtype), w, weighted * shrunk[:, None], input_precision="ieee")
        largest = above
    start = split.to(tl.int64) * m + block * ROWS
    within, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    tl.store(row_max_ptr + start + within, largest, mask=rows < m)
    tl.store(row_sum_ptr + start + within, total, mask=rows < m)
    if WEIGHTED:
        inside = (rows < m)[:, None] & (dims < D)[None, :]
        tl.store(weighted_ptr + start * D + (within[:, None] * D + dims[None, :]), weighted, mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    U_ptr, W_ptr, row_exponent_ptr, row_offset_ptr, column_offset_ptr, slots_ptr, bits_ptr, out_ptr, out_rows_ptr,
    m, N, W_units, column_tiles, tiles_per_split, alpha2,
    ALIGNED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    BY_COLUMN: tl.constexpr, ROW_PART: tl.constexpr, COLUMN_PART: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """Write Σ_j G_ij w_j to out [s, m, D]; BY_COLUMN: Σ_i G_ij u_i to out [s, N, D], with the row part's Σ_i G_ij too.

    G_ij = 2^(S2 + row_offset_j + row_exponent_i) + 2^(S2 + column_offset_j), with S2 = alpha2 · <u_i, w_j>.
    """
    block, split = tl.program_id(0), tl.program_id(1)
    if BY_COLUMN:
        x_ptr, x_stride, num_outer = W_ptr, W_units * ALIGNED, N
        y_ptr, y_stride, num_inner = U_ptr, D, m
    else:
        x_ptr, x_stride, num_outer = U_ptr, D, m
        y_ptr, y_stride, num_inner = W_ptr, W_units * ALIGNED, N
    outer = block * OUTER + tl.arange(0, OUTER)
    x = _vectors(x_ptr, x_stride, block * OUTER, num_outer, OUTER, D, BLOCK_D)
    # terms that depend only on the outer side
    outer_column = tl.zeros((OUTER,), tl.float32)
    if BY_COLUMN:
        outer_row = outer_column
        if ROW_PART:
            outer_row = tl.load(row_offset_ptr + outer, mask=outer < N, other=float("-inf"))
        if COLUMN_PART:
            outer_column = tl.load(column_offset_ptr + outer, mask=outer < N, other=float("-inf"))
        slots_ptr += block * OUTER // 128
        stride = column_tiles
    else:
        outer_row = outer_column
        if ROW_PART:
            outer_row = tl.load(row_exponent_ptr + outer, mask=outer < m, other=float("-inf"))
        slots_ptr += (block * OUTER // 128) * column_tiles
        stride = 1
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(num_inner, INNER))
    acc = tl.zeros((OUTER, BLOCK_D), tl.float32)
    row_parts = tl.zeros((OUTER,), tl.float32)
    slot = tl.load(slots_ptr + (first * INNER // 128) * stride)
    for tile in range(first, last):
        inner = tile * INNER + tl.arange(0, INNER)
        y = _vectors(y_ptr, y_stride, tile * INNER, num_inner, INNER, D, BLOCK_D)
        s = tl.dot(x, tl.trans(y), input_precision="ieee") * alpha2
        if slot >= 0:
            if BY_COLUMN:
                s = _drop(s, bits_ptr, slot, tile * INNER, block * OUTER, INNER, OUTER, True)
            else:
                s = _drop(s, bits_ptr, slot, block * OUTER, tile * INNER, OUTER, INNER, False)
        slot = tl.load(slots_ptr + ((tile + 1) * INNER // 128) * stride, mask=tile + 1 < last, other=-1)
        inside = inner < num_inner
        # BY_COLUMN: s is 0 in padding rows, and 2^outer_column may overflow: inf times a zero vector is NaN
        if ROW_PART:
            if BY_COLUMN:
                exponent = tl.load(row_exponent_ptr + inner, mask=inside, other=float("-inf"))
            else:
                exponent = tl.load(row_offset_ptr + inner, mask=inside, other=float("-inf"))
            g = tl.exp2(s + outer_row[:, None] + exponent[None, :])
            if BETA:
                row_parts += tl.sum(g, 1)
            if COLUMN_PART:
                if BY_COLUMN:
                    g += tl.exp2(tl.minimum(s + outer_column[:, None], 127.0, propagate_nan=tl.PropagateNan.ALL))
                else:
                    offset = tl.load(column_offset_ptr + inner, mask=inside, other=float("-inf"))
                    g += tl.exp2(s + offset[None, :])
        else:
            if BY_COLUMN:
                g = tl.exp2(tl.minimum(s + outer_column[:, None], 127.0, propagate_nan=tl.PropagateNan.ALL))
            else:
                offset = tl.load(column_offset_ptr + inner, mask=inside, other=float("-inf"))
                g = tl.exp2(s + offset[None, :])
        acc = tl.dot(g.to(y.dtype), y, acc, input_precision="ieee")
    start = split.to(tl.int64) * num_outer + block * OUTER
    within, dims = tl.arange(0, OUTER), tl.arange(0, BLOCK_D)
    store = (outer < num_outer)[:, None] & (dims < D)[None, :]
    out_at = out_ptr + start * D + (within[:, None] * D + dims[None, :])
    tl.store(out_at, acc, mask=store)
    if BETA:
        tl.store(out_rows_ptr + start + within, row_parts, mask=outer < num_outer)


@triton.jit(do_not_specialize=("m", "N", "column_tiles"))
def pack_kernel(matrix_ptr, bits_ptr, m, N, column_tiles):
    """Pack a byte matrix [m, N] into bits per row."""
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    within = tl.arange(0, 128)
    rows = row_tile * 128 + within
    bits_ptr += (row_tile * column_tiles + column_tile).to(tl.int64) * 256
    for half in range(2):
        bit = tl.arange(0, 64)
        columns = column_tile * 128 + half * 64 + bit
        inside = (rows[:, None] < m) & (columns[None, :] < N)
        entries = tl.load(matrix_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=inside, other=0)
        words = tl.sum(entries.to(tl.int64) << bit[None, :].to(tl.int64), 1)
        tl.store(bits_ptr + half * 128 + within, words)
