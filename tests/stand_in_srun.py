"""Stands in for Slurm's srun: starts its tasks on this machine, with the variables it sets."""

import os
import subprocess
import sys
import time


def main() -> int:
    """Runs the command after srun's own options and returns the worst exit status."""
    command = sys.argv[1:]
    while command[0].startswith('-'):
        command.pop(0)
    count = int(os.environ['SLURM_NTASKS'])
    step = {
        'SLURM_STEP_NODELIST': 'localhost',
        'SLURM_STEP_NUM_NODES': '1',
        'SLURM_STEP_NUM_TASKS': str(count),
    }
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **step, 'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)},
        )
        for i in range(count)
    ]
    while None in [task.poll() for task in tasks]:
        if '--kill-on-bad-exit=1' in sys.argv and any(task.poll() for task in tasks):
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    return max(task.wait() for task in tasks)


if __name__ == '__main__':
    sys.exit(main())
