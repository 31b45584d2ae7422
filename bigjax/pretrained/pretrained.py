"""Pretrained weights of an experiment: where they are read from, and how its model is written."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from bigjax.pretrained.files import open_weights
from bigjax.pretrained.layout import Layout
from bigjax.pretrained.load import load
from bigjax.pretrained.match import Match, match
from bigjax.pretrained.save import save
from bigjax.sharding import path_string


def flat(tree: Any) -> dict[str, Any]:
    """Returns {path: leaf}."""
    return {path_string(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model's names in other libraries, and the weights it starts from, if any.

    Attributes:
      layouts: how its family is kept elsewhere; the first is the one that is written.
      path: folder or file that a new run starts from; empty for a random start.
    """

    layouts: tuple[Layout, ...]
    path: str = ''

    def match(self, abstract: Any) -> Match:
        """Returns which tensors of the file fill which variables; reads none of them.

        Args:
          abstract: `{'params': …, **extra}` of shapes and dtypes.

        Raises:
          UsageError: the file does not fit.
        """
        shapes = {path: leaf.shape for path, leaf in flat(abstract).items()}
        return match(open_weights(self.path), self.layouts, shapes)

    def load(self, abstract: Any, shardings: Any) -> dict[str, jax.Array]:
        """Returns `{path: array}` of the variables that the file fills, where they will live.

        Says on stderr what is left out or starts at random.

        Args:
          abstract: `{'params': …, **extra}` of shapes and dtypes.
          shardings: the same tree of shardings.

        Raises:
          UsageError: the file does not fit; raised before anything of it is read.
        """
        found = self.match(abstract)
        loaded = load(open_weights(self.path), found, flat(abstract), flat(shardings))
        if jax.process_index() == 0:
            count = sum(x.size for path, x in loaded.items() if path.startswith('params/'))
            lines = (f'{count:,} parameters from {self.path}', *found.notes)
            print('\n  '.join(lines), file=sys.stderr, flush=True)
        return loaded

    def save(self, folder: Path, variables: Any, max_bytes: int) -> tuple[int, int]:
        """Writes `{'params': …, **extra}` into a folder; see `bigjax.pretrained.save.save`."""
        return save(folder, self.layouts[0], flat(variables), max_bytes)
