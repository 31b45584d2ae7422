"""Losses and counts against float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from bigjax import losses


@pytest.fixture(params=[(), (7,), (3, 5)], ids=str)
def example(request):
    """Logits with a large common offset, and labels; in several leading shapes."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*request.param, 11)) * 5 + 300
    return logits.astype(np.float32), rng.integers(0, 11, request.param)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 1.0])
@pytest.mark.parametrize('z_loss', [0.0, 1e-3])
def test_cross_entropy_equals_float64(example, smoothing, z_loss):
    logits, labels = example
    log_p = log_softmax(logits)
    target = (1 - smoothing) * np.eye(11)[labels] + smoothing / 11
    log_z = (logits - log_p)[..., 0]
    expected = -(target * log_p).sum(-1) + z_loss * log_z**2
    found = losses.cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), label_smoothing=smoothing, z_loss=z_loss
    )
    assert found.dtype == jnp.float32
    assert found.shape == labels.shape
    np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-5)

    gradient = jax.grad(
        lambda x: losses.cross_entropy(
            x, jnp.asarray(labels), label_smoothing=smoothing, z_loss=z_loss
        ).sum()
    )(jnp.asarray(logits))
    expected = np.exp(log_p) * (1 + 2 * z_loss * log_z[..., None]) - target
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_negative_labels_cost_nothing():
    logits = jnp.array([[1.0, 2.0], [jnp.inf, 0.0], [3.0, 1.0]])
    labels = jnp.array([1, -1, 0])
    loss = losses.cross_entropy(logits, labels, label_smoothing=0.1, z_loss=1e-2)
    assert loss[1] == 0
    finite = jnp.where(jnp.isinf(logits), 5.0, logits)
    gradient = jax.grad(lambda x: losses.cross_entropy(x, labels).sum())(finite)
    assert (gradient[1] == 0).all()
    assert (gradient[0] != 0).all()


def test_huge_logits_stay_finite():
    logits = jnp.array([[1e30, -1e30, 0.0]])
    np.testing.assert_array_equal(losses.cross_entropy(logits, jnp.array([0])), [0.0])
    loss, gradient = jax.value_and_grad(lambda x: losses.cross_entropy(x, jnp.array([2])).sum())(
        logits
    )
    assert loss == pytest.approx(1e30)
    np.testing.assert_array_equal(gradient, [[1.0, 0.0, -1.0]])


def test_bfloat16_logits_are_computed_in_float32(example):
    logits, labels = jnp.asarray(example[0], jnp.bfloat16), jnp.asarray(example[1])
    np.testing.assert_array_equal(
        losses.cross_entropy(logits, labels),
        losses.cross_entropy(logits.astype(jnp.float32), labels),
    )


def test_squared_error_refuses_broadcasting():
    np.testing.assert_array_equal(
        losses.squared_error(jnp.array([1.0, 4.0]), jnp.array([3, 3])), [4.0, 1.0]
    )
    with pytest.raises(ValueError, match=r'predictions \(2, 1\) and targets \(2,\) differ'):
        losses.squared_error(jnp.ones((2, 1)), jnp.ones(2))


def test_correct_and_top_k():
    logits = jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    labels = jnp.array([0, 1, 2, -1])
    np.testing.assert_array_equal(losses.correct(logits, labels), [1, 0, 0, 0])
    np.testing.assert_array_equal(losses.correct_top_k(logits, labels, 2), [1, 1, 0, 0])
    np.testing.assert_array_equal(losses.correct_top_k(logits, labels, 3), [1, 1, 1, 0])


def test_confusion_equals_scikit_learn():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 25, 5)).astype(np.float32)
    labels = rng.integers(-1, 5, (4, 25))
    weights = rng.integers(0, 2, (4, 25)).astype(np.float32)
    found = losses.confusion(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(weights))
    real = (labels >= 0) & (weights > 0)
    expected = sklearn.metrics.confusion_matrix(
        labels[real], logits.argmax(-1)[real], labels=range(5)
    )
    np.testing.assert_array_equal(found, expected)
    unweighted = losses.confusion(jnp.asarray(logits), jnp.asarray(labels))
    assert unweighted.sum() == (labels >= 0).sum()
