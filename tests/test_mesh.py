"""The mesh: sizes, slices, rows that a process reads, and what is refused."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from bigjax import mesh, sharding
from bigjax.run import UsageError

SIX = 'stage, data, fsdp, context, expert, tensor'


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of some process and slice, which computes nothing."""

    id: int
    process_index: int
    slice_index: int
    platform: str = 'cpu'
    device_kind: str = 'cpu'


def devices(processes, each, slices=1):
    """Returns devices of processes, which are dealt out to slices in order."""
    share = processes // slices
    return [Device(i, i // each, i // each // share) for i in range(processes * each)]


def large(sizes):
    return {axis: size for axis, size in sizes.items() if size > 1}


@pytest.mark.parametrize(
    ('text', 'count', 'sizes'),
    [
        ('data=-1', 8, {'data': 8}),
        ('data=2,fsdp=2,tensor=2', 8, {'data': 2, 'fsdp': 2, 'tensor': 2}),
        ('tensor=2,data=4', 8, {'data': 4, 'tensor': 2}),
        ('data=2,fsdp=-1', 8, {'data': 2, 'fsdp': 4}),
        ('data=8,fsdp=-1', 8, {'data': 8}),
        ('fsdp=6', 6, {'fsdp': 6}),
        ('stage=2,context=4,expert=-1', 16, {'stage': 2, 'context': 4, 'expert': 2}),
        ('', 1, {}),
    ],
)
def test_sizes(text, count, sizes):
    parsed = mesh.parse_mesh(text, count)
    assert tuple(parsed) == mesh.AXES
    assert large(parsed) == sizes


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('data', f"'data' is not axis=size with an axis of {SIX} and a positive size or -1"),
        ('model=8', f"'model=8' is not axis=size with an axis of {SIX} and a positive size or -1"),
        ('data=0', f"'data=0' is not axis=size with an axis of {SIX} and a positive size or -1"),
        ('data=-2', f"'data=-2' is not axis=size with an axis of {SIX} and a positive size or -1"),
        ('data=2,data=4', "axis 'data' is given twice"),
        ('data=-1,fsdp=-1', 'only one axis may be -1'),
    ],
)
def test_sizes_that_are_refused(text, message):
    with pytest.raises(UsageError) as error:
        mesh.parse_mesh(text, 8)
    assert str(error.value) == f'--mesh={text}: {message}; try --mesh=data=-1'


@pytest.mark.parametrize(
    ('text', 'product', 'works'),
    [
        ('', 1, 'data=-1'),
        ('data=3', 3, 'data=-1'),
        ('data=16', 16, 'data=-1'),
        ('fsdp=3', 3, 'fsdp=2,data=-1'),
        ('fsdp=2,tensor=5', 10, 'fsdp=2,tensor=4,data=-1'),
        ('data=-1,tensor=3', 3, 'data=-1,tensor=2'),
        ('fsdp=-1,tensor=16', 16, 'fsdp=-1,tensor=8'),
    ],
)
def test_sizes_that_do_not_multiply_to_the_devices_are_refused_with_the_nearest_that_do(
    text, product, works
):
    rule = 'does not divide' if '-1' in text else 'is not'
    with pytest.raises(UsageError) as error:
        mesh.parse_mesh(text, 8)
    assert str(error.value) == (
        f'--mesh={text}: the sizes multiply to {product}, which {rule} the number of devices, 8; '
        f'try --mesh={works}'
    )
    assert math.prod(mesh.parse_mesh(works, 8).values()) == 8


def test_a_mesh_is_over_all_devices_with_auto_axes():
    made = mesh.make_mesh('data=2,tensor=-1')
    assert tuple(made.axis_names) == mesh.AXES
    assert large(made.shape) == {'data': 2, 'tensor': 4}
    assert set(made.devices.flat) == set(jax.devices())
    assert made.axis_types == (AxisType.Auto,) * 6
    assert (
        list(mesh.make_mesh('data=2', devices=jax.devices()[4:6]).devices.flat)
        == (jax.devices()[4:6])
    )


# ---- Slices ----


@pytest.mark.parametrize(
    ('text', 'sizes', 'slices', 'parts'),
    [
        ('', 'data=8', 1, {}),
        ('', 'data=4,fsdp=4', 2, {'data': 2}),
        ('fsdp=2', 'data=4,fsdp=4', 2, {'fsdp': 2}),
        ('stage=2,data=2', 'stage=4,data=4', 4, {'stage': 2, 'data': 2}),
    ],
)
def test_parts_between_slices(text, sizes, slices, parts):
    sizes = mesh.parse_mesh(sizes, 16 if ',' in sizes else 8)
    found = mesh.parse_dcn(text, sizes, slices)
    assert tuple(found) == mesh.AXES
    assert large(found) == parts


@pytest.mark.parametrize(
    ('text', 'sizes', 'message'),
    [
        ('data=3', 'data=4,fsdp=4', '--dcn=data=3: the sizes must multiply to the number of '
                                    'slices, 2; try --dcn=data=2'),
        ('data=-1', 'data=4,fsdp=4', '--dcn=data=-1: the sizes must multiply to the number of '
                                     'slices, 2; try --dcn=data=2'),
        ('data=2', 'fsdp=16', '--dcn=data=2: 2 slices do not divide data=1 of the mesh; '
                              'try --dcn=fsdp=2'),
        ('', 'fsdp=4,tensor=4', '--mesh=fsdp=4,tensor=4: 2 slices do not divide data=1 of the '
                                'mesh; try --dcn=fsdp=2'),
        ('model=2', 'fsdp=16', f"--dcn=model=2: 'model=2' is not axis=size with an axis of {SIX} "
                               'and a positive size or -1; try --dcn=fsdp=2'),
        ('', 'fsdp=16', '--mesh=fsdp=16: 2 slices do not divide data=1 of the mesh; '
                        'try --dcn=fsdp=2'),
    ],
)  # fmt: skip
def test_parts_between_slices_that_are_refused(text, sizes, message):
    with pytest.raises(UsageError) as error:
        mesh.parse_dcn(text, mesh.parse_mesh(sizes, 16), 2)
    assert str(error.value) == message


def test_slices_over_several_axes_are_suggested_where_no_axis_takes_all():
    with pytest.raises(UsageError, match=r'try --dcn=data=2,fsdp=2$'):
        mesh.parse_dcn('', mesh.parse_mesh('data=2,fsdp=2,tensor=3', 12), 4)
    with pytest.raises(UsageError, match=r'try --mesh=data=-1$'):
        mesh.parse_dcn('', mesh.parse_mesh('tensor=15', 15), 2)


@pytest.mark.parametrize(
    ('text', 'dcn', 'slices', 'split'),
    [
        ('data=4,tensor=2', '', 2, 'data'),
        ('data=4,tensor=2', '', 4, 'data'),
        ('fsdp=4,tensor=2', 'fsdp=2', 2, 'fsdp'),
        ('stage=2,fsdp=4', 'stage=2', 2, 'stage'),
        ('data=2,tensor=4', 'tensor=2', 2, 'tensor'),
        ('data=4,tensor=2', 'data=4', 1, 'data'),  # No slices: each process is one.
    ],
)
def test_slices_lie_along_the_axis_asked_for(text, dcn, slices, split):
    made = mesh.make_mesh(text, dcn, devices(4, 2, slices))
    key = 'slice_index' if slices > 1 else 'process_index'
    where = np.vectorize(lambda device: getattr(device, key))(made.devices)
    axis = mesh.AXES.index(split)
    lines = np.moveaxis(where, axis, 0).reshape(where.shape[axis], -1)
    assert (lines == lines[:, :1]).all()  # Along all other axes there is no way to another slice.
    count = slices if slices > 1 else 4
    np.testing.assert_array_equal(lines[:, 0], np.repeat(np.arange(count), len(lines) // count))


def test_processes_of_one_slice_of_tpus_are_no_slices():
    one = [dataclasses.replace(device, platform='tpu') for device in devices(4, 2)]
    with pytest.raises(UsageError) as error:
        mesh.make_mesh('data=4,tensor=2', 'data=4', one)
    assert str(error.value) == (
        '--dcn=data=4: the sizes must multiply to the number of slices, 1; try --dcn='
    )


# ---- Rows that a process reads ----


@pytest.mark.parametrize(
    ('text', 'parts'),
    [
        ('data=8', [0, 1, 2, 3]),
        ('data=4,tensor=2', [0, 1, 2, 3]),
        ('fsdp=2,tensor=4', [0, 0, 1, 1]),
        ('tensor=8', [0, 0, 0, 0]),
        ('stage=2,data=4', [0, 1, 0, 1]),
        ('stage=4,expert=2', [0, 0, 0, 0]),
        ('data=2,context=4', [0, 0, 1, 1]),
    ],
)
def test_processes_with_the_same_rows_read_the_same_part(text, parts):
    made = mesh.make_mesh(text, devices=devices(4, 2))
    found = [sharding.batch_part(made, process) for process in range(4)]
    assert found == [(part, max(parts) + 1) for part in parts]


def test_rows_that_are_shared_in_part_are_refused():
    made = mesh.make_mesh('data=3,tensor=2', devices=devices(3, 2))
    order = np.array([0, 2, 3, 1, 4, 5]).reshape(made.devices.shape)
    twisted = made.devices.ravel()[order]
    with pytest.raises(UsageError, match=r'^--mesh=data=3,tensor=2: the rows of a batch on one'):
        sharding.batch_part(jax.sharding.Mesh(twisted, mesh.AXES), 0)
