"""Three bugs that optimizers have in practice, and that ours must not have.

Each comes with its control: optax alone. Where optax has mended it, the control is
skipped and says so; `full_precision` and `inject_hyperparams` can then do less.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_ext as ox
from tests.conformance.methods import GRADIENT_KINDS, methods
from tests.conformance.test_dtypes import abstract_step

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]], jnp.bfloat16)}
OPTAX = ("adam", "adamw", "lion", "nadam", "novograd", "rmsprop", "sgd", "yogi")


def mended(what: str) -> None:
    pytest.skip(f"optax {optax.__version__} has mended it: {what}")


# Strict promotion ---------------------------------------------------------------------


def runs_strictly(tx: optax.GradientTransformation, dtype: str) -> bool:
    """Whether one step runs under strict promotion, which the whole suite is under."""
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)

    def step(params):
        return tx.update(params, tx.init(params), params)

    try:
        jax.eval_shape(step, params)
    except jax.dtypes.TypePromotionError:
        return False
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bug_1_all_methods_run_under_strict_promotion(dtype):
    for method in methods(*GRADIENT_KINDS):
        abstract_step(method, dtype)


@pytest.mark.parametrize("name", OPTAX)
def test_bug_1_full_precision_makes_optax_run_under_strict_promotion(name):
    tx = ox.full_precision(getattr(optax, name)(0.1))
    assert all(runs_strictly(tx, dtype) for dtype in ("float32", "bfloat16"))


def test_bug_1_control_optax_raises_under_strict_promotion():
    raised = [
        (name, dtype)
        for name in OPTAX
        for dtype in ("float32", "bfloat16")
        if not runs_strictly(getattr(optax, name)(0.1), dtype)
    ]
    print(f"optax {optax.__version__} under strict promotion: {raised} raise")
    if not raised:
        mended("its optimizers run under strict promotion")


# Injected hyper-parameters ------------------------------------------------------------


def first_update(tx: optax.GradientTransformation) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        updates: Any = tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]
    return updates["w"]


def hyperparameters(tx: optax.GradientTransformation) -> dict[str, jax.Array]:
    state: Any = tx.init(PARAMS)
    return state.hyperparams


def test_bug_2_injected_hyperparameters_of_bfloat16_parameters_give_finite_steps():
    for tx in (
        ox.inject_hyperparams(ox.adamw_cwd)(learning_rate=0.1, b2=0.999),
        ox.inject_hyperparams(optax.adamw)(learning_rate=0.1, b2=0.999),
    ):
        assert jnp.isfinite(first_update(tx)).all()
        assert hyperparameters(tx)["b2"] == jnp.float32(0.999)


def test_bug_2_control_optax_rounds_b2_to_1_and_divides_0_by_0():
    tx = optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, b2=0.999)
    update = first_update(tx)
    print(f"optax {optax.__version__}: {hyperparameters(tx)}, {update}")
    if jnp.isfinite(update).all():
        mended("inject_hyperparams gives finite steps for bfloat16 parameters")


# Second moments -----------------------------------------------------------------------

STEPS, B2 = 3000, 0.999
EXACT = 1 - B2**STEPS


def second_moment(tx: optax.GradientTransformation) -> float:
    """What nu is after unit gradients (and a unit Hessian) on bfloat16 parameters."""
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(state):
        def step(_, state):
            return tx.update(ones, state, PARAMS, hessian_diag=ones)[1]

        return jax.lax.fori_loop(0, STEPS, step, state)

    with jax.numpy_dtype_promotion("standard"):
        return float(optax.tree.get(run(tx.init(PARAMS)), "nu")["w"][0, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: ox.full_precision(optax.scale_by_adam(b2=B2)),
        lambda: ox.scale_by_adahessian(b2=B2, estimator=ox.external_hessian_diag()),
        lambda: ox.scale_by_grams(b2=B2),
        lambda: ox.adamw_cwd(0.1, b2=B2),
    ],
    ids=["full_precision", "scale_by_adahessian", "scale_by_grams", "adamw_cwd"],
)
def test_bug_3_second_moments_of_bfloat16_parameters_reach_their_value(make):
    assert abs(second_moment(make()) / EXACT - 1) < 0.01


def test_bug_3_control_optax_stalls_where_an_increment_is_below_half_an_ulp():
    reached = second_moment(optax.scale_by_adam(b2=B2))
    print(f"optax {optax.__version__}: nu = {reached} after {STEPS} steps, not {EXACT}")
    if abs(reached / EXACT - 1) < 0.01:
        mended("second moments of bfloat16 parameters reach their value")
