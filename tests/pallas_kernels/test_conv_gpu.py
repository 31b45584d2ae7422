"""Convolution in Mosaic GPU: interpreted beside the specification, lowered, compiled for an H100.

Legend: B batch, T positions, C channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv_passes import Call, assert_right, drawn
from jax import export
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.conv import conv1d, conv2d, gpu, reference
from pallas_kernels.conv.arguments import ConvBlockSizes, Operands, Spec
from pallas_kernels.conv.checks import check_conv1d
from pallas_kernels.conv.gpu import dense_weights, depthwise_weights, ptxas
from pallas_kernels.conv.gpu.mapped import folds

RACES = plgpu.InterpretGPUParams(detect_races=True)
SAME = ((1, 1), (1, 1))
EVERY = Spec(padding=SAME, activation='gelu')

CASES = {
    'dense': Call((1, 9, 7, 40), (3, 3, 72), EVERY, epilogue=True, dtype='bfloat16'),
    'dense-strides': Call(
        (1, 7, 6, 24),
        (3, 2, 16),
        Spec((2, 3), ((2, 0), (0, 4)), (1, 2)),
        ConvBlockSizes(features=128),
        dtype='float16',
    ),
    'one-by-one-stride': Call((2, 5, 6, 8), (1, 1, 80), Spec((2, 2)), dtype='bfloat16'),
    'sequence': Call(
        (2, 1, 70, 72),
        (1, 2, 16),
        Spec(padding=((0, 0), (40, 0)), dilation=(1, 40)),
        dtype='float16',
    ),
    'depthwise': Call(
        (1, 5, 9, 36),
        (3, 3, 36),
        dataclasses.replace(EVERY, groups=36),
        epilogue=True,
        dtype='bfloat16',
    ),
    'depthwise-strides': Call(
        (1, 7, 9, 40),
        (2, 3, 40),
        Spec((3, 2), ((0, 4), (1, 1)), (2, 1), 40, 'relu'),
        ConvBlockSizes(rows=1, cols=5),
        dtype='float16',
    ),
    'depthwise-sequence-far-taps': Call(
        (2, 1, 40, 64),
        (1, 2, 64),
        Spec(padding=((0, 0), (30, 0)), dilation=(1, 30), groups=64, activation='silu'),
        dtype='bfloat16',
    ),
    'depthwise-sequence-many-taps': Call(
        (1, 1, 24, 64), (1, 19, 64), Spec(padding=((0, 0), (3, 20)), groups=64), dtype='bfloat16'
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_interpreted_all_passes_right_and_without_races(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the gradients of these small kernels take several calls.
    monkeypatch.setattr(depthwise_weights, 'TAPS', 8)
    monkeypatch.setattr(depthwise_weights, 'RUN', 8)
    assert gpu.refuses(drawn(CASES[name])[0], CASES[name].spec) is None
    assert_right(gpu, CASES[name], interpret=RACES)


def test_weight_gradient_of_several_shares_that_reuse_their_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, small in {'STAGES': 2, 'FEWEST': 1, 'BLOCKS': 2}.items():
        monkeypatch.setattr(dense_weights, name, small)
    assert dense_weights.shares(7, 1) == 2
    call = Call((1, 1, 400, 8), (1, 1, 8), Spec(), dtype='bfloat16')
    operands, du = drawn(call)
    dw = gpu.weight_gradient(du, operands, call.spec, interpret=RACES)
    x, du = (np.asarray(z.astype(jnp.float32)) for z in (operands.x_BHWC, du))
    exact = np.einsum('bhtc,bhto->co', x, du)
    np.testing.assert_allclose(dw[0, 0].astype(jnp.float32), exact, rtol=2**-7, atol=1e-4)


def packed(
    kernel: int, *, B: int = 2, T: int = 24, C: int = 32
) -> tuple[Operands, Spec, jax.Array]:
    """Returns a causal depthwise convolution of documents, what it reads not a number in one."""
    draw = np.random.default_rng(0)
    x, du = (jnp.asarray(draw.normal(size=(B, T, C)), jnp.bfloat16) for _ in range(2))
    w = jnp.asarray(draw.normal(size=(kernel, 1, C)), jnp.bfloat16)
    # One id comes back: its two documents see each other, and not what is between.
    ids = jnp.asarray([[3] * 5 + [1] * 2 + [3] * (T - 7), [0] * T], jnp.int32)
    # One document's infinities stay its own: what is not seen is left out, not multiplied by 0.
    x, du = (z.at[0, 5:7].set(jnp.inf) for z in (x, du))
    operands, spec = check_conv1d(x, w, padding='CAUSAL', groups=C, segment_ids=ids)
    return operands, spec, du[:, None]


@pytest.mark.parametrize(
    ('pass_', 'taps'),
    [
        ('forward', 4),
        pytest.param('forward', 35, marks=pytest.mark.slow),  # more than a word has bits
        ('input_gradient', 4),
        ('weight_gradient', 4),
    ],
)
def test_documents_do_not_see_each_other(
    pass_: str, taps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depthwise_weights, 'WARPGROUPS', 1)  # which then reuses its memory
    operands, spec, du = packed(taps, T=24 if taps == 4 else 8)

    def run(module: object, operands: Operands, du: jax.Array, **more: object) -> np.ndarray:
        arguments = (operands, spec) if pass_ == 'forward' else (du, operands, spec)
        found = getattr(module, pass_)(*arguments, **more)
        return np.asarray((found[0] if pass_ == 'forward' else found).astype(jnp.float32))

    if pass_ == 'weight_gradient':  # sums over all documents
        operands = operands._replace(x_BHWC=jnp.nan_to_num(operands.x_BHWC, posinf=1.0))
        du = jnp.nan_to_num(du, posinf=1.0)
    wide = operands._replace(
        x_BHWC=operands.x_BHWC.astype(jnp.float32), w_KLDO=operands.w_KLDO.astype(jnp.float32)
    )
    found = run(gpu, operands, du, interpret=RACES)
    exact = run(reference, wide, du.astype(jnp.float32))
    if pass_ != 'weight_gradient':
        clean = np.ones(found.shape[2], bool)
        clean[5:7] = False
        assert not np.isfinite(found[0, 0, 5:7]).any()
        found, exact = found[:, :, clean], exact[:, :, clean]
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, exact, rtol=2**-7, atol=1e-5 * np.abs(exact).max())


def test_interpreted_twice_the_same_bits() -> None:
    operands, spec, du = packed(2)
    first, second = (gpu.weight_gradient(du, operands, spec) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_copy_that_is_not_awaited_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, spec, du = packed(2)
    monkeypatch.setattr(depthwise_weights.plgpu, 'barrier_wait', lambda _: None)
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match='RACE DETECTED'):
            jax.block_until_ready(gpu.weight_gradient(du, operands, spec, interpret=RACES))
    finally:
        reset_gpu_interpret_mode_state()


def shaped(x: tuple, w: tuple, dtype: str = 'bfloat16', **spec: object) -> tuple[Operands, Spec]:
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in (x, w))
    return Operands(*arrays), Spec(padding=SAME, **spec)


REFUSED = {
    'float32': shaped((1, 8, 8, 64), (3, 3, 64, 64), 'float32'),
    'groups': shaped((1, 8, 8, 64), (3, 3, 32, 64), groups=2),
    'one kernel for each channel': shaped((1, 8, 8, 64), (3, 3, 1, 128), groups=64),
    'dilated kernels of up to 256': shaped((1, 512, 512, 64), (3, 3, 64, 64), dilation=(1, 200)),
    'dilated kernels of up to 32': shaped(
        (1, 512, 512, 64), (3, 3, 64, 64), stride=(2, 2), dilation=(1, 99)
    ),
    'shared memory': shaped((1, 1, 9000, 64), (1, 8000, 1, 64), groups=64),
}  # fmt: skip


@pytest.mark.parametrize('words', REFUSED)
def test_refuses_what_it_lacks_by_name(words: str) -> None:
    assert words in gpu.refuses(*REFUSED[words])


def test_refuses_documents_of_dense_sequences() -> None:
    operands, spec = shaped((1, 1, 8, 64), (1, 3, 64, 64))
    operands = operands._replace(segment_ids_BT=jnp.zeros((1, 8), jnp.int32))
    assert 'segment ids' in gpu.refuses(operands, spec)


def test_block_sizes_that_do_not_fit_are_named() -> None:
    operands, spec = shaped((1, 8, 8, 64), (3, 3, 64, 64))
    with pytest.raises(ValueError, match=r'block_sizes.features=96: must be a multiple of 64'):
        jax.eval_shape(lambda o: gpu.forward(o, spec, ConvBlockSizes(features=96)), operands)
    operands, spec = shaped((1, 8, 8, 64), (3, 3, 1, 64), groups=64)
    with pytest.raises(ValueError, match='must have rows and cols that fit'):
        jax.eval_shape(lambda o: gpu.forward(o, spec, ConvBlockSizes(cols=300)), operands)


def on(kind: str, platform: str = 'gpu') -> object:
    device = jax.sharding.AbstractDevice(kind, 132, platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def test_refuses_other_chips() -> None:
    call = shaped((1, 8, 8, 64), (3, 3, 64, 64))
    for kind, platform in (('NVIDIA B200', 'gpu'), ('TPU v6 lite', 'tpu')):
        with on(kind, platform):
            assert kind in gpu.refuses(*call)
    with on('NVIDIA H200'):
        assert gpu.refuses(*call) is None


WORTHWHILE = {
    'depthwise': (True, shaped((8, 56, 56, 256), (3, 3, 1, 256), groups=256)),
    'causal': (True, shaped((8, 1, 4096, 4096), (1, 4, 1, 4096), groups=4096)),
    'few channels': (False, shaped((8, 56, 56, 16), (3, 3, 1, 16), groups=16)),
    'many taps': (False, shaped((8, 1, 4096, 256), (1, 256, 1, 256), groups=256)),
    'dense': (False, shaped((8, 56, 56, 256), (3, 3, 256, 256))),
    'one channel': (False, shaped((8, 56, 56, 1), (3, 3, 1, 64))),
}


@pytest.mark.parametrize('name', WORTHWHILE)
def test_xla_keeps_what_it_does_better(name: str) -> None:
    better, call = WORTHWHILE[name]
    assert gpu.refuses(*call) is None
    assert gpu.worthwhile(*call) == better


CHECKS = [export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]


@pytest.mark.parametrize('name', CASES)
def test_lowers_to_mosaic_gpu_without_a_gpu(name: str) -> None:
    call = CASES[name]

    def step(operands: Operands, du: jax.Array) -> tuple:
        made = gpu.forward(operands, call.spec, call.sizes, keep=True)
        dx = gpu.input_gradient(du, operands, call.spec)
        return made, dx, gpu.weight_gradient(du, operands, call.spec)

    shapes = jax.eval_shape(lambda: drawn(call))
    with on('NVIDIA H100 80GB HBM3'):
        text = export.export(jax.jit(step), platforms=['cuda'], disabled_checks=CHECKS)(*shapes)
    text, phases = text.mlir_module(), 1
    for taps, stride, step in zip(
        call.kernel, call.spec.stride, call.spec.dilation, strict=False
    ):  # of the input's phases, those that some tap reads
        phases *= len({k * step % stride for k in range(taps)})
    assert text.count('custom_call @mosaic_gpu') == 2 + phases
    assert 'triton' not in text


def test_lowers_under_vmap_and_in_shard_map() -> None:
    def loss(x: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        w, v = (jax.lax.pcast(z, 'data', to='varying') for z in (w, v))
        x = conv2d(x, w, activation='silu', impl='gpu')
        x = conv1d(x[:, 0], v, groups=64, padding='CAUSAL', activation='silu', impl='gpu')
        return x.astype(jnp.float32).sum()

    axis = (jax.sharding.AxisType.Auto,)
    device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
    mesh = jax.sharding.AbstractMesh((2,), ('data',), axis_types=axis, abstract_device=device)
    gradient = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)), in_axes=(0, None, None))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((4, 2, 8, 8, 64), (3, 3, 64, 64), (4, 1, 64))
    ]
    data, everywhere = jax.P('data'), jax.P()
    with jax.sharding.use_abstract_mesh(mesh):
        mapped = jax.shard_map(
            gradient, in_specs=(data, everywhere, everywhere), out_specs=(data, data, data)
        )
        exported = export.export(jax.jit(mapped), platforms=['cuda'], disabled_checks=CHECKS)(
            *shapes
        )
    assert [out.shape[1:] for out in exported.out_avals] == [
        (2, 8, 8, 64), (3, 3, 64, 64), (4, 1, 64)
    ]  # fmt: skip
    assert exported.mlir_module().count('custom_call @mosaic_gpu') == 6


@pytest.mark.parametrize(
    'axes', [((0, None), None), ((0, 0), None), ((0, None), 0), ((None, 1), 1)]
)
@pytest.mark.parametrize('summed', [False, True])
def test_mapped_axis_folds_into_the_batch(axes: tuple, summed: bool) -> None:
    def function(along: tuple[jax.Array, jax.Array], w: jax.Array) -> jax.Array:
        found = along[0] * w[None] + along[1]
        return found.sum(0) if summed else found

    # Each of these maps an axis of 3; batches are of 2.
    shapes = [{None: (2, 4), 0: (3, 2, 4), 1: (2, 3, 4)}[axis] for axis in axes[0]]
    x, y = (jnp.arange(np.prod(s), dtype=jnp.float32).reshape(s) for s in shapes)
    w = jnp.arange(12.0).reshape((3, 4) if axes[1] == 0 else (4, 3))
    w = w if axes[1] is not None else w[:, 0]
    found = jax.vmap(folds(function, summed=summed), in_axes=axes)((x, y), w)
    np.testing.assert_array_equal(found, jax.vmap(function, in_axes=axes)((x, y), w))


needs_wheels = pytest.mark.skipif(not ptxas.available(), reason=f'needs {ptxas.WHEELS}')


@needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        '--input=8,4096,1024 --kernel=4,1024 --groups=1024 --segments --activation=silu',
        '--input=8,28,28,384 --kernel=7,7,384 --groups=384 --dtype=float16 --keep',
        '--input=8,56,56,96 --kernel=3,3,96 --groups=96 --stride=2 --residual --scale_shift',
        '--input=8,28,28,256 --kernel=3,3,256 --activation=gelu --residual --scale_shift --keep',
        '--input=8,56,56,64 --kernel=3,3,128 --stride=2',
        '--input=8,4096,128 --kernel=2,256 --dilation=512 --activation=tanh --dtype=float16',
    ],
)
def test_compiles_for_an_h100_and_spills_nothing(options: str) -> None:
    found = ptxas.compile_kernels(options.split())
    assert len(found) >= 3
    assert all(x['spill_bytes'] == 0 and x['registers'] <= 255 for x in found)
