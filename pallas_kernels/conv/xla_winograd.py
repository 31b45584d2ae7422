"""3×3 convolution by Winograd's minimal filtering F(2×2, 3×3): 16 products where a sum takes 36.

Lavin & Gray 2015, "Fast algorithms for convolutional neural networks", equations 7 and 8. Images
are cut in 2×2 output tiles, each reading 4×4 pixels; a fixed linear map takes those to 16 products,
which over all tiles and channels are 16 matrix products, and another maps them back. Its rounding
in float32 is that of XLA's own convolution, which a test holds it to; F(4×4, 3×3) saves more, but
rounds so much more that the sign of a ReLU turns here and there.

Legend: B batch, H W rows and columns (any), C input channels, O output channels, N tiles of all
images. A grid is a list of lists of arrays: its two indices are those of a tile's pixels.
"""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.conv.arguments import Spec

TILE = 2  # output pixels per side
_READ = TILE + 2  # input pixels per side
# The paper's Bᵀ (pixels to products), G (kernel to products) and Aᵀ (products to pixels).
_PIXELS = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])

Grid = list[list[jax.Array]]


def fits(w_KLCO: jax.Array, spec: Spec) -> bool:
    """Whether a convolution is of the kind that this computes."""
    same = Spec(padding=((1, 1), (1, 1)), activation=spec.activation)
    return w_KLCO.shape[:2] == (3, 3) and spec == same


def forward(
    x_BHWC: jax.Array, w_KLCO: jax.Array, spec: Spec
) -> tuple[jax.Array, tuple[Grid, Grid]]:
    """Returns u_BHWO in x's type, and the products' factors, which `gradients` takes."""
    assert fits(w_KLCO, spec)
    b, h, w, c = x_BHWC.shape
    # One pixel before; after, one and whatever fills the last tile.
    pads = [(1, -size % TILE + 1) for size in (h, w)]
    x_BHWC = jnp.pad(x_BHWC, ((0, 0), *pads, (0, 0)))
    rows, cols = x_BHWC.shape[1] - _READ + 1, x_BHWC.shape[2] - _READ + 1
    pixels = [
        [x_BHWC[:, i : i + rows : TILE, j : j + cols : TILE].reshape(-1, c) for j in range(_READ)]
        for i in range(_READ)
    ]
    v_NC = _transform(_PIXELS, pixels)
    u_CO = _transform(_KERNEL, [[w_KLCO[i, j] for j in range(3)] for i in range(3)], store=False)
    y_NO = _transform(_OUTPUT, _each(jnp.matmul, v_NC, u_CO))
    return _join(y_NO, (b, h, w, w_KLCO.shape[3])), (v_NC, u_CO)


def gradients(
    du_BHWO: jax.Array,
    x_BHWC: jax.Array,
    w_KLCO: jax.Array,
    spec: Spec,
    kept: tuple[Grid, Grid],
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of x and w; they come of `kept` alone."""
    del x_BHWC, w_KLCO, spec
    v_NC, u_CO = kept
    b, h, w, o = du_BHWO.shape
    du_BHWO = jnp.pad(du_BHWO, ((0, 0), (0, -h % TILE), (0, -w % TILE), (0, 0)))
    pixels = [
        [du_BHWO[:, i::TILE, j::TILE].reshape(-1, o) for j in range(TILE)] for i in range(TILE)
    ]
    gm_NO = _transform(_OUTPUT.T, pixels)
    du_CO = _each(lambda v, g: v.T @ g, v_NC, gm_NO)
    dw_CO = _transform(_KERNEL.T, du_CO, store=False)
    dv_NC = _transform(_PIXELS.T, _each(lambda g, u: g @ u.T, gm_NO, u_CO))
    c = v_NC[0][0].shape[1]
    tiles = (b, -(-h // TILE), -(-w // TILE), c)
    d_BPQC = [[d.reshape(tiles) for d in row] for row in dv_NC]
    # Neighbouring tiles read the same pixels: the margins are added to the neighbour's own.
    by_column = [_overlap([row[j] for row in d_BPQC], 1) for j in range(_READ)]
    by_row = [_overlap([col[i] for col in by_column], 2) for i in range(TILE)]
    dx_BHWC = _join(by_row, (b, h, w, c))
    return dx_BHWC, jnp.stack([jnp.stack(row) for row in dw_CO])


def _each(f, left: Grid, right: Grid) -> Grid:
    return [[f(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def _transform(matrix: np.ndarray, grid: Grid, *, store: bool = True) -> Grid:
    """`matrix` @ grid @ `matrix`ᵀ over the two indices of a grid."""
    columns = [_mix(matrix, column) for column in zip(*grid, strict=True)]
    if store:
        # Without the barrier XLA fuses the second half into every use and computes the first again.
        columns = lax.optimization_barrier(columns)
    return [_mix(matrix, row) for row in zip(*columns, strict=True)]


def _mix(matrix, arrays):
    terms = [[(float(k), a) for k, a in zip(row, arrays, strict=True) if k] for row in matrix]
    # XLA drops a multiplication by 1 and turns one by -1 into a subtraction.
    return [reduce(add, [a * k for k, a in row]) for row in terms]


def _overlap(pixels: list[jax.Array], axis: int) -> list[jax.Array]:
    """Folds the 4 rows (or columns) read by a tile onto its own 2; the others are neighbours'."""
    before, *own, after = pixels

    def shift(a, by):
        config = [(0, 0, 0)] * a.ndim
        config[axis] = (by, -by, 0)
        return lax.pad(a, jnp.zeros((), a.dtype), config)

    own[0] += shift(after, 1)
    own[-1] += shift(before, -1)
    return own


def _join(tiles: Grid, shape: tuple[int, int, int, int]) -> jax.Array:
    """Interleaves a 2×2 grid of pixels into images, and crops the last tiles to `shape`."""
    b, h, w, c = shape
    p, q = -(-h // TILE), -(-w // TILE)
    rows = [jnp.stack([a.reshape(b, p, q, c) for a in row], axis=3) for row in tiles]
    image = jnp.stack(rows, axis=2).reshape(b, p * TILE, q * TILE, c)[:, :h, :w]
    # Stored once: XLA would fuse this, and the sums before it, into every reader of the result.
    return lax.optimization_barrier(image)
