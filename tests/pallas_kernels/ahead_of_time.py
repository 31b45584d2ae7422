"""Runs a script that compiles for TPUs that are not there, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# libtpu reads these once, when it is loaded; with them it looks for no TPU.
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'PYTHONPATH': str(HERE.parents[1]),
}


def printed(script: str, *arguments: str) -> list[Any]:
    """Returns the JSON that each line holds which the script beside this file prints."""
    pytest.importorskip('libtpu', reason='the compiler for TPUs; there is none for this system')
    command = [sys.executable, str(HERE / script), *arguments]
    child = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line[:1] in '{[']
