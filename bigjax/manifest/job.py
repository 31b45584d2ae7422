"""What a manifest starts, whoever starts it: a name, a command line, and the machine for it."""

import dataclasses
import re
from pathlib import Path, PurePosixPath

from bigjax.identity import Identity
from bigjax.plan.topology import Topology

# Seconds between being asked to stop and being killed: a checkpoint is written meanwhile.
GRACE = 300


@dataclasses.dataclass(frozen=True)
class Job:
    """A run somewhere else.

    Attributes:
      identity: the experiment and its knobs.
      topology: its chips.
      name: what the cluster calls it.
      folder: name of its workdir there.
      restarts: how often it is started again after a failure.
    """

    identity: Identity
    topology: Topology
    name: str
    folder: str
    restarts: int

    def command(self, python: str, workdir: Path | PurePosixPath) -> list[str]:
        """Returns the words of the command line, run in the folder of the code."""
        knobs, changed = self.identity.knobs, self.identity.changed
        flags = [f'--{name}={knobs[name]}' for name in changed]
        experiment = f'--experiment={self.identity.experiment}'
        return [python, 'launch.py', experiment, *flags, f'--workdir={workdir}']

    @property
    def title(self) -> str:
        """A line that says what it is."""
        return (
            f'{self.identity.experiment} on {self.topology.name}: {self.topology.chips} chips, '
            f'{self.topology.hosts} hosts; written by --action=manifest.'
        )


def short(name: str) -> str:
    """Returns a name as clusters want it: small letters, digits and -."""
    return re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')[:40].rstrip('-')
