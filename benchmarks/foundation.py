"""What the foundation costs beside optax: the leaf driver, buckets, stored state.

    python -m benchmarks.foundation [--repeats=40] [--output=benchmarks/results]

Two programs are timed in one process, alternating, and the ratio is the median of the
ratios of neighbours, with its interquartile range: a machine that is busy slows both.
"""

import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

import optax_ext as ox
from benchmarks import _report, _timing

_REPEATS = flags.DEFINE_integer("repeats", 40, "Timed pairs of calls.", lower_bound=1)
_LEAVES = flags.DEFINE_integer("leaves", 800, "Leaves of the tree of small ones.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Folder of the JSON.")


class AdamState(NamedTuple):
    """State of the rule below."""

    count: jax.Array
    mu: Any
    nu: Any


def adam_rule(b1=0.9, b2=0.999, eps=1e-8):
    """Adam as a leaf rule: what `leafwise` is compared with optax on."""

    def init(p):
        return jnp.zeros_like(p), jnp.zeros_like(p)

    def update(g, slots, p, t):
        del p
        m, v = slots
        m = (1 - b1) * g + b1 * m
        v = (1 - b2) * g**2 + b2 * v
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        return m_hat / (jnp.sqrt(v_hat) + eps), (m, v)

    return ox.leafwise(AdamState, init, update)


def trees():
    """A few large leaves (64 MB), and many small ones of 64 x 64."""
    large = {f"w{i}": jnp.ones((2048, 2048)) for i in range(4)}
    small = {f"w{i:03d}": jnp.ones((64, 64)) for i in range(_LEAVES.value)}
    return {"4 leaves of 2048x2048": large, f"{len(small)} leaves of 64x64": small}


def compare(ours, theirs, params) -> dict[str, float]:
    """Step time and bytes of `ours` over `theirs`."""
    programs = [_timing.compiled_update(tx, params) for tx in (ours, theirs)]
    mine, its = (_timing.repeating(program) for program in programs)
    ratio = _timing.alternate(mine, its, _REPEATS.value)
    return {
        "time ratio": ratio.median,
        "time ratio, lower quartile": ratio.low,
        "time ratio, upper quartile": ratio.high,
        "step ms": 1e3 * ratio.first_seconds,
        "bytes ratio": programs[0].bytes_moved / programs[1].bytes_moved,
        "compile ratio": programs[0].seconds / programs[1].seconds,
    }


def second_moment(tx) -> float:
    """Second moment after 3000 unit gradients of a bfloat16 parameter, over exact."""
    grad = jnp.ones((), jnp.bfloat16)
    tx = optax.with_extra_args_support(tx)

    def step(state, _):
        return tx.update(grad, state, grad, hessian_diag=grad)[1], None

    state = jax.lax.scan(step, tx.init(grad), length=3000)[0]
    return float(optax.tree.get(state, "nu")) / (1 - 0.999**3000)


STORED = {
    "bfloat16, stochastic": ("bfloat16", "stochastic"),
    "bfloat16, nearest": ("bfloat16", "nearest"),
    "8 bits, stochastic": ("uint8", "stochastic"),
    "8 bits, nearest": ("uint8", "nearest"),
}


def stored_second_moment(dtype, rounding) -> dict[str, float]:
    """Stored second moment after 3000 unit gradients, over exact."""
    grad = jnp.ones((64, 64))
    tx = ox.stored(optax.scale_by_adam(), dtype, rounding)

    def step(state, _):
        return tx.update(grad, state)[1], None

    state = jax.lax.scan(step, jax.jit(tx.init)(grad), length=3000)[0]
    nu = optax.tree.get(ox.unpack_stored_state(state), "nu") / (1 - 0.999**3000)
    return {"mean": float(nu.mean()), "rms error": float(jnp.std(nu))}


def stored_cost(dtype, rounding) -> dict[str, float]:
    """AdamW with stored state over AdamW, on 2 million parameters."""
    params = {f"w{i}": jnp.ones((512, 1024)) for i in range(4)}
    adamw = optax.adamw(1e-3)
    tx = ox.stored(adamw, dtype, rounding)
    costs = compare(tx, adamw, params)
    sizes = [
        sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(jax.eval_shape(each.init, params))
        )
        for each in (tx, adamw)
    ]
    kept = ("time ratio", "time ratio, lower quartile", "time ratio, upper quartile")
    return {**{k: costs[k] for k in kept}, "state bytes ratio": sizes[0] / sizes[1]}


def main(argv):
    """Measure, print, keep."""
    del argv
    results = {**_report.environment(), "rows": {}}
    rows = results["rows"]
    for where, params in trees().items():
        rows[f"leafwise Adam / optax.scale_by_adam, {where}"] = compare(
            adam_rule(), optax.scale_by_adam(), params
        )
        rows[f"scale_by_lion_k / optax.scale_by_lion, {where}"] = compare(
            ox.scale_by_lion_k(), optax.scale_by_lion(), params
        )
    seconds = {
        name: _timing.compiled_update(tx, params).seconds
        for name, tx in (
            ("unbucketed", ox.scale_by_trust_region()),
            ("bucketed", ox.bucketed(ox.scale_by_trust_region())),
        )
    }
    rows[f"compile of a matrix rule, {where}"] = {
        **{f"{name} s": s for name, s in seconds.items()},
        "times less": seconds["unbucketed"] / seconds["bucketed"],
    }
    others = {
        "scale_by_kron": ox.scale_by_kron(),
        "scale_by_trion": ox.scale_by_trion(rank=16),
        "scale_by_dct_adam": ox.scale_by_dct_adam(rank=16),
    }
    rows[f"compile of bucketed matrix rules, {where}"] = {
        f"{name} s": _timing.compiled_update(ox.bucketed(tx), params).seconds
        for name, tx in others.items()
    }
    rows["bfloat16 second moment over exact, 3000 unit gradients"] = {
        "optax.scale_by_adam": second_moment(optax.scale_by_adam()),
        "full_precision(optax.scale_by_adam)": second_moment(
            ox.full_precision(optax.scale_by_adam())
        ),
        "scale_by_adahessian": second_moment(
            ox.scale_by_adahessian(estimator=ox.external_hessian_diag())
        ),
    }
    for name, arguments in STORED.items():
        what = f"stored second moment over exact, 3000 unit gradients, {name}"
        rows[what] = stored_second_moment(*arguments)
        rows[f"stored AdamW / optax.adamw, {name}"] = stored_cost(*arguments)
    for name, row in rows.items():
        print(name)
        for key, value in row.items():
            print(f"    {key:40s} {value:10.4f}")
    path = pathlib.Path(_OUTPUT.value) / "foundation.json"
    _report.write_json(path, results)
    print(path)


if __name__ == "__main__":
    app.run(main)
