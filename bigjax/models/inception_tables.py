"""The Inception networks v1 and v3 as tables, which the model and its FLOPs both read.

Szegedy et al. 2014, "Going deeper with convolutions" (arXiv:1409.4842), with the BatchNorm of Ioffe
and Szegedy 2015 and 3×3 in place of 5×5 convolutions, as torchvision; Szegedy et al. 2015,
"Rethinking the Inception architecture for computer vision" (arXiv:1512.00567).
"""

from typing import NamedTuple


class C(NamedTuple):
    """A convolution without bias, BatchNorm, ReLU; padded to keep the size unless `valid`."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False


class Pool(NamedTuple):
    """A pooling, 'max' or 'avg'. Stride 1 keeps the size; `ceil`: no pixel is left out."""

    kind: str
    stride: int = 1
    window: int = 3
    ceil: bool = False


# Steps one after the other; all of a tuple of convolutions read what was before it.
Branch = tuple[C | Pool | tuple[C, ...], ...]
# Branches side by side, their channels joined.
Block = tuple[Branch, ...]


class Size(NamedTuple):
    """An Inception network.

    Attributes:
      stem: what comes before the first block.
      small_stem: the same for small images, with as many channels.
      stages: blocks, and poolings between them.
      auxiliary: (stage, block) of each block whose output an auxiliary head reads.
      auxiliary_map: rows and columns that such a head averages to.
      auxiliary_convs: its convolutions.
      auxiliary_hidden: units of its hidden layer; 0: none, and what was convolved is averaged.
      dropout: share of the last features set to zero in training.
      smallest: side of the smallest image, with the stem and with the small one.
    """

    stem: tuple[C | Pool, ...]
    small_stem: tuple[C | Pool, ...]
    stages: tuple[tuple[Block | Pool, ...], ...]
    auxiliary: tuple[tuple[int, int], ...]
    auxiliary_map: tuple[int, int]
    auxiliary_convs: tuple[C, ...]
    auxiliary_hidden: int
    dropout: float
    smallest: tuple[int, int]


def _v1(a: int, b_in: int, b: int, c_in: int, c: int, d: int) -> Block:
    return (C(a),), (C(b_in), C(b, (3, 3))), (C(c_in), C(c, (3, 3))), (Pool('max'), C(d))


def _v3_a(pooled: int) -> Block:
    double = (C(64), C(96, (3, 3)), C(96, (3, 3)))
    return (C(64),), (C(48), C(64, (5, 5))), double, (Pool('avg'), C(pooled))


def _v3_c(c: int) -> Block:
    row, column = (1, 7), (7, 1)
    double = (C(c), C(c, column), C(c, row), C(c, column), C(192, row))
    return (C(192),), (C(c), C(c, row), C(192, column)), double, (Pool('avg'), C(192))


_V3_B = (
    (C(384, (3, 3), 2, True),),
    (C(64), C(96, (3, 3)), C(96, (3, 3), 2, True)),
    (Pool('max', 2),),
)
_V3_D = (
    (C(192), C(320, (3, 3), 2, True)),
    (C(192), C(192, (1, 7)), C(192, (7, 1)), C(192, (3, 3), 2, True)),
    (Pool('max', 2),),
)
_V3_E = (
    (C(320),),
    (C(384), (C(384, (1, 3)), C(384, (3, 1)))),
    (C(448), C(384, (3, 3)), (C(384, (1, 3)), C(384, (3, 1)))),
    (Pool('avg'), C(192)),
)
_HALVE = Pool('max', 2, ceil=True)

SIZES = {
    1: Size(
        stem=(C(64, (7, 7), 2), _HALVE, C(64), C(192, (3, 3)), _HALVE),
        small_stem=(C(64, (3, 3)), C(64), C(192, (3, 3)), _HALVE),
        stages=(
            (_v1(64, 96, 128, 16, 32, 32), _v1(128, 128, 192, 32, 96, 64), _HALVE),
            (
                _v1(192, 96, 208, 16, 48, 64),
                _v1(160, 112, 224, 24, 64, 64),
                _v1(128, 128, 256, 24, 64, 64),
                _v1(112, 144, 288, 32, 64, 64),
                _v1(256, 160, 320, 32, 128, 128),
                Pool('max', 2, 2, ceil=True),
            ),
            (_v1(256, 160, 320, 32, 128, 128), _v1(384, 192, 384, 48, 128, 128)),
        ),
        auxiliary=((1, 0), (1, 3)),
        auxiliary_map=(4, 4),
        auxiliary_convs=(C(128),),
        auxiliary_hidden=1024,
        dropout=0.2,
        smallest=(1, 1),
    ),
    3: Size(
        stem=(
            C(32, (3, 3), 2, True),
            C(32, (3, 3), 1, True),
            C(64, (3, 3)),
            Pool('max', 2),
            C(80),
            C(192, (3, 3), 1, True),
            Pool('max', 2),
        ),
        small_stem=(C(32, (3, 3)), C(32, (3, 3)), C(64, (3, 3)), C(80), C(192, (3, 3))),
        stages=(
            (_v3_a(32), _v3_a(64), _v3_a(64)),
            (_V3_B, _v3_c(128), _v3_c(160), _v3_c(160), _v3_c(192)),
            (_V3_D, _V3_E, _V3_E),
        ),
        auxiliary=((1, 4),),
        auxiliary_map=(5, 5),
        auxiliary_convs=(C(128), C(768, (5, 5), 1, True)),
        auxiliary_hidden=0,
        dropout=0.5,
        smallest=(75, 7),
    ),
}
