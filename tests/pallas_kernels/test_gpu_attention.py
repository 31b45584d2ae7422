"""Attention in Mosaic GPU: interpreted beside the specification, lowered, compiled for an H100."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import attention, gpu, reference
from pallas_kernels.attention.arguments import Operands, Spec, check_arguments
from pallas_kernels.attention.gpu import forward_kernel, ptxas, tiles

RACES = plgpu.InterpretGPUParams(detect_races=True)
OUTPUTS = ('o', 'dq', 'dk', 'dv', 'dsinks')


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and features of one call."""

    T: int = 100
    S: int = 200
    H: int = 2
    K: int = 1
    D: int = 64
    V: int = 64
    dtype: jnp.dtype = jnp.bfloat16
    segments: bool = False
    sinks: bool = False
    start: tuple[int, ...] | None = None
    options: tuple[tuple[str, object], ...] = ()


CASES = {
    'causal': Case(options=(('causal', True),)),
    'float16-everything': Case(
        T=200,
        H=1,
        dtype=jnp.float16,
        segments=True,
        sinks=True,
        options=(('causal', True), ('window', (150, 0)), ('softcap', 2.0)),
    ),
    'some-see-nothing': Case(T=120, S=75, D=40, V=24, options=(('causal', True),)),
    'wide-shard': Case(
        T=64, S=72, H=1, D=160, V=128, start=(0, 0, 40, 8), options=(('window', 9),)
    ),
}


def draw(case: Case) -> tuple[Operands, Spec, tuple[jax.Array, jax.Array]]:
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32).astype(case.dtype)

    q, k = normal(1, case.T, case.H, case.D), normal(1, case.S, case.K, case.D)
    v, do = normal(1, case.S, case.K, case.V), normal(1, case.T, case.H, case.V)
    dlse = jax.random.normal(next(keys), (1, case.H, case.T))
    named = dict(case.options)
    if case.segments:  # runs of unequal length, one id twice
        ends = jnp.array([17, 90, 95, 180])
        ids = jnp.array([3, 1, 0, 3, 7])[jnp.searchsorted(ends, jnp.arange(200), side='right')]
        named |= {'segment_ids': ids[None, : case.T], 'kv_segment_ids': ids[None, : case.S]}
    if case.sinks:
        named['sinks'] = jnp.linspace(-1.0, 2.0, case.H)
    operands, spec = check_arguments(q, k, v, **named)
    if case.start is not None:
        operands = operands._replace(start=jnp.array(case.start, jnp.int32))
    return operands, spec, (do, dlse)


def wide(operands: Operands) -> Operands:
    """Returns the same numbers in float32."""
    q, k, v = (x.astype(jnp.float32) for x in operands[:3])
    return operands._replace(q_BTHD=q, k_BSKD=k, v_BSKV=v)


def plain(operands: Operands, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """Attention as one would write it in the operands' own precision."""
    q, k, v = operands[:3]
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum('bthd,bshd->bhts', q, k) * jnp.asarray(spec.scale, q.dtype)
    if spec.softcap:
        s = spec.softcap * jnp.tanh(s / spec.softcap)
    s = jnp.where(reference.visible(operands, spec), s, -jnp.inf).astype(jnp.float32)
    if operands.sinks_H is not None:
        sinks = jnp.broadcast_to(operands.sinks_H[None, :, None, None], (*s.shape[:3], 1))
        s = jnp.concatenate([s, sinks], axis=-1)
    sees = (s > -jnp.inf).any(-1)
    s = jnp.where(sees[..., None], s, 0)
    p = jnp.where(sees[..., None], jax.nn.softmax(s, axis=-1), 0)[..., : k.shape[1]]
    lse = jnp.where(sees, jax.nn.logsumexp(s, axis=-1), -jnp.inf)
    return jnp.einsum('bhts,bshv->bthv', p.astype(q.dtype), v), lse


def gradients(function, operands: Operands, spec: Spec, cotangents: tuple) -> list[jax.Array]:
    """Returns `OUTPUTS` of a function of the operands, in float32."""

    def of(q, k, v, sinks):
        o, lse = function(operands._replace(q_BTHD=q, k_BSKD=k, v_BSKV=v, sinks_H=sinks), spec)
        return o, jnp.where(lse == -jnp.inf, 0, lse)

    o_lse, pull = jax.vjp(of, *operands[:3], operands.sinks_H)
    found = [o_lse[0], *pull((cotangents[0].astype(o_lse[0].dtype), cotangents[1]))]
    return [x.astype(jnp.float32) for x in found if x is not None]


def kernels(operands: Operands, spec: Spec, cotangents: tuple) -> tuple[list[jax.Array], jax.Array]:
    o, lse = gpu.forward(operands, spec, None, interpret=RACES)
    do, dlse = cotangents
    dlse = jnp.where(lse == -jnp.inf, 0, dlse)
    found = gpu.backward(operands, spec, None, o, lse, do, dlse, interpret=RACES)
    return [x.astype(jnp.float32) for x in (o, *found) if x is not None], lse


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_interpreted_as_exact_as_plain_xla_and_without_races(name: str) -> None:
    operands, spec, cotangents = draw(CASES[name])
    found, lse = kernels(operands, spec, cotangents)
    exact = gradients(reference.forward, wide(operands), spec, cotangents)
    usual = gradients(plain, operands, spec, cotangents)
    np.testing.assert_allclose(lse, reference.forward(wide(operands), spec)[1], atol=1e-5)
    for output, x, low, high in zip(OUTPUTS, found, usual, exact, strict=False):
        limit = 2 * jnp.abs(low - high).max() + 1e-3 * jnp.abs(high).max()
        assert jnp.abs(x - high).max() <= limit, output
        assert jnp.abs(high).max() > 0.1, output


def test_interpreted_twice_the_same_bits() -> None:
    operands, spec, _ = draw(Case(H=1, options=(('causal', True),)))
    first, second = (gpu.forward(operands, spec) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_copy_that_does_not_wait_is_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = forward_kernel.copy_keys

    def hasty(refs: dict, where: dict, names: tuple[str, str]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plgpu, 'barrier_wait', lambda _: None)
            copy(refs, where, names)

    monkeypatch.setattr(forward_kernel, 'copy_keys', hasty)
    operands, spec, _ = draw(Case(S=520, H=1))
    try:
        with pytest.raises(jax.errors.JaxRuntimeError, match='RACE DETECTED'):
            jax.block_until_ready(gpu.forward(operands, spec, None, interpret=RACES))
    finally:
        reset_gpu_interpret_mode_state()


reach = st.none() | st.integers(0, 9)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    sizes=st.sampled_from([(40, 33), (7, 40)]),  # few shapes: each is compiled
    tile=st.sampled_from([(8, 5), (4, 16)]),
    limits=st.tuples(st.integers(-9, 9), reach, reach),
    segments=st.none() | st.integers(0, 2**32 - 1),
)
def test_table_visits_all_that_is_seen_and_masks_all_that_is_not(
    sizes: tuple, tile: tuple, limits: tuple, segments: int | None
) -> None:
    (rows, columns), (offset, left, right) = sizes, limits
    i, j = np.arange(rows)[:, None] + offset, np.arange(columns)[None]
    seen = np.ones((rows, columns), bool)
    seen &= True if left is None else j >= i - left
    seen &= True if right is None else j <= i + right
    ids = None, None
    if segments is not None:
        generator = np.random.default_rng(segments)
        ids = tuple(np.sort(generator.integers(0, 4, (1, size)), axis=1) for size in sizes)
        seen &= ids[0][0][:, None] == ids[1][0][None]
        ids = tuple(jnp.asarray(x, jnp.int32) for x in ids)
    band = tiles.Band(offset, left, right, rows, columns)
    for n, line in enumerate(np.asarray(tiles.table(band, *tile, *ids))[0]):
        first, full_first, full_end, end, _ = line
        mine = seen[n * tile[0] : (n + 1) * tile[0]]
        assert not mine[:, : first * tile[1]].any()
        assert not mine[:, end * tile[1] :].any()
        assert first <= end
        # A tile that is not masked is whole.
        assert full_first >= full_end or full_end * tile[1] <= columns
        assert mine[:, max(first, full_first) * tile[1] : min(end, full_end) * tile[1]].all()


def test_table_skips_documents_of_others() -> None:
    ids = jnp.repeat(jnp.arange(8, dtype=jnp.int32), 16)[None]
    band = tiles.Band(0, None, None, 128, 128)
    table = np.asarray(tiles.table(band, 16, 16, ids, ids))[0]
    np.testing.assert_array_equal(table[:, 0], np.arange(8))
    np.testing.assert_array_equal(table[:, 3] - table[:, 0], 1)


REFUSED = {
    'mask': {'mask': jnp.ones((1, 1, 8, 8), bool)},
    'bias': {'bias': jnp.zeros((1, 1, 8, 8))},
    'dropout': {'dropout_rate': 0.1, 'dropout_seed': 0},
    'scale': {'scale': -1.0},
}


@pytest.mark.parametrize('feature', REFUSED)
def test_refuses_what_it_lacks_by_name(feature: str) -> None:
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    assert feature in gpu.refuses(*check_arguments(x, x, x, **REFUSED[feature]))
    assert gpu.refuses(*check_arguments(x, x, x)) is None


@pytest.mark.parametrize(
    ('shape', 'dtype', 'word'), [(64, 'float32', 'float32'), (264, 'bfloat16', '264')]
)
def test_refuses_types_and_head_sizes(shape: int, dtype: str, word: str) -> None:
    x = jnp.zeros((1, 8, 1, shape), dtype)
    assert word in gpu.refuses(*check_arguments(x, x, x))


def on(kind: str, platform: str = 'gpu') -> object:
    device = jax.sharding.AbstractDevice(kind, 132, platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize('kind', ['NVIDIA B200', 'NVIDIA A100-SXM4-80GB', 'TPU v6 lite'])
def test_refuses_other_chips(kind: str) -> None:
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with on(kind, 'tpu' if 'TPU' in kind else 'gpu'):
        assert kind in gpu.refuses(*check_arguments(x, x, x))
    with on('NVIDIA H200'):
        assert gpu.refuses(*check_arguments(x, x, x)) is None


def step(case: Case):
    """Returns a function of shapes and the shapes: forward and backward of a case."""
    operands, spec, (do, dlse) = draw(case)

    def both(operands: Operands, do: jax.Array, dlse: jax.Array) -> tuple:
        o, lse = gpu.forward(operands, spec)
        return o, lse, gpu.backward(operands, spec, None, o, lse, do, dlse)

    return both, jax.eval_shape(lambda *x: x, operands, do, dlse)


@pytest.mark.parametrize('name', CASES)
def test_lowers_to_mosaic_gpu_without_a_gpu(name: str) -> None:
    both, shapes = step(CASES[name])
    checks = [export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
    with on('NVIDIA H100 80GB HBM3'):
        text = export.export(jax.jit(both), platforms=['cuda'], disabled_checks=checks)(*shapes)
    text = text.mlir_module()
    split = CASES[name].D + CASES[name].V > 256
    assert text.count('custom_call @mosaic_gpu') == (4 if split else 3)
    assert 'triton' not in text


@pytest.mark.parametrize('check_vma', [True, False])
def test_lowers_under_vmap_and_in_shard_map(check_vma: bool) -> None:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, causal=True, impl='gpu').astype(jnp.float32).sum()

    checks = [export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]
    axis = (jax.sharding.AxisType.Auto,)
    device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', 132, 'gpu')
    mesh = jax.sharding.AbstractMesh((2,), ('data',), axis_types=axis, abstract_device=device)
    gradient = jax.vmap(jax.grad(loss, argnums=(0, 1, 2)))
    spec = jax.P('data')
    x = jax.ShapeDtypeStruct((2, 1, 128, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh):
        mapped = jax.shard_map(gradient, in_specs=spec, out_specs=spec, check_vma=check_vma)
        exported = export.export(jax.jit(mapped), platforms=['cuda'], disabled_checks=checks)(
            x, x, x
        )
    assert [out.shape for out in exported.out_avals] == [x.shape] * 3
    assert exported.mlir_module().count('custom_call @mosaic_gpu') == 3


needs_wheels = pytest.mark.skipif(not ptxas.available(), reason=f'needs {ptxas.WHEELS}')


@needs_wheels
@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        '--head_dim=64 --causal --dtype=float16',
        '--head_dim=128',
        '--head_dim=128 --causal --window=512 --softcap=30 --segments --sinks',
        '--head_dim=192 --value_dim=128 --causal',
        '--head_dim=256 --causal',
    ],
)
def test_compiles_for_an_h100_and_spills_nothing_forward(options: str) -> None:
    found = {x['kernel']: x for x in ptxas.compile_kernels(options.split())}
    assert len(found) >= 3
    assert found['attention_forward']['spill_bytes'] == 0
    assert all(x['registers'] <= 255 for x in found.values())
