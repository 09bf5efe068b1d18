"""What the kernels of attention for Hopper do alike: tiles in registers, rows of a sequence."""

from ra_triton.launch import gluon
from ra_triton.launch.gluon import gl, opaque_zero
from ra_triton.launch.plans import Bulk, Layout

FAR = gl.constexpr(2**30)  # more tokens than there are; see rows_of_sequences


@gluon.jit
def anew(x):
    """``x``, opaque to the compiler, so that what depends on it is computed where it is used.

    Otherwise that is computed as the program begins, and held in the 24 registers that a thread of
    a worker warp has until its job begins, or spilled.
    """
    return x | opaque_zero()


@gluon.jit
def columns_within(x, first, limit, otherwise: gl.constexpr):
    """``x [rows, columns]`` where ``first <= column < limit``, both ``[rows]`` or None.

    ``otherwise`` elsewhere. A thread holds two of every eight columns. With those eight as a dim of
    their own its columns are constants of the code plus one number, where a plain comparison takes
    32 registers.
    """
    LAYOUT: gl.constexpr = x.type.layout
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    x = x.reshape([ROWS, COLUMNS // 8, 8])
    SPLIT: gl.constexpr = x.type.layout
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, SPLIT))
    eights = gl.arange(0, COLUMNS // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, SPLIT))) * 8
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, SPLIT)))
    if limit is not None:
        end = gl.convert_layout(limit, ROW)[:, None, None] - within[None, None, :]
        x = gl.where(eights[None, :, None] < end, x, otherwise)
    if first is not None:
        begin = gl.convert_layout(first, ROW)[:, None, None] - within[None, None, :]
        x = gl.where(eights[None, :, None] >= begin, x, otherwise)
    return gl.convert_layout(x.reshape([ROWS, COLUMNS]), LAYOUT)


@gluon.jit
def coordinates(b, h, row, first, length, VARLEN: gl.constexpr):
    """Of ``row`` of a head; VARLEN has descriptors of :func:`rows_of_sequences`."""
    if VARLEN:
        return [FAR, first + length, h, FAR - length + row, 0]
    else:
        return [b, h, row, 0]


def rows_of_sequences(t: Layout, rows: int) -> Bulk:
    """``[1, total, H, D]`` as ``rows`` of one head of one sequence, which end where it does.

    A copy is cut at the end of a dim. Row ``i`` of a sequence of ``n`` rows from ``first`` on is
    ``[FAR, first + n, h, FAR - n + i, 0]``: the fourth dim ends with the sequence's last row. The
    two dims of rows lead to row ``FAR + first + i``, and index FAR of the first dim, whose stride
    is ``2^34 - row`` elements, takes FAR rows off again: FAR times 2^34 elements of two bytes are
    2^65 bytes, which is 0 in addresses of 64 bits. After Triton's ``tools/ragged_tma.py``.
    """
    (_, total, H, D), (_, row, head, lane) = t.shape, t.strides
    shape = (FAR.value + 1, total + 1, H, FAR.value, D)
    return Bulk(shape, (2**34 - row, row, head, row, lane), (1, 1, 1, rows, D))
