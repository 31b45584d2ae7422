"""How kernels' tests compile: little is optimised (see conftest.py), but where XLA's is tested."""

import functools

import jax

OPTIMISED = {'xla_backend_optimization_level': 3, 'xla_llvm_disable_expensive_passes': False}


def jitted(impl: str, function):
    """Returns `jax.jit(function)`; of XLA's own forms the code is what a user runs."""
    return jax.jit(function, compiler_options=OPTIMISED if impl == 'xla' else None)


def compiled(impl: str, function, *args):
    """Returns a compiled function of nothing that calls the function with the arguments."""
    return functools.partial(jitted(impl, function).lower(*args).compile(), *args)
