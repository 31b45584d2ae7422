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
# Compiling is most of what the tests do. What launch.py runs is optimised as a user's run is; XLA's
# forms of the kernels are, too (pallas_kernels/compiling.py).
jax.config.update('jax_disable_most_optimizations', True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--parity', help='folder written by tests/pretrained/generate_parity.py, with PyTorch'
    )


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Path:
    """The folder of --parity; without it, the test is skipped."""
    folder = request.config.getoption('--parity')
    if not folder:
        pytest.skip('needs --parity=FOLDER, written by generate_parity.py where PyTorch is')
    return Path(folder)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)
