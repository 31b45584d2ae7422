"""Options of XLA: for the devices that know them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bigjax import train
from bigjax.compiler_options import compiler_options, has_scatter
from bigjax.mesh import make_mesh
from bigjax.nn.linear import Dense
from bigjax.plan.program.compile import devices
from bigjax.plan.program.compiled import without_data
from bigjax.plan.topology import parse
from bigjax.state import setup

LIMIT = 'xla_tpu_scheduler_percent_shared_memory_limit'
RINGS = 'xla_tpu_enable_windowed_einsum_for_'
IN_THEIR_LAYER = 'xla_tpu_explicit_control_dcn_collective_pipelining'
LARGE, MUCH = 8 * 10**9, 10**18  # parameters, and FLOPs of a gradient


def test_cpus_are_told_nothing():
    assert compiler_options(make_mesh('data=-1', devices=jax.devices('cpu')), LARGE, MUCH) == {}


def test_a_tpus_scheduler_may_use_the_whole_hbm():
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    mesh = make_mesh('fsdp=4', devices=devices(parse('v5e:2x2')))
    assert compiler_options(mesh, LARGE, MUCH)[LIMIT] == '100'


@pytest.mark.parametrize(
    ('topology', 'mesh', 'scattered_in_rings'),
    [
        ('v5e:2x2', 'fsdp=4', False),
        ('v5e:4x4', 'fsdp=4,tensor=4', False),
        ('v5e:4x4', 'data=2,fsdp=8', False),
        ('v5e:4x8', 'fsdp=32', False),
        ('v5e:4x4', 'fsdp=16', True),  # all of a square: else each would sum the whole
        ('v5p:2x2x2', 'fsdp=8', True),
        ('2*v5e:4x4', 'data=2,fsdp=16', False),  # where each does so in any case
    ],
)
def test_products_are_cut_into_rings_only_where_there_is_no_other_scatter(
    topology, mesh, scattered_in_rings
):
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    dcn = 'data=2' if topology.startswith('2*') else ''
    options = compiler_options(make_mesh(mesh, dcn, devices=devices(parse(topology))), LARGE, MUCH)
    assert options[RINGS + 'all_gather'] == 'false'
    assert options.get(RINGS + 'reduce_scatter') == (None if scattered_in_rings else 'false')


@pytest.mark.parametrize(
    ('topology', 'mesh', 'dcn', 'parameters', 'tokens', 'in_their_layer'),
    [
        ('2*v5e:2x2', 'data=2,fsdp=4', 'data=2', LARGE, 2.1e6, True),
        ('2*v5e:2x2', 'data=2,fsdp=4', 'data=2', LARGE, 1.9e6, False),  # too long to hide
        ('4*v5e:2x2', 'data=8,fsdp=2', 'data=4', LARGE, 6.1e6, True),
        ('4*v5e:2x2', 'data=8,fsdp=2', 'data=4', LARGE, 5.9e6, False),
        ('2*v5e:2x2', 'stage=2,data=2,fsdp=2', 'data=2', LARGE, 2.1e6, True),
        ('2*v5e:2x2', 'data=2,fsdp=4', 'data=2', 3 * 10**9, 2.1e6, False),  # narrow layers
        ('2*v5e:2x2', 'fsdp=8', 'fsdp=2', LARGE, 1e9, False),  # parameters are gathered, too
        ('4*v5e:2x2', 'data=2,fsdp=8', 'data=2,fsdp=2', LARGE, 1e9, False),
        ('v5e:2x4', 'data=2,fsdp=4', '', LARGE, 1e9, False),
    ],
)
def test_short_sums_between_slices_are_waited_for_in_their_layer(
    topology, mesh, dcn, parameters, tokens, in_their_layer
):
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    mesh = make_mesh(mesh, dcn, devices=devices(parse(topology)))
    options = compiler_options(mesh, parameters, 6 * parameters * tokens)
    assert options.get(IN_THEIR_LAYER) == ('true' if in_their_layer else None)


def compiled(function, shapes, split, options):
    """Returns the program for arrays of bfloat16 that are split as what it returns."""
    jitted = jax.jit(function, out_shardings=split, compiler_options=options)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split) for shape in shapes]
    lowered = jitted.trace(*arguments).lower(lowering_platforms=('tpu',))
    return lowered.compile().as_text()


@pytest.mark.parametrize(('topology', 'scatters'), [('v5e:2x4', True), ('v5e:4x4', False)])
def test_which_slices_scatter_is_what_the_compiler_does(topology, scatters):
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    machine = parse(topology)
    assert has_scatter(machine.shape) == scatters
    mesh = make_mesh('fsdp=-1', devices=devices(machine))
    split = NamedSharding(mesh, P('fsdp'))

    def gradient(w_CM, x_BC):
        def loss(w_CM):
            w_CM = jax.lax.with_sharding_constraint(w_CM, NamedSharding(mesh, P()))
            return jnp.sum(jnp.tanh(x_BC @ w_CM).astype(jnp.float32))

        return jax.grad(loss)(w_CM)

    options = compiler_options(mesh, LARGE, MUCH) | {RINGS + 'reduce_scatter': 'false'}
    shapes = [(2048, 4096), (1024 * machine.devices, 2048)]
    assert ('all-reduce-scatter' in compiled(gradient, shapes, split, options)) == scatters


@pytest.mark.parametrize(
    ('width', 'reads', 'scatters'), [(3072, 'mlp', True), (3072, None, False), (4096, None, True)]
)
def test_sums_are_scattered_along_a_width_of_odd_parts_where_dense_writes_it_out(
    width, reads, scatters
):
    """Of eight devices each has 3 times 128 or 4 times 128 of the width."""
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    mesh = make_mesh('fsdp=8', devices=devices(parse('v5e:2x4')))
    dense = Dense(width, use_bias=False, reads=reads)

    def gradient(h_BTM, kernel_MC):
        def loss(kernel_MC):
            y_BTC = dense.apply({'params': {'kernel': kernel_MC}}, h_BTM)
            return jnp.sum(jnp.tanh(y_BTC).astype(jnp.float32))

        dw_MC = jax.grad(loss)(kernel_MC)
        return h_BTM, jax.lax.with_sharding_constraint(dw_MC, NamedSharding(mesh, P(None, 'fsdp')))

    with jax.set_mesh(mesh):
        text = compiled(
            gradient,
            [(64, 1024, 4096), (4096, width)],
            NamedSharding(mesh, P('fsdp')),
            compiler_options(mesh, LARGE, MUCH),
        )
    assert ('all-reduce-scatter' in text) == scatters


def test_no_layer_is_taken_out_of_the_loop_for_short_sums():
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    mesh = make_mesh('data=2,fsdp=4', 'data=2', devices=devices(parse('2*v5e:2x2')))
    split = NamedSharding(mesh, P(('data', 'fsdp')))

    def gradient(w_LMM, x_BM):
        def loss(w_LMM):
            def layer(x_BM, w_MM):
                return jnp.tanh(x_BM @ w_MM), None

            return jnp.sum(jax.lax.scan(layer, x_BM, w_LMM)[0].astype(jnp.float32))

        dw_LMM = jax.grad(loss)(w_LMM)
        return jax.lax.with_sharding_constraint(dw_LMM, NamedSharding(mesh, P(None, 'fsdp')))

    def products(flops):
        shapes = [(8, 1024, 1024), (4096, 1024)]
        options = compiler_options(mesh, LARGE, flops)
        return compiled(gradient, shapes, split, options).count(' convolution(')

    # Of a layer: its product, and the two of its gradients.
    assert products(MUCH) == 3
    assert products(1) > 3


def test_the_train_step_says_how_much_a_gradient_is(monkeypatch):
    told = []
    monkeypatch.setattr(train, 'compiler_options', lambda *values: told.append(values))
    values = {'size': '8B', 'dataset': 'blank', 'seq': 2048, 'batch': 64, 'accumulate': 4}
    experiment = without_data('llama', values)
    plan = setup(experiment)
    train.jit_train_step(experiment, plan)
    ((mesh, parameters, flops),) = told
    assert mesh is plan.mesh
    assert parameters == 8_030_261_248  # as published
    assert flops == experiment.task.flops_per_example * 16
