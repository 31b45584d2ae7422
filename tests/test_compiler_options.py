"""Options of XLA: for the devices that know them."""

import jax
import pytest

from bigjax.compiler_options import compiler_options
from bigjax.mesh import make_mesh
from bigjax.plan.program.compile import devices
from bigjax.plan.topology import parse

LIMIT = 'xla_tpu_scheduler_percent_shared_memory_limit'


def test_cpus_are_told_nothing():
    assert compiler_options(make_mesh('data=-1', devices=jax.devices('cpu'))) == {}


def test_a_tpus_scheduler_may_use_the_whole_hbm():
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    mesh = make_mesh('fsdp=4', devices=devices(parse('v5e:2x2')))
    assert compiler_options(mesh)[LIMIT] == '100'
