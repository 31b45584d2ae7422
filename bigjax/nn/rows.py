"""Leading dimensions of what is computed row by row: merged on one device, and not on a mesh."""

import jax


def rows(lead: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the leading dimensions of an array as a layer takes them, for `reshape`.

    XLA's CPU backend has slow gradients for other than matrices. On a mesh, rows and positions may
    both be split, and what they merge to could not be: every device would gather all positions.
    """
    return lead if jax.sharding.get_abstract_mesh().size > 1 else (-1,)
