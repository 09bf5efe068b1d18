"""What the kernels of attention for Hopper do alike with a tile in registers."""

from ra_triton.launch import gluon
from ra_triton.launch.gluon import gl


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
