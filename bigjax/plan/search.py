"""Tries meshes, remat policies and batches by compiling them, and ranks them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bigjax.plan.assess import Assessment, assess
from bigjax.plan.candidates import Change, closed, every
from bigjax.plan.options import PlanOptions
from bigjax.plan.summary import candidate
from bigjax.run import UsageError

LIMIT = 1.1  # The closed form's memory may be that much too large.

Guess = tuple[Change, Assessment]


def search(
    name: str,
    values: Mapping[str, Any],
    found: Assessment,
    options: PlanOptions,
    kept: Path,
) -> list[dict[str, Any]]:
    """Returns what was tried, the most tokens per second first, what does not fit last.

    Arithmetic looks at every combination; the compiler at the most promising, at the one asked for,
    and at some that should be bad, so that the order can be seen to mean something. Where one that
    should fit does not, which the compiler says soon, its mesh is tried with less memory. What was
    compiled before is not compiled again: an interrupted search goes on.

    Args:
      name: of the experiment.
      values: its knobs.
      found: what is known of the configuration that was asked for.
      options: how many tries, and with which flags.
      kept: folder of what was compiled before.
    """
    guessed: list[Guess] = []
    changes = list(every(name, found))
    for change in tqdm(changes, desc='arithmetic', unit='way', leave=False):
        if guess := closed(name, found, change):
            guessed.append((change, guess))
    rows, asked = [], _asked(changes, found)
    picked = chosen(guessed, options.tries)
    tried = [*picked, *(change for change in asked if change not in picked)]
    for change in (bar := tqdm(tried, desc='compiling', unit='way')):
        try:
            way = assess(name, {**values, **change}, found.topology, options, kept)
        except UsageError:
            continue
        rows.append({**candidate(way, change), 'asked': change in asked})
        smaller = [] if way.fits else instead(change, guessed, tried)
        tried += smaller  # The loop goes on with it.
        bar.total += len(smaller)
    rows.sort(key=lambda row: (not row['fits'], -(row['tokens_per_second'] or 0.0)))
    return rows


def _asked(changes: list[Change], found: Assessment) -> list[Change]:
    """The change that changes nothing, which is compiled already; none where it is no candidate."""
    run = found.experiment.run
    same = [c for c in changes if (c['mesh'], c['batch']) == (run.mesh, run.batch)]
    return [c for c in same if c.get('remat') in (found.values.get('remat', 'none'), None)][:1]


def instead(missed: Change, guessed: list[Guess], tried: list[Change]) -> list[Change]:
    """Returns what to try for one that does not fit: its mesh's fastest way with less memory.

    Args:
      missed: what did not fit. If it was never thought to, nothing is tried for it.
      guessed: changes and what arithmetic says of them.
      tried: what is tried already.
    """
    thought = next((guess for guess in guessed if guess[0] == missed), None)
    if thought is None or not _likely(thought):
        return []
    less = [
        (change, way)
        for change, way in guessed
        if way.memory.total < thought[1].memory.total
        and change['mesh'] == missed['mesh']
        and change not in tried
    ]
    return [change for change, _ in sorted(less, key=_speed)[:1]]


def _speed(guess: Guess) -> float:
    """Seconds of one token by arithmetic."""
    way = guess[1]
    return way.closed.predicted_seconds / way.tokens_per_step


def _likely(guess: Guess) -> bool:
    way = guess[1]
    return way.memory.total <= LIMIT * way.topology.hardware.hbm_bytes


def chosen(guessed: list[Guess], tries: int) -> list[Change]:
    """Returns the most promising by arithmetic, one of each mesh first, and the worst of the rest.

    Args:
      guessed: changes and what arithmetic says of them.
      tries: how many to return at most.
    """
    ranked = sorted(filter(_likely, guessed), key=_speed)
    rest = sorted((g for g in guessed if not _likely(g)), key=lambda g: g[1].memory.total)
    bad = max(2, tries // 4)
    picked: list[Change] = []

    def pick(pairs: list[Guess], most: int, seen: set[Any] | None = None) -> None:
        """Takes from the front until there are so many, of meshes that are not in `seen`."""
        for change, _ in pairs:
            if len(picked) >= most:
                return
            if change not in picked and (seen is None or change['mesh'] not in seen):
                picked.append(change)
                if seen is not None:
                    seen.add(change['mesh'])

    worst = ranked[::-1]
    pick(ranked, (tries - bad) // 2)
    pick(ranked, tries - bad, {change['mesh'] for change in picked})
    slow = set[Any]()
    pick(worst, tries - bad // 2, slow)
    pick(rest, tries)
    pick(worst, tries, slow)  # where all fit
    pick(ranked, tries)
    return picked
