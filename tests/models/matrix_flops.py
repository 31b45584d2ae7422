"""FLOPs of the matrix products and convolutions that a function traces to, padding included."""

import functools

from bigjax.plan.arithmetic import traced

matrix_flops = functools.partial(traced.matrix_flops, padding=True)
