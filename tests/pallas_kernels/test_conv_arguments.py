"""Convolution's complaints, word for word: the argument, its value, the rule, what works."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.conv import ConvBlockSizes, conv1d, conv2d, reference
from pallas_kernels.conv.checks import check_conv1d, check_conv2d


def x(*shape, dtype='float32'):
    return jnp.zeros(shape, dtype)


IMAGES = {'x_BHWC': x(2, 9, 8, 6), 'w_KLDO': x(3, 2, 6, 4)}
SEQUENCES = {'x_BTC': x(2, 8, 6), 'w_KDO': x(3, 6, 4)}
FLOATS = 'must be one of bfloat16, float16, float32, float64; try '
PAIR = 'must be a Python int >= 1, or a pair (rows, columns); try '
ACTIVATIONS = 'must be None or one of relu, silu, gelu, tanh, sigmoid; try '
PADS = "must be 'SAME', 'VALID' or ((above, below), (left, right)), Python ints >= 0; try "
PADS_1D = "must be 'SAME', 'VALID', 'CAUSAL' or a pair (before, after) of Python ints >= 0; try "
OF_IMAGES = [
    (
        {'x_BHWC': x(9, 8, 6)},
        'x_BHWC=float32[9, 8, 6]: must have 4 dimensions [B, H, W, C], none of them 0; try '
        'x_BHWC=float32[2, 16, 16, 8]',
    ),
    (
        {'w_KLDO': x(3, 0, 6, 4)},
        'w_KLDO=float32[3, 0, 6, 4]: must have 4 dimensions [K, L, C / groups, O], none of them 0; '
        'try w_KLDO=float32[3, 3, 8, 16]',
    ),
    (
        {'x_BHWC': x(2, 9, 8, 6, dtype='int8')},
        f"x_BHWC=int8[2, 9, 8, 6]: {FLOATS}x_BHWC=x_BHWC.astype('float32')",
    ),
    (
        {'w_KLDO': x(3, 2, 6, 4, dtype='bfloat16')},
        'w_KLDO=bfloat16[3, 2, 6, 4]: must have the type of x_BHWC, float32; try '
        'w_KLDO=float32[3, 2, 6, 4]',
    ),
    (
        {'groups': 4},
        'groups=4: must divide the 6 channels of x_BHWC and the 4 of w_KLDO; try groups=2',
    ),
    (
        {'groups': 3, 'w_KLDO': x(3, 2, 2, 4)},
        'groups=3: must divide the 6 channels of x_BHWC and the 4 of w_KLDO; try groups=2',
    ),
    ({'groups': 0}, 'groups=0: must be a Python int >= 1; try groups=1'),
    (
        {'groups': 2},
        'w_KLDO=float32[3, 2, 6, 4]: must have C / groups = 3 input channels, as x_BHWC has C = 6; '
        'try w_KLDO=float32[3, 2, 3, 4]',
    ),
    ({'stride': 0}, f'stride=0: {PAIR}stride=1'),
    ({'stride': (1, 2, 1)}, f'stride=(1, 2, 1): {PAIR}stride=1'),
    ({'dilation': (1, 0)}, f'dilation=(1, 0): {PAIR}dilation=1'),
    ({'dilation': 1.5}, f'dilation=1.5: {PAIR}dilation=1'),
    ({'padding': 'CAUSAL'}, f"padding='CAUSAL': {PADS}padding='SAME'"),
    ({'padding': 1}, f"padding=1: {PADS}padding='SAME'"),
    ({'padding': ((1, -1), (0, 0))}, f"padding=((1, -1), (0, 0)): {PADS}padding='SAME'"),
    (
        {'padding': 'VALID', 'dilation': 5},
        'padding of rows=(0, 0): the kernel reaches over 11 rows, which these and x, of 9, must '
        'hold; try padding of rows=(2, 0)',
    ),
    (
        {'padding': ((4, 4), (0, 1)), 'dilation': (1, 9)},
        'padding of columns=(0, 1): the kernel reaches over 10 columns, which these and x, of 8, '
        'must hold; try padding of columns=(1, 1)',
    ),
    ({'activation': 'swish'}, f"activation='swish': {ACTIVATIONS}activation='relu'"),
    ({'bias': x(6)}, 'bias=float32[6]: must be float of shape [O]; try bias=float32[4]'),
    (
        {'bias': x(4, dtype='int32')},
        'bias=int32[4]: must be float of shape [O]; try bias=float32[4]',
    ),
    (
        {'scale_shift': x(4)},
        'scale_shift=float32[4]: must be None or a pair (scale, shift); try '
        'scale_shift=(float32[4], float32[4])',
    ),
    (
        {'scale_shift': (x(4), None)},
        'scale_shift[1]=None: must be float of shape [O]; try scale_shift[1]=float32[4]',
    ),
    (
        {'scale_shift': (x(1, 4), x(4))},
        'scale_shift[0]=float32[1, 4]: must be float of shape [O]; try scale_shift[0]=float32[4]',
    ),
    (
        {'residual': x(2, 9, 8, 4), 'stride': 2},
        "residual=float32[2, 9, 8, 4]: must have the output's shape [B, P, Q, O] and the type of "
        'x_BHWC; try residual=float32[2, 5, 4, 4]',
    ),
    (
        {'residual': x(2, 9, 8, 4, dtype='bfloat16')},
        "residual=bfloat16[2, 9, 8, 4]: must have the output's shape [B, P, Q, O] and the type of "
        'x_BHWC; try residual=float32[2, 9, 8, 4]',
    ),
    (
        {'block_sizes': 128},
        'block_sizes=128: must be a ConvBlockSizes or None; try block_sizes=None',
    ),
    (
        {'block_sizes': ConvBlockSizes(rows=0)},
        'block_sizes.rows=0: must be None or a Python int >= 1; try block_sizes.rows=None',
    ),
    (
        {'impl': 'pallas'},
        "impl='pallas': must be 'reference', 'xla', 'tpu', 'gpu' or None; try impl='xla'",
    ),
]
STATE = x(2, 2, 6)
OF_SEQUENCES = [
    (
        {'x_BTC': x(2, 1, 8, 6)},
        'x_BTC=float32[2, 1, 8, 6]: must have 3 dimensions [B, T, C], none of them 0; try '
        'x_BTC=float32[2, 16, 8]',
    ),
    (
        {'w_KDO': x(3, 1, 6, 4)},
        'w_KDO=float32[3, 1, 6, 4]: must have 3 dimensions [K, C / groups, O], none of them 0; try '
        'w_KDO=float32[3, 8, 16]',
    ),
    ({'stride': (1, 1)}, 'stride=(1, 1): must be a Python int >= 1; try stride=1'),
    ({'dilation': True}, 'dilation=True: must be a Python int >= 1; try dilation=1'),
    ({'padding': 'causal'}, f"padding='causal': {PADS_1D}padding='CAUSAL'"),
    ({'padding': ((0, 0), (1, 1))}, f"padding=((0, 0), (1, 1)): {PADS_1D}padding='CAUSAL'"),
    (
        {'padding': 'VALID', 'dilation': 4},
        'padding of positions=(0, 0): the kernel reaches over 9 positions, which these and x, of '
        '8, must hold; try padding of positions=(1, 0)',
    ),
    ({'state': STATE}, "padding='SAME': must be 'CAUSAL' with state; try padding='CAUSAL'"),
    (
        {'padding': (2, 0), 'return_state': True},
        "padding=(2, 0): must be 'CAUSAL' with return_state; try padding='CAUSAL'",
    ),
    (
        {'padding': 'CAUSAL', 'state': STATE, 'dilation': 2},
        'state=float32[2, 2, 6]: must be the (K - 1) * dilation inputs before x, in its type; try '
        'state=float32[2, 4, 6]',
    ),
    (
        {'padding': 'CAUSAL', 'state': x(2, 2, 6, dtype='bfloat16')},
        'state=bfloat16[2, 2, 6]: must be the (K - 1) * dilation inputs before x, in its type; try '
        'state=float32[2, 2, 6]',
    ),
    (
        {'padding': 'CAUSAL', 'return_state': True, 'stride': 3},
        'x_BTC=float32[2, 8, 6]: its length must be a multiple of stride=3, for the state to go on '
        'from; try x_BTC=float32[2, 9, 6]',
    ),
    (
        {'segment_ids': x(2, 8)},
        'segment_ids=float32[2, 8]: must be integers of shape [B, T]; try segment_ids=int32[2, 8]',
    ),
    (
        {'segment_ids': x(8, dtype='int32')},
        'segment_ids=int32[8]: must be integers of shape [B, T]; try segment_ids=int32[2, 8]',
    ),
    (
        {'segment_ids': x(2, 8, dtype='int32'), 'stride': 2},
        'stride=2: must be 1 with segment_ids; try stride=1',
    ),
    (
        {'segment_ids': x(2, 8, dtype='int32'), 'padding': 'VALID'},
        "padding='VALID': must keep the length with segment_ids; try padding='CAUSAL'",
    ),
    ({'bias': x(6)}, 'bias=float32[6]: must be float of shape [O]; try bias=float32[4]'),
    ({'activation': 1}, f"activation=1: {ACTIVATIONS}activation='relu'"),
]


@pytest.mark.parametrize(('change', 'message'), OF_IMAGES, ids=range(len(OF_IMAGES)))
def test_a_bad_argument_of_images_is_named_with_the_rule_and_what_works(change, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        conv2d(**{**IMAGES, **change})
    assert str(error.value) == message


@pytest.mark.parametrize(('change', 'message'), OF_SEQUENCES, ids=range(len(OF_SEQUENCES)))
def test_a_bad_argument_of_sequences_is_named_with_the_rule_and_what_works(change, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        conv1d(**{**SEQUENCES, **change})
    assert str(error.value) == message


def test_a_refusal_names_the_implementation_and_another(monkeypatch):
    monkeypatch.setattr(reference, 'refuses', lambda *_: 'has no 6 channels')
    with pytest.raises(ValueError, match=r"^impl='reference': has no 6 channels; try impl='xla'$"):
        conv2d(**IMAGES, impl='reference')


def test_one_number_stands_for_both_axes_and_padding_is_told_in_pixels():
    _, spec = check_conv2d(*IMAGES.values(), stride=2, dilation=2)
    assert (spec.stride, spec.dilation, spec.padding) == ((2, 2), (2, 2), ((2, 2), (0, 1)))
    _, spec = check_conv1d(*SEQUENCES.values(), stride=3, padding='CAUSAL', dilation=2)
    assert (spec.stride, spec.dilation, spec.padding) == ((1, 3), (1, 2), ((0, 0), (4, 0)))
    assert spec.out_size((1, 8), (1, 3)) == (1, 3)


@pytest.mark.parametrize('padding', ['SAME', 'VALID', ((1, 3), (0, 2))])
@pytest.mark.parametrize('stride', [1, 2, 3])
def test_sizes_and_padding_are_those_of_jax(padding, stride):
    images = IMAGES['x_BHWC'], IMAGES['w_KLDO']
    _, spec = check_conv2d(*images, stride=stride, padding=padding, dilation=2)
    want = jax.eval_shape(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, padding, rhs_dilation=(2, 2),
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        ),
        *images,
    ).shape[1:3]  # fmt: skip
    assert spec.out_size((9, 8), (3, 2)) == want
