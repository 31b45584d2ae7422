"""bfloat16 computation on float32 parameters."""

import jax
import numpy as np
import toy
from jax import numpy as jnp

from bigjax.metrics import read_metrics


def test_bfloat16_computes_and_float32_is_kept_and_learns(tmp_path):
    outcome = toy.fit(tmp_path, steps=100, batch=32, dtype='bfloat16', dropout=0.0)
    loss = [r['loss'] for r in read_metrics(tmp_path / 'metrics.jsonl') if 'set' not in r]
    assert np.mean(loss[-5:]) < 0.5 * np.mean(loss[:5])
    floats = {
        path: leaf.dtype
        for path, leaf in toy.leaves(outcome.state).items()
        if np.issubdtype(leaf.dtype, np.inexact) or leaf.dtype == jnp.bfloat16
    }
    assert floats
    assert set(floats.values()) == {np.dtype(np.float32)}, floats


def test_every_product_of_matrices_has_the_type_of_the_knob():
    for dtype in ('float32', 'bfloat16'):
        experiment, _ = toy.build(dtype=dtype)
        variables = experiment.task.init(jax.random.key(0))
        extra = {'batch_stats': variables['batch_stats']}
        batch = experiment.data.train.take(np.arange(8))
        gradient = jax.grad(experiment.task.loss, has_aux=True)
        jaxpr = jax.make_jaxpr(gradient, static_argnums=4)(
            variables['params'], extra, batch, jax.random.key(0), True
        )
        products = [e for e in jaxpr.eqns if e.primitive.name == 'dot_general']
        types = {str(v.aval.dtype) for e in products for v in e.invars}
        assert types == {dtype}
