"""The autoencoder's claim: equal trials, steps that trace, and what is counted."""

import itertools

import jax
import numpy as np
import pytest

from benchmarks.claims import autoencoder


def test_every_method_has_as_many_trials():
    for name, method in autoencoder.METHODS.items():
        rates, settings = autoencoder.trials(method)
        assert len(rates) == 20, name
        rows = zip(rates, *settings.values(), strict=True)
        assert len(set(rows)) == 20, name


@pytest.mark.parametrize("name", autoencoder.METHODS)
def test_every_method_runs_a_budget_that_is_data(name):
    rates, settings = autoencoder.trials(autoencoder.METHODS[name])
    images = jax.ShapeDtypeStruct((1797, 64), np.float32)
    run = autoencoder.program(name, "trials")
    losses = jax.eval_shape(run, images, 0, 7, rates, settings)
    assert losses.shape == (20,)


def test_the_images_are_all_digits_and_a_loss_is_a_squared_error():
    images = autoencoder.load()
    assert images.shape == (1797, 64)
    params = autoencoder.init(jax.random.key(0))
    nothing = jax.tree.map(np.zeros_like, params)
    want = np.mean(np.sum(np.asarray(images) ** 2, 1))
    np.testing.assert_allclose(autoencoder.loss_fn(nothing, images), want, rtol=1e-5)


def test_what_is_counted_is_the_first_budget_that_reaches_adamw():
    steps = [10, 20, 40]
    losses = {
        "adamw": np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.5]]),
        "kron": np.array([[2.0, 1.0, 0.5], [2.0, 1.6, 1.6]]),
    }
    judged = autoencoder.judge(losses, steps)
    assert judged["adamw"]["times_fewer_steps"] == [1.0, 1.0]
    assert judged["kron"]["times_fewer_steps"] == [2.0, 0.0]  # 0: never


def test_widths_narrow_to_a_code_and_mirror():
    assert autoencoder.SIZES == autoencoder.SIZES[::-1]
    halves = autoencoder.SIZES[1 : len(autoencoder.SIZES) // 2 + 1]
    assert all(a > b for a, b in itertools.pairwise(halves))
