"""Plans: small decoders compiled for two machines, what does not fit, and what is wrong."""

import json
import math
from pathlib import Path

import pytest

from bigjax.plan import assess as assessing
from bigjax.plan.assess import assess, by_closed_form
from bigjax.plan.options import PlanOptions
from bigjax.plan.plan import plan, run
from bigjax.plan.program import compile as child
from bigjax.plan.program import compiled
from bigjax.plan.records import CATEGORIES
from bigjax.plan.topology import parse
from bigjax.run import UsageError

TINY = {
    'depth': 2, 'width': 64, 'heads': 2, 'kv_heads': 2, 'hidden': 256, 'vocab': 256, 'seq': 128,
    'batch': 16, 'scan': True, 'dtype': 'bfloat16', 'remat': 'full', 'attention': 'xla',
    'steps': 1000, 'warmup': 100,
}  # fmt: skip
MACHINES = {'v5e:2x2': 'fsdp=4', 'v5p:2x2x1': 'fsdp=2,tensor=2'}
# Embedding and last norm; of a layer two norms, four matrices of attention, three of the MLP.
PARAMETERS = 256 * 64 + 64 + 2 * (2 * 64 + 4 * 64 * 64 + 3 * 64 * 256)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept from one test to the next."""
    return tmp_path_factory.mktemp('plans')


@pytest.fixture(scope='module', params=MACHINES)
def planned(request, folder):
    """A compiled plan, with its machine."""
    pytest.importorskip('libtpu')
    options = PlanOptions(topology=request.param, price=2.0, tokens=1e9)
    values = {**TINY, 'mesh': MACHINES[request.param]}
    return plan('llama', values, options, folder / 'plan'), parse(request.param)


@pytest.mark.slow
def test_categories_sum_up_to_the_compilers_memory(planned):
    found, topology = planned
    memory = found['compiler']['memory']
    held = memory['argument_size'] + memory['output_size'] - memory['alias_size']
    peak = min(memory['peak_memory'], held + memory['temp_size'])
    assert found['fits'] is True
    assert list(found['memory_bytes']) == list(CATEGORIES)
    assert sum(found['memory_bytes'].values()) == found['peak_bytes']
    assert found['peak_bytes'] == peak + memory['generated_code_size']
    assert found['memory_bytes']['program'] == memory['generated_code_size']
    assert min(found['memory_bytes'].values()) >= 0
    assert found['memory_bytes']['parameters'] == pytest.approx(4 * PARAMETERS / 4, rel=0.01)
    assert found['memory_bytes']['optimizer'] == pytest.approx(8 * PARAMETERS / 4, rel=0.01)
    assert memory['peak_memory'] < found['hbm_bytes'] == topology.hardware.hbm_bytes


@pytest.mark.slow
def test_operations_and_times_belong_together(planned):
    found, topology = planned
    flops, step = found['flops_per_step'], found['predicted_step_seconds']
    assert flops['executed_per_device'] == pytest.approx(flops['closed_form_per_device'], rel=0.01)
    assert flops['executed'] == flops['executed_per_device'] * topology.devices
    assert 0 < found['roofline_seconds'] < step['low'] <= step['middle'] <= step['high']
    assert step['middle'] == pytest.approx(math.sqrt(step['low'] * step['high']))
    assert found['tokens_per_second'] == pytest.approx(16 * 128 / step['middle'])
    peak = topology.devices * topology.hardware.peak_flops
    assert found['mfu']['middle'] == pytest.approx(flops['model'] / peak / step['middle'])
    assert found['mfu']['causal_middle'] < found['mfu']['middle']
    training = found['training']
    assert training['steps'] == math.ceil(1e9 / (16 * 128))
    assert training['seconds'] == [training['steps'] * step[end] for end in ('low', 'high')]
    hours = training['seconds'][0] / 3600 * topology.chips
    assert training['price'][0] == pytest.approx(2.0 * hours)
    assert '--' in found['bottleneck']


@pytest.mark.slow
def test_gathers_along_fsdp_are_those_of_the_parameters(planned):
    found, _ = planned
    parts = found['mesh']['fsdp']
    kinds = [c for c in found['collectives'] if c['kind'] == 'all-gather']
    rows = [c for c in kinds if c['axes'] == ('fsdp',)]
    # Every matrix twice in bfloat16 for its layer, once for the output: (n - 1) / n of it, and of
    # that what the tensor axis leaves.
    matrices = 2 * (4 * 64 * 64 + 3 * 64 * 256) * 2 + 256 * 64
    sent = 2 * matrices * (parts - 1) / parts / found['mesh']['tensor']
    # Norms and a look-up of the embedding are gathered, too.
    assert sent < sum(c['bytes'] for c in rows) < 1.15 * sent
    assert all(c['network'] == 'ici' for c in found['collectives'])


@pytest.mark.slow
def test_nothing_is_compiled_twice(planned, folder, monkeypatch, capsys):
    found, topology = planned
    monkeypatch.setattr(compiled, '_compile', lambda *_: pytest.fail('compiled again'))
    options = PlanOptions(topology=topology.name, price=2.0, tokens=1e9, json=True)
    values = {**TINY, 'mesh': MACHINES[topology.name]}
    assert run('llama', values, options, folder) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / 'plan' / 'plan.json').read_text())
    assert printed['predicted_step_seconds'] == found['predicted_step_seconds']
    assert '<html' in (folder / 'plan' / 'plan.html').read_text()


def test_no_text_is_read_and_no_tokenizer_trained(tmp_path):
    values = {'size': '405B', 'data_dir': str(tmp_path / 'data'), 'dataset': 'tfds:none'}
    experiment = compiled.without_data('llama', values)
    assert experiment.task.units_per_example == 4096
    assert not (tmp_path / 'data').exists()
    assert compiled.without_data('cnn', {}).data.card.name != 'blank'


def test_fast_needs_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, '_compile', lambda *_: pytest.fail('compiled'))
    found = plan('llama', TINY, PlanOptions(topology='v5p-8', fast=True), tmp_path)
    assert found['method'] == 'closed form'
    assert found['compiler'] is None
    assert sum(found['memory_bytes'].values()) == found['peak_bytes']
    step = found['predicted_step_seconds']
    assert found['roofline_seconds'] <= step['low'] <= step['middle'] <= step['high']
    assert 'closed form, by --fast' in found['notes'][0]
    assert found['training']['steps'] == 1000
    assert 'price' not in found['training']
    json.dumps(found)


def test_without_libtpu_arithmetic_speaks_and_says_what_to_install(tmp_path, monkeypatch):
    def version(name: str) -> str:
        if name == 'libtpu':
            raise compiled.metadata.PackageNotFoundError(name)
        return '0.12.0.1'

    monkeypatch.setattr(compiled.metadata, 'version', version)
    found = assess('llama', TINY, parse('v5p-8'), PlanOptions(topology='v5p-8'), tmp_path)
    assert found.compiled is None
    assert found.notes[0] == (
        'libtpu is not installed, so nothing was compiled and this is the closed form; for the '
        'compiled plan: pip install "jax[tpu]==0.12.0.1"'
    )


def test_gpus_are_planned_by_arithmetic(tmp_path):
    found = plan('llama', {**TINY, 'mesh': 'fsdp=16'}, PlanOptions(topology='h100:16'), tmp_path)
    assert found['method'] == 'closed form'
    assert found['topology'] == {
        'name': 'h100:16', 'chip': 'h100', 'chips': 16, 'devices': 16, 'slices': 2, 'hosts': 2,
    }  # fmt: skip
    assert 'h100: the compiler for GPUs' in found['notes'][0]


def test_a_model_that_fits_nowhere_on_its_machine(tmp_path):
    values = {'size': '70B', 'batch': 64, 'scan': True, 'dtype': 'bfloat16', 'mesh': 'fsdp=16'}
    found = plan('llama', values, PlanOptions(topology='v5e:4x4', fast=True), tmp_path)
    assert found['fits'] is False
    assert found['predicted_step_seconds'] is None
    assert found['ways_out'] == []
    assert found['notes'][0] == (
        'no mesh, remat policy or batch that was tried fits v5e:4x4; by the closed form, the '
        'smallest v5e that holds it: --topology=v5e:16x16 --mesh=fsdp=256 --batch=256 --remat=full'
    )


def test_ways_out_change_little_and_fit(tmp_path):
    values = {**TINY, 'width': 4096, 'hidden': 16384, 'heads': 32, 'kv_heads': 32, 'depth': 16,
              'seq': 2048, 'batch': 64, 'mesh': 'data=16', 'remat': 'none'}  # fmt: skip
    found = plan('llama', values, PlanOptions(topology='v5e:4x4', fast=True), tmp_path)
    assert found['fits'] is False
    assert found['ways_out']
    assert all(way['fits'] for way in found['ways_out'])
    assert all(way['peak_bytes'] <= found['hbm_bytes'] for way in found['ways_out'])
    assert 'fsdp' in found['ways_out'][0]['flags']


def test_a_program_that_the_compiler_has_no_room_for(tmp_path, monkeypatch):
    message = 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.'
    state = {'parameters': 2**30, 'optimizer': 2**31, 'other': 0}
    said = {'needed_bytes': 20 * 2**30, 'hbm_bytes': 15 * 2**30, 'state': state}
    short = compiled.Compiled(False, {'message': message}, said, '')
    monkeypatch.setattr(assessing, 'compile_step', lambda *_: short)
    monkeypatch.setattr(assessing, 'libtpu_missing', lambda: '')
    found = assess('llama', TINY, parse('v5e:2x2'), PlanOptions(topology='v5e:2x2'), tmp_path)
    assert not found.fits
    assert found.memory.total == sum(found.memory.bytes.values()) == 20 * 2**30
    assert found.memory.bytes['optimizer'] == 2**31
    assert found.step_seconds is None
    assert found.notes[0] == f'the compiler: {message}'


@pytest.mark.parametrize(
    ('message', 'needed', 'room'),
    [
        (
            'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total '
            'memory required for HLO temporaries (80.00G) exceeds available HBM (15.75G).',
            80 * 2**30, int(15.75 * 2**30),
        ),
        (
            'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.',
            int(20.5 * 2**30), int(15.75 * 2**30),
        ),
    ],
)  # fmt: skip
def test_the_compilers_number_is_read(message, needed, room):
    assert child.out_of_memory(message) == {'needed_bytes': needed, 'hbm_bytes': room}


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    vmem = 'RESOURCE_EXHAUSTED: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem.'
    assert child.out_of_memory(vmem) is None
    assert child.out_of_memory('INVALID_ARGUMENT: no such topology') is None


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (
            {'mesh': 'fsdp=3'},
            '--mesh=fsdp=3: the sizes multiply to 3, which is not the number of devices, 4; '
            'try --mesh=fsdp=2,data=-1',
        ),
        ({'heads': 3}, '--heads=3: width 64 must be an even multiple of heads; try --heads=2'),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_compiled(values, message, tmp_path):
    with pytest.raises(UsageError) as error:
        plan('llama', {**TINY, **values}, PlanOptions(topology='v5e:2x2'), tmp_path)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'price': -1.0}, '--price=-1.0: must be at least 0 and finite; try --price=4.2'),
        ({'tries': 2}, '--tries=2: must be at least 6, good ones and bad ones; try --tries=8'),
        (
            {'fast': True, 'search': True},
            '--fast=True: compiles nothing, and --search compares what is compiled; '
            'try --fast=False',
        ),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UsageError) as error:
        PlanOptions(**options)
    assert str(error.value) == message


def test_tokens_are_steps_times_batch_where_no_budget_is_given():
    found = by_closed_form('llama', TINY, parse('v5e:2x2'))
    assert found.tokens_per_step == 16 * 128
