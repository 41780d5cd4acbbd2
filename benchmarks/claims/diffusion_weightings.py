"""Weightings of the diffusion loss on 8x8 digits: do they do what their papers say?

    python -m benchmarks.claims.diffusion_weightings             # five seeds, minutes
    python -m benchmarks.claims.diffusion_weightings --short     # does everything work?

One small network, one data set, one number of steps; what changes is the weight of each
noise level, and all is done twice, for a network that predicts the noise and for one
that predicts v. The learning rate of each weighting is the one that is best for its own
objective on digits kept for that, with a seed of its own. Every claim is a difference
to its control, seed by seed, on digits that training never sees: two distances of
samples from data, and the likelihood bound.
"""

import functools
import itertools
import pathlib
import shlex
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
import scipy.stats
from absl import app, flags

from benchmarks import _report
from benchmarks.claims import _diffusion_figure
from benchmarks.claims import _digits_diffusion as dd

_SHORT = {"seeds": 2, "steps": 30, "samples": 64, "sampler_steps": 8, "draws": 2}
_RATES = (3e-3, 1e-2, 3e-2)
_TUNING_SEED = 1000

METRICS = {
    "frechet": "frechet: of features",
    "sliced": "sliced: of pixels",
    "bound": "bound: nats a pixel",
}


class Claim(NamedTuple):
    """That one weighting has less of a metric than another, with its paper."""

    paper: str
    weighting: str
    control: str
    metrics: tuple[str, ...]


_QUALITY = ("frechet", "sliced")
CLAIMS = (
    Claim("2204.00227", "p2", "eps", _QUALITY),
    Claim("2310.08442", "debiased", "eps", _QUALITY),
    Claim("2310.08442", "debiased", "p2", _QUALITY),
    Claim("2303.00848", "sigmoid_adaptive", "eps_adaptive", _QUALITY),
    Claim("2303.00848", "sigmoid_adaptive", "v_adaptive", _QUALITY),
    Claim("2303.00848", "sigmoid_adaptive", "elbo_adaptive", _QUALITY),
    Claim("2303.00848", "elbo_adaptive", "eps_adaptive", ("bound",)),
    Claim("2303.00848", "elbo_adaptive", "sigmoid_adaptive", ("bound",)),
    Claim("2303.00848", "elbo_adaptive", "elbo", ("bound",)),
)


def tune(method: dd.Method, digits: dd.Digits, settings: dict[str, Any]) -> float:
    """The peak learning rate with the least weighted loss on the tuning digits."""
    keys = jnp.stack([jax.random.key(_TUNING_SEED)] * len(_RATES))
    rates = jnp.array(_RATES)
    params = dd.train(keys, rates, method, digits.train, settings["steps"])
    key = jax.random.key(_TUNING_SEED + 1)
    own, _ = dd.held_out(params, method, digits.tune, key, settings["draws"])
    return _RATES[int(np.nanargmin(own))]


def run_weighting(
    method: dd.Method,
    digits: dd.Digits,
    features: dd.Features,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Tunes, trains and measures one weighting, for all seeds at once."""
    started = time.perf_counter()
    seeds = settings["seeds"]
    rate = tune(method, digits, settings)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    params = dd.train(
        keys, jnp.full(seeds, rate), method, digits.train, settings["steps"]
    )
    test_key = jax.random.key(_TUNING_SEED + 2)
    _, bound = dd.held_out(params, method, digits.test, test_key, settings["draws"])
    errors = dd.error_by_level(params, method, digits.test, _levels(), test_key)
    samples = np.asarray(
        dd.draw_samples(
            params, method, keys, settings["samples"], settings["sampler_steps"]
        )
    )
    test = digits.test[: settings["samples"]]
    data = features.of(digits.test)
    return {
        "rate": rate,
        "frechet": [dd.frechet_distance(features.of(x), data) for x in samples],
        "sliced": [dd.sliced_distance(x, test) for x in samples],
        "bound": np.asarray(bound, np.float64).tolist(),
        "errors": np.asarray(errors, np.float64).tolist(),
        "samples": samples[0, :12],
        "seconds": time.perf_counter() - started,
    }


def _levels() -> jax.Array:
    return jnp.linspace(-dd.LOGSNR_LIMIT + 1, dd.LOGSNR_LIMIT - 1, 19)


def judge(network: str, runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every claim on all its metrics: the paired difference and a verdict.

    "shown" and "refuted" where the 95% interval of the mean difference over seeds lies
    on one side of 0, "open" where it holds 0.
    """
    judged = []
    for claim in CLAIMS:
        for metric in claim.metrics:
            ours, control = (
                np.array(runs[name][metric])
                for name in (claim.weighting, claim.control)
            )
            gaps = ours - control
            mean, error = gaps.mean(), gaps.std(ddof=1) / len(gaps) ** 0.5
            half = float(scipy.stats.t.ppf(0.975, len(gaps) - 1) * error)
            low, high = float(mean - half), float(mean + half)
            verdict = "shown" if high < 0 else "refuted" if low > 0 else "open"
            judged.append(
                {
                    "paper": claim.paper,
                    "network": network,
                    "weighting": claim.weighting,
                    "control": claim.control,
                    "metric": metric,
                    "difference": float(mean),
                    "interval": [low, high],
                    "relative": float(mean / control.mean()),
                    "seeds_better": int((gaps < 0).sum()),
                    "verdict": verdict,
                }
            )
    return judged


def print_results(console, runs, floor, judged) -> None:
    """The table of weightings and that of claims."""

    def cell(values: list[float]) -> str:
        return f"{np.mean(values):.3g} ({min(values):.3g}, {max(values):.3g})"

    rows = [
        (name, network, f"{run['rate']:g}", *(cell(run[metric]) for metric in METRICS))
        for network, of_network in runs.items()
        for name, run in of_network.items()
    ]
    reached = [f"{floor[metric]:.3g}" for metric in _QUALITY]
    rows.append(("training digits", "", "", *reached, ""))
    columns = ["weighting", "network", "rate", *METRICS.values()]
    title = "Mean over seeds (least, greatest); less is better"
    _report.print_table(console, title, columns, rows)
    rows = [
        (
            c["paper"],
            f"{c['weighting']} < {c['control']}",
            c["network"],
            c["metric"],
            "{:+.2g} ({:+.2g}, {:+.2g})".format(c["difference"], *c["interval"]),
            f"{c['relative']:+.0%}",
            c["verdict"],
        )
        for c in judged
    ]
    columns = "paper,claim,network,metric,difference (95%),relative,verdict"
    title = "Claims: difference to the control, seed by seed"
    _report.print_table(console, title, columns.split(","), rows)


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {shlex.join(argv[1:])}")
    settings = _settings()
    started = time.perf_counter()
    environment = _report.environment()
    console = _report.console()
    digits = dd.load()
    features = dd.classifier(digits, 100 if settings["short"] else 1500)
    count = settings["samples"]
    floor = {
        "frechet": dd.frechet_distance(
            features.of(digits.train[:count]), features.of(digits.test)
        ),
        "sliced": dd.sliced_distance(digits.train[:count], digits.test[:count]),
    }
    track = functools.partial(
        rich.progress.track, console=console, disable=not console.is_terminal
    )
    runs: dict[str, dict[str, Any]] = {network: {} for network in dd.NETWORKS}
    methods = list(itertools.product(enumerate(dd.NETWORKS), enumerate(dd.WEIGHTINGS)))
    for (i, network), (j, name) in track(methods, "Weightings"):
        run = run_weighting(dd.Method(i, j), digits, features, settings)
        runs[network][name] = run
    judged = [c for network in runs for c in judge(network, runs[network])]
    print_results(console, runs, floor, judged)

    output = pathlib.Path(str(flags.FLAGS["output"].value), "diffusion_weightings")
    device = environment["device"]
    _diffusion_figure.plot(
        output.with_suffix(".png"),
        runs,
        floor,
        digits.test[:12],
        np.asarray(_levels()),
        f"Weightings of the diffusion loss on 8x8 digits: {settings['seeds']} seeds, "
        f"{settings['steps']} steps, on {device['processor']}",
    )
    command = ["python", "-m", "benchmarks.claims.diffusion_weightings", *sys.argv[1:]]
    result = {
        "command": shlex.join(command),
        "wall_seconds": time.perf_counter() - started,
        **environment,
        "settings": {**settings, "learning_rates": _RATES},
        "classifier_accuracy": features.accuracy,
        "training_digits": floor,
        "log_snrs": np.asarray(_levels(), np.float64).tolist(),
        "networks": {
            network: {
                name: {key: value for key, value in run.items() if key != "samples"}
                for name, run in of_network.items()
            }
            for network, of_network in runs.items()
        },
        "claims": judged,
    }
    _report.write_json(output.with_suffix(".json"), result)
    console.print(
        f"Results: {output}.*, {result['wall_seconds']:.0f} s", highlight=False
    )
    return 0


def define_flags() -> None:
    """The flags, with what ``--short`` makes of them in their help."""
    define = functools.partial(flags.DEFINE_integer, lower_bound=1)
    flags.DEFINE_integer("seeds", 5, "Number of seeds, 2 or more.", lower_bound=2)
    define("steps", 3000, "Steps of training.")
    define("samples", 500, "Images drawn a seed, at most 500.", upper_bound=500)
    define("sampler_steps", 64, "Steps of the sampler.")
    define("draws", 30, "Draws of noise a held-out image.")
    flags.DEFINE_string("output", "benchmarks/results/claims", "Folder of the results.")
    flags.DEFINE_boolean("short", False, "Small numbers: does everything work?")


def _settings() -> dict[str, Any]:
    """Settings from the flags; ``--short`` changes those that are not given."""
    short = flags.FLAGS["short"].value
    return {
        "short": short,
        **{
            name: small
            if short and not flags.FLAGS[name].present
            else flags.FLAGS[name].value
            for name, small in _SHORT.items()
        },
    }


if __name__ == "__main__":
    define_flags()
    app.run(main)
