"""Step times against PyTorch: the two run by turns in one session, and medians are compared.

    python tests/race --torch=PYTHON [--threads=2] [--rounds=5] [--steps=4] CASE …

PYTHON is the interpreter of an environment of its own with torch, torchvision, timm and
transformers; nothing here depends on them. Without a case, all of `cases.py` are raced.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import CASES

HERE = Path(__file__).parent


class Racer:
    """A process that times steps when asked to."""

    def __init__(self, command: list[str], threads: int) -> None:
        if threads < (os.cpu_count() or 1):
            command = ['taskset', '-c', f'0-{threads - 1}', *command]
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.milliseconds: list[float] = []
        while (line := self._read()) != 'ready':
            print(line, file=sys.stderr)

    def _read(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f'{self.process.args} ended')
        return line.strip()

    def run(self, steps: int) -> None:
        """Times some steps more."""
        assert self.process.stdin
        print(steps, file=self.process.stdin, flush=True)
        self.milliseconds += map(float, self._read().split())


def race(name: str, torch: str, *, threads: int, rounds: int, steps: int) -> None:
    """Prints medians and their ratio (above 1: ours is faster) of one case."""
    with tempfile.TemporaryDirectory() as folder:
        batch = str(Path(folder) / 'batch.npz')
        ours = Racer([sys.executable, str(HERE / 'ours.py'), name, batch], threads)
        theirs = Racer([torch, str(HERE / 'theirs.py'), name, batch], threads)
        for _ in range(rounds):
            ours.run(steps)
            theirs.run(steps)
    a, b = (statistics.median(racer.milliseconds) for racer in (ours, theirs))
    for racer in (ours, theirs):
        racer.process.kill()
    print(f'{name:16} {threads} threads: ours {a:8.1f} ms, PyTorch {b:8.1f} ms, ratio {b / a:.2f}')


def main() -> None:
    """Races what is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--torch', required=True)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--steps', type=int, default=4)
    parser.add_argument('cases', nargs='*')
    given = parser.parse_args()
    for name in given.cases or CASES:
        race(name, given.torch, threads=given.threads, rounds=given.rounds, steps=given.steps)


if __name__ == '__main__':
    main()
