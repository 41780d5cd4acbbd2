"""Losses that remember every example: early learning, and last epoch's predictions."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_ext as ox

ROOT = pathlib.Path(__file__).parents[2]
cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
N, C = 7, 3


def batch(seed=0, rows=4):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(0, 1, (rows, C)))
    labels = jnp.asarray(rng.integers(0, C, rows))
    return logits, labels, jnp.asarray(rng.permutation(N)[:rows])


def early(**changed):
    return ox.losses.early_learning_regularization(N, C, **changed)


def progressive(**changed):
    given = {"total_epochs": 4, **changed}
    return ox.losses.progressive_self_distillation(N, C, **given)


# Each with a fixed epoch, so that both are called alike.
BOTH = pytest.mark.parametrize(
    ("make", "more"), [(early, {}), (progressive, {"epoch": 2})], ids=["elr", "pskd"]
)


@BOTH
def test_only_the_rows_of_the_batch_change(make, more):
    loss = make()
    before = jax.random.uniform(jax.random.key(0), (N, C))
    logits, labels, index = batch()
    losses, after = loss.apply(before, logits, labels, index, **more)
    assert losses.shape == (4,)
    others = np.setdiff1d(np.arange(N), index)
    np.testing.assert_array_equal(after[others], before[others])
    assert not np.any(np.asarray(after[index] == before[index]).all(-1))


@BOTH
def test_the_table_carries_no_gradient(make, more):
    loss, (logits, labels, index) = make(), batch(1)
    old = jax.random.uniform(jax.random.key(1), (N, C)) / C

    def of_state(old):
        return loss.apply(old, logits, labels, index, **more)[0].sum()

    def of_rows(logits):
        return loss.apply(old, logits, labels, index, **more)[1].sum()

    np.testing.assert_array_equal(jax.grad(of_state)(old), 0)
    np.testing.assert_array_equal(jax.grad(of_rows)(logits), 0)


@BOTH
def test_a_scan_over_batches_is_a_loop_with_one_trace(make, more):
    loss = make()
    every = jax.tree.map(lambda *x: jnp.stack(x), *map(batch, range(5)))
    traces = []

    def step(state, inputs):
        traces.append(inputs)
        losses, state = loss.apply(state, *inputs, **more)
        return state, losses

    state, losses = jax.jit(lambda: jax.lax.scan(step, loss.init(), every))()
    assert len(traces) == 1
    again = loss.init()
    for t in range(5):
        want, again = loss.apply(again, *batch(t), **more)
        np.testing.assert_allclose(losses[t], want, rtol=1e-5)
    np.testing.assert_allclose(state, again, rtol=1e-5)


@BOTH
def test_of_a_duplicate_index_each_has_its_own_loss_and_one_stays(make, more):
    loss, (logits, labels, _) = make(), batch(2)
    alone = [
        loss.apply(
            loss.init(), logits[i : i + 1], labels[i : i + 1], jnp.array([5]), **more
        )
        for i in range(4)
    ]
    losses, state = loss.apply(loss.init(), logits, labels, jnp.full(4, 5), **more)
    np.testing.assert_allclose(losses, jnp.concatenate([a for a, _ in alone]), 1e-6)
    rows = [np.allclose(state[5], table[5], rtol=1e-6) for _, table in alone]
    assert any(rows)


@BOTH
def test_padding_past_the_table_is_not_stored(make, more):
    loss, (logits, labels, _) = make(), batch(3)
    losses, state = loss.apply(loss.init(), logits, labels, jnp.full(4, N), **more)
    assert jnp.isfinite(losses).all()
    np.testing.assert_array_equal(state, loss.init())


@BOTH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_table_and_losses_are_float32_and_gradients_of_the_logits_dtype(
    make, more, dtype
):
    loss, (logits, labels, index) = make(), batch(4)

    def total(logits):
        losses, state = loss.apply(loss.init(), logits, labels, index, **more)
        return losses.sum(), (losses, state)

    grads, aux = jax.grad(total, has_aux=True)(logits.astype(dtype))
    assert grads.dtype == dtype
    assert [x.dtype for x in aux] == [jnp.float32] * 2


@BOTH
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_are_finite_time_after_time(make, more, size):
    loss = make()
    logits = jnp.array([[size, 0.0, -size], [0.0, size, 0.0]])
    labels, index = jnp.array([1, 1]), jnp.array([0, 1])

    def total(logits, state):
        losses, state = loss.apply(state, logits, labels, index, **more)
        return losses.sum(), (losses, state)

    state = loss.init()
    for _ in range(100):
        grads, (losses, state) = jax.grad(total, has_aux=True)(logits, state)
        assert jnp.isfinite(losses).all() and jnp.isfinite(grads).all()
    assert jnp.isfinite(state).all()


@BOTH
def test_mistakes_are_named(make, more):
    loss, (logits, labels, index) = make(), batch()
    state = loss.init()
    with pytest.raises(AssertionError, match="index must be integers"):
        loss.apply(state, logits, labels, index.astype(float), **more)
    with pytest.raises(AssertionError, match="one example id a row"):
        loss.apply(state, logits, labels, index[:2], **more)
    with pytest.raises(AssertionError, match="logits must have 3 classes"):
        loss.apply(state, logits[:, :2], labels, index, **more)
    with pytest.raises(AssertionError, match=r"table of \w+\.init"):
        loss.apply(state[:3], logits, labels, index, **more)


def test_hyper_parameters_out_of_range_are_named():
    with pytest.raises(ValueError, match="beta must lie"):
        early(beta=1.0)
    with pytest.raises(ValueError, match="lam must lie"):
        early(lam=-1.0)
    with pytest.raises(ValueError, match="num_examples must be an integer"):
        ox.losses.early_learning_regularization(0, C)
    with pytest.raises(ValueError, match="alpha_final must lie"):
        progressive(alpha_final=1.5)
    with pytest.raises(ValueError, match="total_epochs must be an integer"):
        progressive(total_epochs=0)
    with pytest.raises(ValueError, match=r"epoch must lie in .*got 4"):
        progressive().apply(progressive().init(), *batch(), epoch=4)


def test_elr_from_nothing_has_the_share_of_the_first_belief(x64):
    loss, (logits, labels, index) = early(beta=0.6), batch(5)
    _, state = loss.apply(loss.init(), logits, labels, index)
    want = 0.4 * jax.nn.softmax(logits)
    np.testing.assert_allclose(state[index], want, rtol=1e-14)


def test_elr_without_strength_is_cross_entropy(x64):
    loss, (logits, labels, index) = early(lam=0.0), batch(6)
    losses, _ = loss.apply(loss.init(), logits, labels, index)
    np.testing.assert_array_equal(losses, cross_entropy(logits, labels))


def test_elr_gradient_is_the_closed_form_off_the_clip(x64):
    loss, (logits, labels, index) = early(beta=0.8, lam=2.0), batch(7)
    _, state = loss.apply(loss.init(), *batch(8))

    def total(logits):
        losses, new = loss.apply(state, logits, labels, index)
        return losses.sum(), new

    grads, new = jax.grad(total, has_aux=True)(logits)
    p, t = jax.nn.softmax(logits), new[index]
    agreement = jnp.sum(p * t, -1, keepdims=True)
    regulariser = 2 * p * (agreement - t) / (1 - agreement)
    want = p - jax.nn.one_hot(labels, C) + regulariser
    np.testing.assert_allclose(grads, want, rtol=1e-12, atol=1e-15)


def test_elr_on_the_clip_has_the_gradient_of_cross_entropy(x64):
    logits = jnp.array([[30.0, 0.0, 0.0]])
    labels, index = jnp.array([1]), jnp.array([0])
    with_elr, plain = (
        jax.grad(lambda z, l=l: l.apply(l.init(), z, labels, index)[0].sum())(logits)
        for l in (early(), early(lam=0.0))
    )
    np.testing.assert_array_equal(with_elr, plain)


@pytest.mark.parametrize("changed", [{"epoch": 0}, {"epoch": 3, "alpha_final": 0.0}])
def test_pskd_is_cross_entropy_at_first_and_without_a_past(x64, changed):
    epoch = changed.pop("epoch")
    loss, (logits, labels, index) = progressive(**changed), batch(9)
    past = jax.nn.softmax(jax.random.normal(jax.random.key(0), (N, C)))
    losses, new = loss.apply(past, logits, labels, index, epoch=epoch)
    np.testing.assert_allclose(losses, cross_entropy(logits, labels), rtol=1e-14)
    np.testing.assert_allclose(new[index], jax.nn.softmax(logits), rtol=1e-15)


def test_pskd_gradient_is_softmax_minus_target(x64):
    loss, (logits, labels, index) = progressive(alpha_final=0.6), batch(10)
    past = jax.nn.softmax(jax.random.normal(jax.random.key(1), (N, C)))

    @jax.jit
    def grads(epoch):
        return jax.grad(lambda z: loss.apply(past, z, labels, index, epoch)[0].sum())(
            logits
        )

    alpha = 0.6 * 3 / 4
    target = (1 - alpha) * jax.nn.one_hot(labels, C) + alpha * past[index]
    want = jax.nn.softmax(logits) - target
    np.testing.assert_allclose(grads(jnp.asarray(2, jnp.int32)), want, 1e-12, 1e-15)


def test_pskd_shrinks_the_gradient_by_what_the_past_had_right(x64):
    # 1 - 0.4 (1 - 0.6) / (1 - 0.5) = 0.68, from the specification.
    p, q = jnp.array([[0.5, 0.3, 0.2]]), jnp.array([[0.6, 0.25, 0.15]])
    loss = ox.losses.progressive_self_distillation(
        1, 3, total_epochs=2, alpha_final=0.4
    )
    zero = jnp.zeros(1, int)

    def size(epoch, past):
        return jnp.abs(
            jax.grad(lambda z: loss.apply(past, z, zero, zero, epoch)[0].sum())(
                jnp.log(p)
            )
        ).sum()

    ratio = size(1, q) / size(0, q)
    np.testing.assert_allclose(ratio, 0.68, rtol=1e-12)


def test_a_table_sharded_over_examples_stays_so_and_is_never_gathered():
    script = textwrap.dedent("""
        import json, jax, jax.numpy as jnp, numpy as np
        import optax_ext as ox
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows, everywhere = (NamedSharding(mesh, P(*s)) for s in (("data",), ()))
        elr = ox.losses.early_learning_regularization(64, 3)
        ps = ox.losses.progressive_self_distillation(64, 3, total_epochs=3)
        rng = np.random.default_rng(0)
        z = jnp.asarray(rng.normal(0, 1, (16, 3)), jnp.float32)
        y = jnp.asarray(rng.integers(0, 3, 16))
        index = jnp.asarray(rng.permutation(64)[:16])
        old = jax.nn.softmax(jnp.asarray(rng.normal(0, 1, (64, 3)), jnp.float32)) / 2
        report = {}
        for name, loss, more in (("elr", elr, {}), ("pskd", ps, {"epoch": 1})):
            want = loss.apply(old, z, y, index, **more)
            step = jax.jit(
                lambda state, z, y, index: loss.apply(state, z, y, index, **more))
            placed = [jax.device_put(x, rows) for x in (old, z, y, index)]
            program = step.lower(*placed).compile()
            got = program(*placed)
            report[name] = {
                "close": all(np.allclose(a, b, rtol=1e-5) for a, b in zip(got, want)),
                "sharded": got[1].sharding.is_equivalent_to(rows, 2),
                "gathered": "f32[64,3]" in program.as_text(),
            }
        print(json.dumps(report))
        """)
    flags = "--xla_force_host_platform_device_count=8"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "PYTHONPATH": paths,
            "XLA_FLAGS": flags,
            "JAX_PLATFORMS": "cpu",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = {"close": True, "sharded": True, "gathered": False}
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {"elr": expected, "pskd": expected}
