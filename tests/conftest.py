"""Eight fake devices, no implicit rank promotion; warnings are errors by pyproject.toml."""

import os
import sys
from pathlib import Path

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
