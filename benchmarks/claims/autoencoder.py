r"""Curvature and matrix rules against a tuned AdamW on a deep autoencoder.

    python -m benchmarks.claims.autoencoder           # three seeds, tens of minutes
    python -m benchmarks.claims.autoencoder --short   # does everything work?

The classic test of second-order methods: the narrow middle of a deep autoencoder makes
its loss ill-conditioned. All digits of scikit-learn are training data, and the loss is
that of all of them at the end, with a learning rate that warms up and falls to zero.

Every method gets the same number of trials: five learning rates times four settings of
its own, on a seed that is not reported. AdamW is tuned and run for the full number of
steps. The others are tuned at half of it, and then run for several shares of it: what
is reported is the smallest share at which a method ends at or below AdamW's loss. Time
is that of the steps alone, measured with the programs taking turns; the time to compile
stands beside it.
"""

# Arrays, trees and flax models, which the types of jax and optax leave open.
# pyright: reportArgumentType=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import functools
import itertools
import pathlib
import shlex
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.progress
from absl import app, flags

import optax_ext as ox
from benchmarks import _optimizers, _report, _timing
from benchmarks.claims import _digits

SIZES = (64, 200, 100, 50, 8, 50, 100, 200, 64)
SHARES = (0.1, 0.125, 0.1667, 0.25, 0.333, 0.5, 0.75, 1.0)
_TUNING_SEED, _BATCH, _WARM_UP = 1000, 100, 0.05
CONTROL = "adamw"
_ADAM_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


class Method(NamedTuple):
    """A direction, the learning rates to try, and four settings of it.

    Attributes:
      label: name in tables and plots.
      make: settings -> link whose updates are directions.
      rates: learning rates.
      settings: argument -> values; their product has four elements.
      value_fn: whether it asks for the loss as a function.
    """

    label: str
    make: Callable[..., optax.GradientTransformation]
    rates: tuple[float, ...]
    settings: dict[str, tuple[float, ...]]
    value_fn: bool = False


METHODS = {
    CONTROL: Method(
        "AdamW",
        lambda b2, decay: optax.chain(
            optax.scale_by_adam(b2=b2), optax.add_decayed_weights(decay)
        ),
        _ADAM_RATES,
        {"b2": (0.95, 0.999), "decay": (0.0, 1e-2)},
    ),
    "trust_region": Method(
        "spectral trust region",
        lambda b1, b2: _optimizers.spectral(b1, optax.scale_by_adam(b2=b2)),
        (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
        {"b1": (0.9, 0.95), "b2": (0.95, 0.999)},
    ),
    "kron": Method(
        "Kron",
        lambda b1, precond_lr: ox.scale_by_kron(b1=b1, precond_lr=precond_lr),
        (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        {"b1": (0.9, 0.95), "precond_lr": (0.1, 0.5)},
    ),
    "adahessian": Method(
        "AdaHessian",
        lambda b1, b2: ox.scale_by_adahessian(b1=b1, b2=b2),
        (5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
        {"b1": (0.9, 0.95), "b2": (0.95, 0.999)},
        value_fn=True,
    ),
}


def load() -> jax.Array:
    """All digits [1797, 64], in [0, 1]."""
    return jnp.asarray(_digits.load().images)


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    keys = jax.random.split(key, len(SIZES) - 1)
    glorot = jax.nn.initializers.glorot_normal()
    return [
        {"kernel": glorot(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, itertools.pairwise(SIZES), strict=True)
    ]


def loss_fn(params: Any, images: jax.Array) -> jax.Array:
    """Squared error of an image, summed over pixels, mean over images."""
    x = images
    for k, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"]
        if k not in (len(params) // 2 - 1, len(params) - 1):  # code and output
            x = jnp.tanh(x)
    return jnp.mean(jnp.sum((x - images) ** 2, -1))


def train_step(method: Method, tx: Any, images: jax.Array) -> Callable[..., Any]:
    """One step: (params, state, key) -> (params, state), and its direction's rate."""

    def step(params, state, key, rate):
        batch = images[jax.random.randint(key, (_BATCH,), 0, len(images))]
        grads = jax.grad(loss_fn)(params, batch)
        extra = {"value_fn": lambda p: loss_fn(p, batch)} if method.value_fn else {}
        u, state = optax.with_extra_args_support(tx).update(
            grads, state, params, **extra
        )
        return jax.tree.map(lambda p, d: p - rate * d, params, u), state

    return step


def final_loss(name: str, images, seed, steps, rate, chosen) -> jax.Array:
    """The loss of all images after a number of steps."""
    method = METHODS[name]
    tx = method.make(**chosen)
    key = jax.random.key(seed)
    params = init(key)
    step = train_step(method, tx, images)
    warm = jnp.maximum(1.0, _WARM_UP * steps)

    def body(t, carry):
        now = t.astype(jnp.float32)
        rising = jnp.minimum(1.0, (now + 1) / warm)
        falling = (1 + jnp.cos(jnp.pi * now / steps)) / 2
        return step(*carry, jax.random.fold_in(key, t), rate * rising * falling)

    params, _ = jax.lax.fori_loop(0, steps, body, (params, tx.init(params)))
    loss = loss_fn(params, images)
    return jnp.where(jnp.isfinite(loss), loss, jnp.inf)


@functools.cache
def program(name: str, over: str) -> Callable[..., jax.Array]:
    """`final_loss` of many trials or of many seeds; one program for every budget."""
    axes = {"trials": (None, None, None, 0, 0), "seeds": (None, 0, None, None, None)}
    run = functools.partial(final_loss, name)
    return jax.jit(jax.vmap(run, in_axes=axes[over]))


def trials(method: Method) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Learning rates [n] and settings [n] of all trials."""
    rows = list(itertools.product(method.rates, *method.settings.values()))
    columns = [np.array(c, np.float32) for c in zip(*rows, strict=True)]
    return columns[0], dict(zip(method.settings, columns[1:], strict=True))


def tune(name: str, images: jax.Array, steps: int) -> dict[str, Any]:
    """The best trial on the tuning seed, and the losses of all."""
    rates, chosen = trials(METHODS[name])
    run = program(name, "trials")
    losses = np.asarray(run(images, _TUNING_SEED, steps, rates, chosen))
    best = int(np.argmin(losses))
    return {
        "steps": steps,
        "rate": float(rates[best]),
        "settings": {k: float(v[best]) for k, v in chosen.items()},
        "at_the_edge": bool(rates[best] in (rates.min(), rates.max())),
        "trials": {"rate": rates, **chosen, "loss": losses},
    }


def run(name: str, tuned: dict[str, Any], images, seeds: int, steps: list[int]):
    """Final losses [seeds, budgets] at the tuned setting."""
    by_seed = program(name, "seeds")
    chosen = jax.tree.map(np.float32, (tuned["rate"], tuned["settings"]))
    done = [by_seed(images, np.arange(seeds), n, *chosen) for n in steps]
    return np.stack([np.asarray(x) for x in done], axis=1)


def seconds_of_a_step(tuned: dict[str, Any], images, repeats: int) -> dict[str, Any]:
    """Time of a training step over AdamW's, alternating; and the time to compile."""
    calls, compiled = {}, {}
    for name, found in tuned.items():
        method = METHODS[name]
        tx = method.make(**found["settings"])
        step = train_step(method, tx, images)
        params = init(jax.random.key(0))
        carry = params, tx.init(params)

        def several(params, state, step=step):
            def body(t, at):
                return step(*at, jax.random.fold_in(jax.random.key(0), t), 1e-6)

            return jax.lax.fori_loop(0, 20, body, (params, state))

        started = time.perf_counter()
        program = jax.jit(several).lower(*carry).compile()
        compiled[name] = time.perf_counter() - started
        calls[name] = functools.partial(program, *carry)
    measured = {}
    for name, call in calls.items():
        ratio = _timing.alternate(call, calls[CONTROL], repeats)
        measured[name] = {
            "over_adamw": ratio.median,
            "quartiles": [ratio.low, ratio.high],
            "seconds": ratio.first_seconds / 20,
            "compile_seconds": compiled[name],
        }
    return measured


def judge(losses: dict[str, np.ndarray], steps: list[int]) -> dict[str, Any]:
    """For each method and seed, how many times fewer steps end at AdamW's loss."""
    target = losses[CONTROL][:, -1]
    judged = {}
    for name, found in losses.items():
        reached = found <= target[:, None]
        first = [steps[int(np.argmax(r))] if r.any() else np.inf for r in reached]
        judged[name] = {"times_fewer_steps": [steps[-1] / n for n in first]}
    return judged


def plot(path: pathlib.Path, losses: dict[str, np.ndarray], steps: list[int]) -> None:
    figure = matplotlib.figure.Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for at, (name, found) in enumerate(losses.items()):
        axes.plot(steps, found.mean(0), "o-", color=f"C{at}", label=METHODS[name].label)
        band = {"color": f"C{at}", "alpha": 0.15, "lw": 0}
        axes.fill_between(steps, found.min(0), found.max(0), **band)
    axes.axhline(losses[CONTROL][:, -1].mean(), color="0.4", lw=0.8, ls=":")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="steps of a run (the learning rate falls to zero in each)",
        ylabel="squared error of an image at the end",
        title="Deep autoencoder: mean and range of seeds; dotted: AdamW's longest run",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {shlex.join(argv[1:])}")
    given = flags.FLAGS
    short = given["short"].value
    longest: Any = 40 if short else given["steps"].value
    seeds = 2 if short else given["seeds"].value
    steps = sorted({max(2, round(share * longest)) for share in SHARES})
    started = time.perf_counter()
    environment, console = _report.environment(), _report.console()
    images = load()
    tuned, losses = {}, {}
    for name in rich.progress.track(METHODS, "Methods", console=console):
        tuned[name] = tune(name, images, longest if name == CONTROL else longest // 2)
        losses[name] = run(name, tuned[name], images, seeds, steps)
    judged = judge(losses, steps)
    times = seconds_of_a_step(tuned, images, 4 if short else 12)
    rows = []
    for name, method in METHODS.items():
        fewer = np.array(judged[name]["times_fewer_steps"])
        judged[name]["times_less_time"] = (fewer / times[name]["over_adamw"]).tolist()
        rows.append(
            (
                method.label,
                f"{tuned[name]['rate']:g}{'*' if tuned[name]['at_the_edge'] else ''}",
                ", ".join(f"{k} {v:g}" for k, v in tuned[name]["settings"].items()),
                _range(losses[name][:, -1], ".3f"),
                _range(fewer, ".1f"),
                f"{times[name]['over_adamw']:.2f}",
                _range(fewer / times[name]["over_adamw"], ".2f"),
                f"{times[name]['compile_seconds']:.1f}",
            )
        )
    columns = "method,rate (* edge of grid),settings,loss at the end,times fewer steps,"
    columns += "time of a step over AdamW's,times less time,s to compile"
    title = f"Steps to AdamW's loss after {longest}: mean (least, greatest) of {seeds}"
    _report.print_table(console, f"{title} seeds", columns.split(","), rows)
    output = pathlib.Path(given["output"].value, "autoencoder")
    plot(output.with_suffix(".png"), losses, steps)
    result = {
        "command": shlex.join(
            ["python", "-m", "benchmarks.claims.autoencoder", *sys.argv[1:]]
        ),
        "wall_seconds": time.perf_counter() - started,
        **environment,
        "sizes": SIZES,
        "steps": steps,
        "seeds": list(range(seeds)),
        "tuned": tuned,
        "losses": losses,
        "judged": judged,
        "times": times,
    }
    _report.write_json(output.with_suffix(".json"), _digits.to_lists(result))
    console.print(
        f"Results: {output}.*, {result['wall_seconds']:.0f} s in all", highlight=False
    )
    return 0


def _range(values: np.ndarray, form: str) -> str:
    values = np.asarray(values)
    return f"{values.mean():{form}} ({values.min():{form}}, {values.max():{form}})"


def define_flags() -> None:
    flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1)
    flags.DEFINE_integer("steps", 3000, "Steps of AdamW's run.", lower_bound=20)
    flags.DEFINE_boolean("short", False, "Small numbers: does everything work?")
    flags.DEFINE_string("output", "benchmarks/results/claims", "Folder of the results.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
