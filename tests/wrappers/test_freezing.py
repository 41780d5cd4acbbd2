"""`freeze_converged` and `frozen_fraction`."""

# optax's types let a tree be a bare number, which has no index and no fields.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox
from tests.test_goldens import HERE, NAMES, Golden

MEASURES = ["grad", "grad_change", "update"]
every_measure = pytest.mark.parametrize("measure", MEASURES)


def feed(tx, sizes, x=None):
    """Updates and frozen fractions for gradients that are a size times ones."""
    x = jnp.zeros((2, 3)) if x is None else x
    state, outs, fractions = tx.init(x), [], []
    update = jax.jit(tx.update)
    for size in sizes:
        grads = jax.tree.map(lambda p, size=size: jnp.full_like(p, size), x)
        out, state = update(grads, state, x)
        outs.append(out)
        fractions.append(float(ox.frozen_fraction(state)))
    return outs, fractions


def first_frozen(measure, sizes, **changed):
    """The first step, from 1, after which the one leaf is frozen; None if none is."""
    options = {"total_steps": len(sizes), "tau": 1.0, "grace_fraction": 0.0, **changed}
    tx = ox.freeze_converged(optax.sgd(1.0), measure=measure, **options)
    _, fractions = feed(tx, sizes)
    return fractions.index(1.0) + 1 if 1.0 in fractions else None


@pytest.mark.usefixtures("x64")
@every_measure
def test_the_goldens_leaves_freeze_at_its_steps(measure):
    golden = Golden.load(HERE / f"wrappers_schedules/freeze_converged_{measure}.npz")
    tx, params = eval(golden.meta["call"], dict(NAMES)), golden.tree("p0")
    state, grads, steps = tx.init(params), golden.tree("g"), {}
    update = jax.jit(tx.update)
    for t in range(24):
        now = jax.tree.map(lambda g, t=t: g[t], grads)
        with jax.numpy_dtype_promotion("standard"):  # optax's Adam in float64
            updates, state = update(now, state, params)
        params = optax.apply_updates(params, updates)
        for name in ("dense", "conv"):
            if state.frozen[name]:
                steps.setdefault(name, t + 1)
    assert steps == golden.meta["frozen_at_step"]
    assert isinstance(state.frozen["bias"], optax.MaskedNode)


@every_measure
def test_a_threshold_of_0_is_inner_exactly(measure):
    tx = ox.freeze_converged(
        optax.sgd(0.1, 0.9), 5, tau=0.0, grace_fraction=0.0, measure=measure
    )
    sizes = [1.0, 1.0, 0.0, 0.0, 2.0]
    want, state = [], optax.sgd(0.1, 0.9).init(jnp.zeros((2, 3)))
    for size in sizes:
        out, state = optax.sgd(0.1, 0.9).update(jnp.full((2, 3), size), state)
        want.append(out)
    np.testing.assert_array_equal(feed(tx, sizes)[0], want)


@pytest.mark.parametrize(
    ("measure", "step", "last_update"),
    [("grad", 3, 2), ("grad_change", 3, 2), ("update", 3, 3)],
)
def test_nothing_freezes_in_the_grace_and_update_takes_its_last_step(
    measure, step, last_update
):
    tx = ox.freeze_converged(
        optax.sgd(1.0), 10, tau=1.0, grace_fraction=0.39, measure=measure
    )
    outs, fractions = feed(tx, [0.1] * 2 + [0.1, 9.0, 9.0])
    assert fractions == [0.0] * (step - 1) + [1.0] * (6 - step)
    moved = [bool((out != 0).any()) for out in outs]
    assert moved == [t <= last_update for t in range(1, 6)]


def test_the_end_of_the_grace_is_pythons_int_of_the_product():
    # 0.29 * 100 is 28.999999999999996; in float32 it would be 29.
    sizes = [0.0] * 30
    options = {"total_steps": 100, "grace_fraction": 0.29}
    assert first_frozen("grad", sizes, **options) == 28


def test_the_threshold_itself_does_not_freeze():
    sizes = [1 / 6, 1 / 6, 1 / 8]
    assert first_frozen("grad", sizes, tau=float(np.float32(1 / 6) * 6)) == 3


def test_the_first_gradient_has_no_change_and_momentum_dies_with_the_leaf():
    tx = ox.freeze_converged(
        ox.full_precision(optax.adamw(0.1, weight_decay=0.1)),
        9,
        tau=1.0,
        grace_fraction=0.0,
    )
    outs, fractions = feed(tx, [1.0, 3.0, 3.1, 9.0, 9.0], jnp.ones((2, 3)))
    assert fractions == [0.0, 0.0, 1.0, 1.0, 1.0]
    assert [bool((out != 0).any()) for out in outs] == [True, True] + [False] * 3


def test_the_mean_does_not_depend_on_the_size_of_the_leaf():
    sizes = [0.4, 0.4]
    assert first_frozen("grad", sizes, tau=0.5, norm="mean_abs") == 1
    assert first_frozen("grad", sizes, tau=0.5, norm="l1") is None
    assert first_frozen("grad", sizes, tau=2.5, norm="l1") == 1


@pytest.mark.parametrize(
    ("measure", "sizes", "step"),
    [
        # Checked at 2, 4, 6 only.
        ("grad", [0, 1, 0, 0], 4),
        # Compared with two steps before; the first check has nothing to compare with.
        ("grad_change", [5, 5, 9, 5], 4),
        ("grad_change", [0, 5, 9, 9, 9, 9], 6),
        # The sum of two updates: each is large, but they cancel.
        ("update", [1, 1, 5, -5], 4),
        ("update", [-1, -1, 1, 1, 0, 0], 6),
    ],
)
def test_with_an_interval_it_looks_back_to_the_last_check(measure, sizes, step):
    assert first_frozen(measure, sizes, update_interval=2) == step


@pytest.mark.parametrize(
    "mask", [{"a": False, "b": True}, lambda params: {"a": False, "b": True}]
)
def test_the_mask_chooses_the_leaves_by_tree_or_function(mask):
    x = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    tx = ox.freeze_converged(
        optax.sgd(1.0), 9, tau=9.0, grace_fraction=0.0, measure="grad", mask=mask
    )
    (out,), fractions = feed(tx, [1.0], x)
    np.testing.assert_array_equal(out["a"], -np.ones((2, 2)))
    np.testing.assert_array_equal(out["b"], np.zeros(2))
    assert fractions == [1.0]


def test_vectors_and_empty_matrices_are_not_monitored_by_default():
    x = {"b": jnp.zeros(2), "m": jnp.zeros((1, 2)), "none": None, "0": jnp.ones((0, 2))}
    tx = ox.freeze_converged(
        optax.sgd(1.0), 9, tau=9.0, grace_fraction=0.0, measure="grad"
    )
    (out,), fractions = feed(tx, [1.0], x)
    assert out["b"][0] == -1 and not out["m"].any() and out["none"] is None
    assert fractions == [1.0]


@every_measure
@pytest.mark.parametrize("interval", [1, 2])
def test_rows_of_a_bucket_freeze_one_by_one(measure, interval):
    tx = ox.freeze_converged(
        optax.sgd(1.0),
        9,
        tau=1.0,
        grace_fraction=0.0,
        measure=measure,
        update_interval=interval,
    )
    x = {name: jnp.zeros((2, 2)) for name in "abc"} | {"bias": jnp.zeros(3)}
    rng = np.random.default_rng(0)
    plain, stacked = tx.init(x), ox.bucketed(tx).init(x)
    fractions = []
    for t in range(6):
        sizes = {"a": 0.0, "b": 2.0 * (t < 3), "c": 5.0 * (t + 1), "bias": 1.0}
        g = {
            k: jnp.asarray(sizes[k] * (1 + rng.random(p.shape) / 99), jnp.float32)
            for k, p in x.items()
        }
        want, plain = tx.update(g, plain, x)
        got, stacked = ox.bucketed(tx).update(g, stacked, x)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        fractions.append(float(ox.frozen_fraction(stacked)))
        np.testing.assert_allclose(fractions[-1], ox.frozen_fraction(plain), rtol=1e-6)
    np.testing.assert_allclose(fractions[-1], 2 / 3, rtol=1e-6)


def test_a_frozen_leaf_ignores_a_nan():
    tx = ox.freeze_converged(
        optax.sgd(1.0), 9, tau=1.0, grace_fraction=0.0, measure="grad"
    )
    outs, _ = feed(tx, [0.0, np.nan])
    np.testing.assert_array_equal(outs[1], np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("measure", "interval", "trees"),
    [("grad", 1, 0), ("grad_change", 1, 1), ("update", 1, 0), ("update", 2, 1)],
)
def test_it_remembers_monitored_leaves_only_and_only_where_it_must(
    measure, interval, trees
):
    x = {"m": jnp.zeros((4, 5), jnp.bfloat16), "b": jnp.zeros(7, jnp.bfloat16)}
    tx = ox.freeze_converged(
        optax.sgd(1.0), 9, measure=measure, update_interval=interval
    )
    memory = jax.tree.leaves(tx.init(x).memory)
    assert [(m.shape, m.dtype) for m in memory] == [((4, 5), jnp.float32)] * trees


def test_nothing_monitored_is_a_fraction_of_0():
    tx = ox.freeze_converged(optax.sgd(1.0), 9)
    assert feed(tx, [0.0], {"b": jnp.zeros(3)})[1] == [0.0]


def test_the_fraction_needs_one_state():
    with pytest.raises(ValueError, match=r"frozen_fraction needs .* got 0"):
        ox.frozen_fraction(optax.sgd(0.1).init(jnp.zeros(1)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"total_steps": 0}, "total_steps must be an integer of 1"),
        ({"update_interval": 1.5}, "update_interval must be an integer of 1"),
        ({"tau": -1.0}, r"tau must lie in \[0.0"),
        ({"grace_fraction": 1.5}, r"grace_fraction must lie in \[0.0, 1.0\]"),
        ({"measure": "gradient"}, "measure must be one of 'grad_change', 'grad', 'up"),
        ({"norm": "l2"}, "norm must be one of 'l1', 'mean_abs'"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=f"freeze_converged: {message}"):
        ox.freeze_converged(optax.sgd(0.1), **{"total_steps": 9, **changed})
