"""GRPO-Guard: normalised ratios, regulated clipping, re-weighted steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_ext as ox

NAMES = ("log_probs", "old_log_probs", "means", "old_means", "std_devs", "dts")
POLICIES = NAMES[:4]


def random_steps(seed, samples=6, steps=4, event=(3, 2), drift=0.3):
    """Stored samples of some steps, scored by a new and an old policy in float64."""
    rng = np.random.default_rng(seed)
    std_devs, dts = rng.uniform(0.5, 2.5, steps), rng.uniform(0.02, 0.3, steps)
    shape = (samples, steps, *event)
    old_means, noise = rng.normal(size=shape), rng.normal(size=shape)
    means = old_means + drift * rng.normal(size=shape)
    std = std_devs * np.sqrt(dts)
    x = old_means + std.reshape(1, steps, *[1] * len(event)) * noise
    case = {
        "means": means,
        "old_means": old_means,
        "std_devs": std_devs,
        "dts": dts,
        "x": x,
        "noise": noise,
        "std": std,
        "advantages": 4 * rng.normal(size=(samples, steps)),
    }
    return {name: jnp.asarray(value) for name, value in case.items()}


def scored(case, reduction="mean", means=None) -> dict[str, Any]:
    """The arguments of `normalized_log_ratio` for a case, with other means if given."""

    def log_prob(m):
        return ox.losses.gaussian_step_log_prob(
            case["x"], m, case["std"], event_ndim=m.ndim - 2, reduction=reduction
        )

    means = case["means"] if means is None else means
    return {
        "log_probs": log_prob(means),
        "old_log_probs": log_prob(case["old_means"]),
        "means": means,
        "old_means": case["old_means"],
        "std_devs": case["std_devs"],
        "dts": case["dts"],
    }


def reference_loss(
    case, reduction, low, high, adv_clip_max, ratio_norm, reweight
) -> np.ndarray:
    """The three printed steps in NumPy."""
    arguments = scored(case, reduction)
    log_p, log_old, mu, mu_old, sigma, dt = (np.asarray(arguments[n]) for n in NAMES)
    reduce = np.mean if reduction == "mean" else np.sum
    s = sigma * np.sqrt(dt)
    log_r = log_p - log_old
    if ratio_norm:
        log_r = (log_r + reduce((mu - mu_old) ** 2, (2, 3)) / (2 * s**2)) * s
    a = np.clip(np.asarray(case["advantages"]), -adv_clip_max, adv_clip_max)
    r = np.exp(log_r)
    loss = np.maximum(-a * r, -a * np.clip(r, 1 - low, 1 + high))
    return loss / dt if reweight else loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ratio_norm", [True, False])
@pytest.mark.parametrize("reweight", [True, False])
@pytest.mark.parametrize(
    ("low", "high", "adv_clip_max"),
    [(0.05, None, 5.0), (0.02, 0.1, 1.5), (0.2, 0.01, 100.0)],
)
def test_loss_is_the_printed_one(
    x64, reduction, ratio_norm, reweight, low, high, adv_clip_max
):
    case = random_steps(0)
    got = ox.losses.grpo_guard_loss(
        **scored(case, reduction),
        advantages=case["advantages"],
        clip_range=low,
        clip_range_high=high,
        adv_clip_max=adv_clip_max,
        ratio_norm=ratio_norm,
        reweight=reweight,
        reduction=reduction,
    )
    high = low if high is None else high
    want = reference_loss(
        case, reduction, low, high, adv_clip_max, ratio_norm, reweight
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_defaults_are_those_of_the_recipes(x64):
    case = random_steps(1, drift=1e-5)
    got = ox.losses.grpo_guard_loss(**scored(case), advantages=case["advantages"])
    want = reference_loss(case, "mean", 2e-6, 2e-6, 5.0, True, True)
    np.testing.assert_allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("event", [(5,), (3, 2), ()])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_normalized_log_ratio_is_the_inner_product_of_shift_and_noise(
    x64, event, reduction
):
    case = random_steps(2, event=event)
    got = ox.losses.normalized_log_ratio(**scored(case, reduction), reduction=reduction)
    product = (case["means"] - case["old_means"]) * case["noise"]
    reduce = jnp.mean if reduction == "mean" else jnp.sum
    want = reduce(product, tuple(range(2, product.ndim)))
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("drift", [0.0, 0.1, 3.0])
def test_gradient_through_the_log_probs_is_the_noise_whatever_the_mean(x64, drift):
    case = random_steps(3, drift=drift)
    grad = jax.grad(
        lambda m: ox.losses.normalized_log_ratio(**scored(case, means=m)).sum()
    )(case["means"])
    std = case["std"].reshape(1, 4, 1, 1)
    want = (case["x"] - case["old_means"]) / (std * 6)
    np.testing.assert_allclose(grad, want, rtol=1e-10, atol=1e-12)


def expectations(shift, std, reduction):
    """E log r, E r, E log r~, E r~ of one step in 2 dimensions under the old policy.

    Gauss-Hermite quadrature with 40 nodes: exact but for rounding on these integrands.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    noise = jnp.stack(jnp.meshgrid(nodes, nodes), -1).reshape(-1, 1, 2)
    weights = np.outer(weights, weights).reshape(-1) / (2 * np.pi)
    old_means = jnp.zeros_like(noise)
    case = {
        "x": std * noise,
        "old_means": old_means,
        "means": old_means + jnp.asarray(shift).reshape(1, 1, 2),
        "std": jnp.array([std]),
        "std_devs": jnp.array([std * 2]),
        "dts": jnp.array([0.25]),
    }
    arguments = scored(case, reduction)
    raw = arguments["log_probs"] - arguments["old_log_probs"]
    normalized = ox.losses.normalized_log_ratio(**arguments, reduction=reduction)
    return [
        float(weights @ np.asarray(f(log_r))[:, 0])
        for log_r in (raw, normalized)
        for f in (lambda x: x, jnp.exp)
    ]


@pytest.mark.parametrize("std", [0.2, 0.9])
@pytest.mark.parametrize("shift", [(0.05, 0.0), (0.2, -0.1)])
def test_mean_ratio_follows_the_law_of_averaged_log_probs(x64, shift, std):
    square = shift[0] ** 2 + shift[1] ** 2
    kl = square / (2 * std**2)
    log_r, r, log_norm, norm = expectations(shift, std, "mean")
    assert log_r == pytest.approx(-kl / 2, rel=1e-10)
    assert r == pytest.approx(np.exp(-kl / 2 + kl / 4), rel=1e-10)
    assert r < 1
    # The normalised log-ratio has mean 0; its exponential that of a log-normal.
    assert log_norm == pytest.approx(0, abs=1e-13)
    assert norm == pytest.approx(np.exp(square / 8), rel=1e-10)

    log_r, r, log_norm, norm = expectations(shift, std, "sum")
    assert log_r == pytest.approx(-kl, rel=1e-10)
    assert r == pytest.approx(1, rel=1e-10)
    assert log_norm == pytest.approx(0, abs=1e-13)
    assert norm == pytest.approx(np.exp(square / 2), rel=1e-10)


def test_normalized_ratio_answers_alike_to_the_velocity_at_all_steps_but_the_first(x64):
    level, steps = 0.7, 10
    u = jnp.linspace(1.0, 0.0, steps + 1)
    grid = 3 * u / (1 + 2 * u)
    sample = velocity = jnp.zeros((1, 2))

    def per_dt(step, noise, normalize):
        sigma, next_sigma = grid[step], grid[step + 1]
        args = (sigma, next_sigma, grid[1])
        stored, old_log_prob, old_mean, std_dev = ox.losses.flow_sde_step(
            velocity, sample, *args, noise, noise_level=level
        )
        dt = sigma - next_sigma

        def log_ratio(v):
            _, _, mean, _ = ox.losses.flow_sde_step(
                v, sample, *args, noise, noise_level=level
            )
            std = std_dev * jnp.sqrt(dt)
            log_prob = ox.losses.gaussian_step_log_prob(stored, mean, std)
            both = (log_prob, old_log_prob, mean, old_mean, std_dev, dt)
            normalized = ox.losses.normalized_log_ratio(*both)
            return (normalized if normalize else log_prob - old_log_prob).squeeze()

        return np.asarray(jax.grad(log_ratio)(velocity)) / float(dt)

    def rms(normalize):
        # Linear in the noise, so two unit vectors give the mean square exactly.
        units = [jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])]
        return np.array(
            [
                np.sqrt(np.sum([per_dt(k, e, normalize) ** 2 for e in units]) / 2)
                for k in range(steps)
            ]
        )

    normalized, raw = rms(True), rms(False)
    np.testing.assert_allclose(normalized[1:], 0.6225, rtol=1e-12)
    assert normalized[0] == pytest.approx(0.5, rel=1e-12)
    # The raw log-ratio answers with 1/s more, from 0.7 to 3.1 on this grid.
    dts = -np.diff(grid)
    sigmas = np.where(np.arange(steps) == 0, grid[1], grid[:-1])
    std = level * np.sqrt(grid[:-1] / (1 - sigmas) * dts)
    np.testing.assert_allclose(raw, normalized / std, rtol=1e-12)
    assert raw.max() > 4 * raw.min()


def test_on_policy_ratio_is_exactly_one_and_its_gradient_the_noise(x64):
    case = random_steps(4, drift=0.0)
    log_ratio = ox.losses.normalized_log_ratio(**scored(case))
    np.testing.assert_array_equal(log_ratio, jnp.zeros((6, 4)))
    grad = jax.grad(
        lambda m: ox.losses.grpo_guard_loss(
            **scored(case, means=m), advantages=case["advantages"], adv_clip_max=100.0
        ).sum()
    )(case["means"])
    weighted = (case["advantages"] / case["dts"].reshape(1, 4)).reshape(6, 4, 1, 1)
    np.testing.assert_allclose(grad, -weighted * case["noise"] / 6, rtol=1e-10)


@pytest.mark.parametrize("argument", ["log_probs", "means"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_partial_gradients_agree_with_finite_differences(x64, argument, reduction):
    case = random_steps(5, samples=3, steps=2, event=(2,))
    arguments = scored(case, reduction)

    def total(x):
        return ox.losses.grpo_guard_loss(
            **{**arguments, argument: x},
            advantages=case["advantages"],
            clip_range=0.05,
            clip_range_high=0.1,
            reduction=reduction,
        ).sum()

    x, h = arguments[argument], 1e-6
    grad = jax.grad(total)(x)
    want = np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        e = np.zeros(x.shape)
        e[i] = h
        want[i] = (float(total(x + e)) - float(total(x - e))) / (2 * h)
    assert np.any(want != 0)
    assert np.any(np.abs(want) < 1e-9)  # some elements are clipped
    # Rounding: 1e-16/h times a loss of order 100.
    np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-6)


def test_old_policy_and_advantages_are_detached(x64):
    case = random_steps(6)
    arguments = scored(case)

    def total(detached):
        return ox.losses.grpo_guard_loss(**{**arguments, **detached}).sum()

    detached = {name: arguments[name] for name in ("old_log_probs", "old_means")}
    grads = jax.grad(total)({**detached, "advantages": case["advantages"]})
    for grad in grads.values():
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_switched_off_it_is_the_plain_clip(x64):
    case = random_steps(7)
    arguments = scored(case)
    got = ox.losses.grpo_guard_loss(
        **arguments,
        advantages=case["advantages"],
        clip_range=0.1,
        ratio_norm=False,
        reweight=False,
    )
    want = ox.losses.ppo_clip_loss(
        arguments["log_probs"],
        arguments["old_log_probs"],
        jnp.clip(case["advantages"], -5, 5),
        clip_range=0.1,
    )
    np.testing.assert_array_equal(got, want)


def test_bias_is_taken_per_sample(x64):
    case = random_steps(8)
    arguments = scored(case)
    together = ox.losses.normalized_log_ratio(**arguments)
    for i in range(6):
        sample = {name: arguments[name][i : i + 1] for name in POLICIES}
        alone = ox.losses.normalized_log_ratio(**{**arguments, **sample})
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-13)


def test_noise_scales_may_be_given_per_step_or_per_sample(x64):
    case = random_steps(9)
    arguments = {**scored(case), "advantages": case["advantages"]}
    want = ox.losses.grpo_guard_loss(**arguments, clip_range=0.05)
    for name in ("std_devs", "dts"):
        arguments[name] = jnp.broadcast_to(arguments[name], (6, 4))
    got = ox.losses.grpo_guard_loss(**arguments, clip_range=0.05)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("normalize", [True, False])
def test_step_weights_are_inverse_steps(x64, normalize):
    dts = jnp.array([0.3, 0.05, 0.1])
    weights = ox.losses.denoising_step_weights(dts, normalize=normalize)
    np.testing.assert_allclose(weights * dts, weights[0] * dts[0], rtol=1e-15)
    if normalize:
        assert weights.mean() == pytest.approx(1, rel=1e-15)
    else:
        np.testing.assert_allclose(weights, 1 / dts, rtol=1e-15)


def cast(case, dtype) -> dict[str, Any]:
    """The arguments of `grpo_guard_loss` in a dtype."""
    arguments = {**scored(case), "advantages": case["advantages"]}
    return {name: x.astype(dtype) for name, x in arguments.items()}


def test_loss_is_the_same_under_jit_and_vmap():
    arguments = cast(random_steps(10), jnp.float32)
    steps = {name: arguments.pop(name) for name in ("std_devs", "dts")}

    def fn(arguments):
        return ox.losses.grpo_guard_loss(**arguments, **steps, clip_range=0.05)

    plain = fn(arguments)
    # Log-probs of order 1 differ by rounding, 1e-7, which 1 / dt <= 50 multiplies.
    for transformed in (jax.jit(fn), jax.vmap(fn)):
        got = transformed(arguments)
        np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-4)


def test_bfloat16_is_computed_in_float32():
    bf16 = cast(random_steps(11), jnp.bfloat16)
    f32 = {name: x.astype(jnp.float32) for name, x in bf16.items()}
    got = ox.losses.grpo_guard_loss(**bf16, clip_range=0.05)
    assert got.dtype == jnp.float32
    want = ox.losses.grpo_guard_loss(**f32, clip_range=0.05)
    np.testing.assert_array_equal(got, want)
    assert ox.losses.denoising_step_weights(bf16["dts"]).dtype == jnp.float32


def guarded(log_ratio, advantage, shift, dt):
    """Value and gradients of one step, in float32."""

    def fn(log_prob, mean):
        return ox.losses.grpo_guard_loss(
            log_prob, jnp.zeros(1), mean, jnp.zeros((1, 2)), 1.0, dt, advantage
        ).squeeze()

    return jax.value_and_grad(fn, (0, 1))(
        jnp.array([log_ratio]), jnp.full((1, 2), shift)
    )


@pytest.mark.parametrize("log_ratio", [1e4, -1e4])
@pytest.mark.parametrize("dt", [1.0, 1e-6, 1e-30])
def test_zero_advantage_gives_zero_at_any_ratio_and_step(log_ratio, dt):
    value, grads = guarded(log_ratio, 0.0, 0.1, dt)
    assert value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


@pytest.mark.parametrize(("log_ratio", "advantage"), [(1e4, 9.0), (-1e4, -9.0)])
@pytest.mark.parametrize("dt", [1.0, 1e-6, 1e-30])
def test_clipped_extremes_are_finite_at_tiny_steps(log_ratio, advantage, dt):
    value, grads = guarded(log_ratio, advantage, 0.0, dt)
    assert value == pytest.approx(-np.sign(advantage) * 5 / dt, rel=1e-5)
    for grad in grads:
        assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("dt", [1e-6, 1e-30])
def test_means_that_move_are_finite_at_tiny_steps(dt):
    value, grads = guarded(-(0.1**2) / (2 * dt), 1.0, 0.1, dt)
    assert np.isfinite(value)
    for grad in grads:
        assert np.all(np.isfinite(grad))


@pytest.mark.parametrize(
    ("hyperparams", "message"),
    [
        ({"clip_range": 0.0}, "clip_range must lie in"),
        ({"clip_range": 1.0}, "clip_range must lie in"),
        ({"clip_range_high": 0.0}, "clip_range_high must lie in"),
        ({"adv_clip_max": 0.0}, "adv_clip_max must lie in"),
        ({"reduction": "batch"}, "reduction must be one of 'mean', 'sum'"),
        ({"reduction": "max", "ratio_norm": False}, "reduction must be one of"),
    ],
)
def test_bad_hyperparameters_are_named(hyperparams, message):
    case = random_steps(12)
    with pytest.raises(ValueError, match=message):
        ox.losses.grpo_guard_loss(
            **scored(case), advantages=case["advantages"], **hyperparams
        )


def test_unknown_reduction_of_the_log_ratio_is_named():
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum'"):
        ox.losses.normalized_log_ratio(**scored(random_steps(13)), reduction="max")


@pytest.mark.parametrize(
    ("name", "shape", "ratio_norm"),
    [
        ("old_log_probs", (6, 1), True),
        ("old_log_probs", (6, 1), False),
        ("std_devs", (6,), True),
        ("dts", (3,), True),
        ("dts", (3,), False),
        ("means", (6, 4, 3), True),
        ("old_means", (6, 4, 2, 3), True),
        ("advantages", (4,), True),
        ("advantages", (4,), False),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape, ratio_norm):
    case = random_steps(14)
    arguments = scored(case)
    arguments["advantages"] = case["advantages"]
    arguments[name] = jnp.ones(shape)
    with pytest.raises(AssertionError, match=name):
        ox.losses.grpo_guard_loss(**arguments, ratio_norm=ratio_norm)


@pytest.mark.parametrize("name", [*NAMES, "advantages"])
def test_integers_are_refused_by_name(name):
    case = random_steps(15)
    arguments = scored(case)
    arguments["advantages"] = case["advantages"]
    arguments[name] = jnp.ones(arguments[name].shape, jnp.int32)
    with pytest.raises(AssertionError, match=rf"\[{name} must be floating point"):
        ox.losses.grpo_guard_loss(**arguments)
