"""Identity: name and knobs of a run, and the workdir that is held by them."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigjax.experiment import UsageError, knobs


@dataclasses.dataclass(frozen=True)
class Identity:
    """Name and knobs of a run: what its workdir is called and what may not change in it.

    Attributes:
      experiment: name of the experiment.
      knobs: every knob's value.
      changed: names of the knobs that are not at their default.
      free: names of the knobs that a resumed run may change.
    """

    experiment: str
    knobs: dict[str, Any]
    changed: tuple[str, ...]
    free: tuple[str, ...]

    def folder(self) -> str:
        """Returns a folder name that tells runs with different knobs apart.

        Free knobs are left out: other samples or evaluations are no other run. The number of steps
        stays, or a short trial would be gone on with.
        """
        named = (k for k in self.changed if k == 'steps' or k not in self.free)
        full = '-'.join((self.experiment, *(f'{k}={self.knobs[k]}' for k in named)))
        name = re.sub(r'[^\w.=,+-]+', '_', full, flags=re.ASCII)[:100]
        if name != full:
            # Cut (file systems end names at 255 bytes) or replaced: the digest keeps them apart.
            name += '-' + hashlib.sha256(full.encode()).hexdigest()[:8]
        return name

    def claim(self, workdir: Path) -> None:
        """Writes `run.json` into a new workdir, or checks the one that is there.

        Raises:
          UsageError: the workdir cannot be written, or holds a run with another name or knobs.
        """
        file = workdir / 'run.json'
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                # All processes of a run come here at once, on one file system.
                part = workdir / f'run.json.{os.urandom(4).hex()}'
                part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + '\n', 'utf-8')
                part.rename(file)
            held = json.loads(file.read_text('utf-8'))
        except OSError as error:
            raise UsageError(
                f'--workdir={workdir}: cannot be written ({error.strerror}); '
                f'try a folder of your own, such as --workdir=/tmp/{self.experiment}'
            ) from error
        except ValueError as error:
            raise UsageError(
                f'--workdir={workdir}: its run.json is damaged ({error}); name another folder'
            ) from error
        if held['experiment'] != self.experiment:
            raise UsageError(
                f'--workdir={workdir}: holds a run of {held["experiment"]}, not of '
                f'{self.experiment}; name another folder or leave --workdir out'
            )
        differ = [
            f'--{k}={self.knobs.get(k)} (there: {held["knobs"].get(k)})'
            for k in sorted(held['knobs'].keys() | self.knobs.keys())
            if k not in self.free and held['knobs'].get(k) != self.knobs.get(k)
            # A knob that is younger than the run was, in effect, at its default.
            if k in held['knobs'] or k in self.changed
        ]
        if differ:
            raise UsageError(
                f'--workdir={workdir}: holds a run with other knobs: {", ".join(differ)}; name '
                f'another folder, or change only {", ".join(self.free)}'
            )


def identity(name: str, function: Callable[..., Any], values: Mapping[str, Any]) -> Identity:
    """Returns the identity of a run of experiment `name` with some knobs set."""
    all_knobs = knobs(function)
    changed = tuple(
        k for k, knob in all_knobs.items() if values.get(k, knob.default) != knob.default
    )
    settled = {k: values.get(k, knob.default) for k, knob in all_knobs.items()}
    return Identity(name, settled, changed, tuple(k for k, knob in all_knobs.items() if knob.free))
