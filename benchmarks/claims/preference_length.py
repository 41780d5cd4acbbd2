r"""Does SimPO keep answers short where raters favour long ones? DPO is the control.

    python -m benchmarks.claims.preference_length           # five seeds, about a minute
    python -m benchmarks.claims.preference_length --short   # seconds: does it work?

The world: answers are Markov chains of eight tokens, each with a quality in [-1, 1],
and end after any token with the same chance, so that length says nothing of quality. A
reference policy is fitted to answers of the world. Raters compare two of its answers by

    score = mean quality + bias * length        (each in standard deviations),

and prefer the first with chance sigmoid(difference of scores). With a bias above 0,
what is preferred is longer for a reason unrelated to quality. DPO and SimPO then start
at the reference and see the same pairs in the same order, with their default
hyper-parameters and one optimizer. A third method shows what the difference is due to:
SimPO with sums in place of means over tokens (its beta divided by the mean length).

Mean length and quality of a policy's answers are exact: the policy is a Markov chain.
The claim is shown at a bias if no seed's answers get longer, refuted if all do.
"""

import functools
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import rich.console
from absl import app, flags

import optax_ext as ox
from benchmarks import _report

# name: default, value of --short, help.
_FLAGS: dict[str, tuple[Any, Any, str]] = {
    "seeds": (5, 2, "Number of seeds."),
    "pairs": (4096, 256, "Preference pairs."),
    "steps": (600, 40, "Steps of training."),
    "batch": (64, 32, "Pairs a step."),
    "learning_rate": (1e-2, 1e-2, "Adam's, for all methods."),
    "output": ("benchmarks/results/claims", "benchmarks/results/claims", "Folder."),
}
METHODS = {"dpo": "DPO", "simpo": "SimPO", "simpo_sum": "SimPO with sums"}
BIASES = (0.0, 0.25, 0.5, 1.0)
POINTS = 20  # of the curves, besides the start
VOCABULARY, LONGEST, END_CHANCE = 8, 48, 0.1
START = END = VOCABULARY  # the row of the first token; the column of the last
QUALITY = jnp.linspace(-1.0, 1.0, VOCABULARY)
_DPO_BETA, _SIMPO_BETA, _SIMPO_GAMMA = 0.1, 2.0, 0.5
_COLORS = {"dpo": "C1", "simpo": "C0", "simpo_sum": "0.55"}


def rows(policy: jax.Array, previous: jax.Array) -> jax.Array:
    """Logits after each token; an answer has one token at least."""
    return policy.at[START, END].set(-1e9)[previous]


def previous_tokens(tokens: jax.Array) -> jax.Array:
    return jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=START)


def sample(policy: jax.Array, key: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """Tokens [count, LONGEST], and which of them belong to the answer, its end too."""

    def step(carry, key):
        previous, going = carry
        token = jax.random.categorical(key, rows(policy, previous))
        token = jnp.where(going, token, END)
        return (token, going & (token != END)), (token, going)

    start = jnp.full(count, START), jnp.ones(count, bool)
    _, (tokens, where) = jax.lax.scan(step, start, jax.random.split(key, LONGEST))
    return tokens.T, where.T


def measure(tokens: jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Length of each answer, and the mean quality of its tokens."""
    content = where & (tokens != END)
    length = content.sum(1)
    quality = jnp.append(QUALITY, 0.0)[tokens] * content
    return length.astype(float), quality.sum(1) / length


def expected(policy: Any) -> tuple[jax.Array, jax.Array]:
    """Mean length of a policy's answers and mean quality of their tokens, exactly."""
    chances = jax.nn.softmax(rows(policy, jnp.arange(VOCABULARY + 1)))[:, :VOCABULARY]

    def step(at, _):
        then = at @ chances
        return jnp.append(then, 0.0), then

    _, visits = jax.lax.scan(step, jax.nn.one_hot(START, END + 1), length=LONGEST)
    total = visits.sum(0)
    return total.sum(), total @ QUALITY / total.sum()


def make_world(key: jax.Array) -> jax.Array:
    chain = jax.nn.log_softmax(jax.random.normal(key, (VOCABULARY + 1, VOCABULARY)))
    ends = jnp.full((VOCABULARY + 1, 1), jnp.log(END_CHANCE))
    return jnp.concatenate([chain + jnp.log1p(-END_CHANCE), ends], axis=1)


def fit(tokens: jax.Array, where: jax.Array) -> jax.Array:
    """The policy of greatest likelihood, with a tenth of a count everywhere."""
    size = VOCABULARY + 1
    counts = jnp.full((size, size), 0.1)
    counts = counts.at[previous_tokens(tokens), tokens].add(where.astype(float))
    return jnp.log(counts / counts.sum(1, keepdims=True))


def make_pairs(
    reference: jax.Array, key: jax.Array, bias: jax.Array, count: int
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Chosen and rejected answers, [count, LONGEST] each, and what they are like."""
    draw, rate = jax.random.split(key)
    answers = sample(reference, draw, 2 * count)
    length, quality = measure(*answers)
    score = quality / quality.std() + bias * (length / length.std())
    first, second = score[:count], score[count:]
    won = jax.random.bernoulli(rate, jax.nn.sigmoid(first - second))
    at = jnp.arange(count)
    index = {
        "chosen": jnp.where(won, at, at + count),
        "rejected": jnp.where(won, at + count, at),
    }
    pairs = {name: (answers[0][i], answers[1][i]) for name, i in index.items()}
    lengths = {name: length[i] for name, i in index.items()}
    unequal = lengths["chosen"] != lengths["rejected"]
    longer = (lengths["chosen"] > lengths["rejected"]).sum() / unequal.sum()
    about = {"chosen_longer": longer}
    for name, i in index.items():
        about |= {f"{name}_length": length[i].mean()}
        about |= {f"{name}_quality": quality[i].mean()}
    return pairs, about


@functools.partial(jax.jit, static_argnames=("method", "settings"))
def train(
    key: jax.Array, bias: jax.Array, *, method: str, settings: tuple
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Curves [POINTS + 1] of length and quality, and what the pairs were like."""
    count, steps, batch, learning_rate = settings
    world_key, fit_key, pair_key, order = jax.random.split(key, 4)
    reference = fit(*sample(make_world(world_key), fit_key, count))
    pairs, about = make_pairs(reference, pair_key, bias, count)
    tx = optax.adam(learning_rate)
    beta = _SIMPO_BETA / (1 if method == "simpo" else 1 / END_CHANCE)

    def log_probs(policy, tokens, where):
        return ox.losses.sequence_log_probs(
            rows(policy, previous_tokens(tokens)),
            tokens,
            where=where,
            average=method == "simpo",
        )

    def loss_fn(policy, index):
        answers = [[x[index] for x in pairs[name]] for name in ("chosen", "rejected")]
        now = [log_probs(policy, *answer) for answer in answers]
        if method == "dpo":
            before = [log_probs(reference, *answer) for answer in answers]
            return ox.losses.dpo_loss(*now, *before, beta=_DPO_BETA).mean()
        return ox.losses.simpo_loss(*now, beta=beta, gamma=_SIMPO_GAMMA).mean()

    def step(carry, index):
        policy, state = carry
        grads = jax.grad(loss_fn)(policy, index)
        updates, state = tx.update(grads, state, policy)
        return (optax.apply_updates(policy, updates), state), None

    def stretch(carry, indices):
        carry, _ = jax.lax.scan(step, carry, indices)
        return carry, expected(carry[0])

    indices = jax.random.randint(order, (POINTS, steps // POINTS, batch), 0, count)
    _, after = jax.lax.scan(stretch, (reference, tx.init(reference)), indices)
    curves = [
        jnp.append(x[None], y) for x, y in zip(expected(reference), after, strict=True)
    ]
    return dict(zip(("length", "quality"), curves, strict=True)), about


def run(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Curves [biases, seeds, points] by method, and the pairs [biases, seeds]."""
    keys = jax.vmap(jax.random.key)(jnp.arange(settings["seeds"]))
    names = ("pairs", "steps", "batch", "learning_rate")
    fixed = tuple(settings[name] for name in names)
    curves, about = {}, {}
    for method in METHODS:
        one = functools.partial(train, method=method, settings=fixed)
        by_seed = jax.vmap(one, in_axes=(0, None))
        done = [by_seed(keys, jnp.float32(bias)) for bias in BIASES]
        arrays = jax.tree.map(lambda *x: np.stack(x).astype(float), *done)
        curves[method], about = arrays
    return curves, about


def length_at(quality: float, curve: dict[str, np.ndarray]) -> float:
    """The length at which a quality is first reached; NaN if it never is."""
    length, reached = curve["length"], curve["quality"]
    at = int(np.argmax(reached >= quality))
    if reached[at] < quality:
        return np.nan
    if at == 0:
        return float(length[0])
    part = (quality - reached[at - 1]) / (reached[at] - reached[at - 1])
    return float(length[at - 1] + part * (length[at] - length[at - 1]))


def judge(curves: dict[str, Any]) -> list[dict[str, Any]]:
    """For each bias: how lengths grew, and what that says of the claim."""
    judged = []
    for at, bias in enumerate(BIASES):
        line: dict[str, Any] = {"bias": bias}
        of_bias = {
            method: {name: x[at] for name, x in curve.items()}
            for method, curve in curves.items()
        }
        both = (of_bias[method]["quality"] for method in ("dpo", "simpo"))
        common = min(quality.mean(0).max() for quality in both)
        line["common_quality"] = common
        for method, curve in of_bias.items():
            growth = curve["length"][:, -1] / curve["length"][:, 0] - 1
            means = {name: x.mean(0) for name, x in curve.items()}
            line[method] = {
                "growth": growth,
                "seeds_grown": int((growth > 0).sum()),
                "length_at_common_quality": length_at(common, means),
            }
        grown, seeds = line["simpo"]["seeds_grown"], len(line["simpo"]["growth"])
        line["claim"] = {0: "shown", seeds: "refuted"}.get(grown, "mixed")
        line["seeds_shorter_than_dpo"] = int(
            (line["simpo"]["growth"] < line["dpo"]["growth"]).sum()
        )
        judged.append(line)
    return judged


def show(console: rich.console.Console, curves, about, judged) -> None:
    """The table, and the verdict at each bias."""

    def cell(values: np.ndarray) -> str:
        return f"{values.mean():.1f} ({values.min():.1f}, {values.max():.1f})"

    lines = []
    for at, line in enumerate(judged):
        for method, label in METHODS.items():
            length, quality = (curves[method][x][at] for x in ("length", "quality"))
            lines.append(
                (
                    label,
                    f"{line['bias']:g}",
                    f"{100 * about['chosen_longer'][at].mean():.0f}%",
                    f"{length[:, 0].mean():.1f}",
                    cell(length[:, -1]),
                    f"{100 * line[method]['growth'].mean():+.0f}%",
                    f"{quality[:, -1].mean():.2f}",
                    f"{line[method]['length_at_common_quality']:.1f}",
                )
            )
    seeds = len(judged[0]["simpo"]["growth"])
    title = f"Mean length and quality of answers; mean (least, greatest) of {seeds} "
    title += "seeds. Equal quality: the best that both DPO and SimPO reach"
    columns = "method,bias,longer wins,length,length after,growth,quality after,"
    columns = f"{columns}at equal quality".split(",")
    _report.print_table(console, title, columns, lines)
    for line in judged:
        console.print(
            f"Bias {line['bias']:g}: 'SimPO does not grow length' is "
            f"{line['claim'].upper()}: {line['simpo']['seeds_grown']} of {seeds} seeds "
            f"grow, DPO {line['dpo']['seeds_grown']}. SimPO grows less than DPO in "
            f"{line['seeds_shorter_than_dpo']} of {seeds}.",
            highlight=False,
        )


def plot(path: pathlib.Path, curves, about, steps: int, title: str) -> None:
    """Length over training above, length against quality below; a column a bias."""
    figure = matplotlib.figure.Figure(figsize=(14, 7.2), layout="constrained")
    above, below = figure.subplots(2, len(BIASES), sharey="row")
    x = np.linspace(0, steps, POINTS + 1)
    for at, bias in enumerate(BIASES):
        for method, label in METHODS.items():
            length, quality = (curves[method][n][at] for n in ("length", "quality"))
            style = {"color": _COLORS[method], "label": label, "lw": 1.8}
            style["ls"] = "--" if method == "simpo_sum" else "-"
            above[at].plot(x, length.mean(0), **style)
            band = {"color": style["color"], "alpha": 0.18, "lw": 0}
            above[at].fill_between(x, length.min(0), length.max(0), **band)
            below[at].plot(length.mean(0), quality.mean(0), **style)
            end = length[:, -1].mean(), quality[:, -1].mean()
            below[at].plot(*end, "o", color=style["color"])
        start = [curves["simpo"][n][at, :, 0].mean() for n in ("length", "quality")]
        above[at].axhline(start[0], color="k", lw=0.8, ls=":")
        below[at].axvline(start[0], color="k", lw=0.8, ls=":")
        share = 100 * about["chosen_longer"][at].mean()
        heading = f"bias {bias:g}: the longer answer wins {share:.0f}%"
        above[at].set(title=heading, xlabel="step")
        below[at].set(xlabel="mean length of answers, tokens")
    above[0].set(ylabel="mean length of answers, tokens")
    below[0].set(ylabel="mean quality of their tokens")
    below[0].legend(frameon=False, loc="upper right")
    for axes in (*above, *below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {shlex.join(argv[1:])}")
    settings = _settings()
    if settings["steps"] % POINTS:
        raise app.UsageError(f"--steps must be a multiple of {POINTS}")
    started = time.perf_counter()
    environment = _report.environment()
    console = _report.console()
    curves, about = run(settings)
    judged = judge(curves)
    show(console, curves, about, judged)

    output = pathlib.Path(settings["output"], "preference_length")
    title = "DPO and SimPO where raters favour long answers: mean and range of "
    title += f"{settings['seeds']} seeds; dotted: the reference policy"
    plot(output.with_suffix(".png"), curves, about, settings["steps"], title)
    module = "benchmarks.claims.preference_length"
    result = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "wall_seconds": time.perf_counter() - started,
        **environment,
        "settings": settings,
        "hyperparameters": {
            "dpo": {"beta": _DPO_BETA},
            "simpo": {"beta": _SIMPO_BETA, "gamma": _SIMPO_GAMMA},
            "simpo_sum": {"beta": _SIMPO_BETA * END_CHANCE, "gamma": _SIMPO_GAMMA},
        },
        "seeds": list(range(settings["seeds"])),
        "biases": list(BIASES),
        "steps": np.linspace(0, settings["steps"], POINTS + 1).tolist(),
        **_to_lists({"pairs": about, "claims": judged, "curves": curves}),
    }
    _report.write_json(output.with_suffix(".json"), result)
    console.print(
        f"Results: {output}.*, {result['wall_seconds']:.0f} s in all", highlight=False
    )
    return 0


def _to_lists(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.tolist() if hasattr(x, "tolist") else x, tree)


def define_flags() -> None:
    """One flag for every line of the table, and ``--short``."""
    define = {
        int: functools.partial(flags.DEFINE_integer, lower_bound=1),
        float: functools.partial(flags.DEFINE_float, lower_bound=0.0),
        str: flags.DEFINE_string,
    }
    for name, (default, _, text) in _FLAGS.items():
        define[type(default)](name, default, text)
    flags.DEFINE_boolean("short", False, "Small numbers: does everything work?")


def _settings() -> dict[str, Any]:
    """Settings from the flags; ``--short`` changes those that are not given."""
    short = flags.FLAGS["short"].value
    return {
        name: small
        if short and not flags.FLAGS[name].present
        else flags.FLAGS[name].value
        for name, (_, small, _) in _FLAGS.items()
    }


if __name__ == "__main__":
    define_flags()
    app.run(main)
