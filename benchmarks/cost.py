"""What an update costs: every link and optimizer against optax's nearest rule.

    python -m benchmarks.cost [--methods=lion_k,diffgrad] [--repeats=40]

For every method of the catalogue that needs nothing but gradients and parameters, on
one tree of 64 MB: the bytes of state a parameter, the bytes that the compiled update
moves over the least possible (gradient and update, parameter if it is needed, state
read and written, each once), and its time over that of optax's nearest rule with as
many slots of state and over that of a plain copy of the least possible bytes. Each pair
of programs runs in turn in one process; the ratio is the median of neighbours, with its
quartiles.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from jax.extend.core import jaxprs_in_params

from benchmarks import _report, _timing
from optax_ext._core import catalogue

_METHODS = flags.DEFINE_list("methods", [], "Names; by default the whole catalogue.")
_REPEATS = flags.DEFINE_integer("repeats", 40, "Timed pairs of calls.", lower_bound=4)
_SIDE = flags.DEFINE_integer("side", 2048, "Rows and columns of each of 4 matrices.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results", "Folder of the JSON.")

_RATE = 1e-3

_NEAREST_LINK: dict[int, Callable[[], Any]] = {
    0: lambda: optax.add_decayed_weights(0.1),
    1: lambda: optax.trace(0.9),
    2: lambda: optax.scale_by_adam(),
    3: lambda: optax.contrib.scale_by_ademamix(),
}
_NEAREST_OPTIMIZER: dict[int, Callable[[], Any]] = {
    0: lambda: optax.sgd(_RATE),
    1: lambda: optax.chain(
        optax.trace(0.9),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(_RATE),
    ),
    2: lambda: optax.adamw(_RATE),
    3: lambda: optax.contrib.ademamix(_RATE),
}
_NEAREST: dict[str, Callable[[], Any]] = {
    "scale_by_lion_k": lambda: optax.scale_by_lion(),
    "lion_k": lambda: optax.lion(_RATE),
    "lion_cwd": lambda: optax.lion(_RATE),
}
"""Where optax has the same rule or a nearer one than slots tell."""

_MIXING = ("reduce_sum", "reduce_max", "reduce_min", "dot_general", "sort", "top_k")


def peer(entry: catalogue.Entry) -> Any:
    """Optax's nearest rule with as many slots."""
    by_slots = _NEAREST_LINK if entry.kind == "link" else _NEAREST_OPTIMIZER
    return _NEAREST.get(entry.name, by_slots[min(3, round(entry.slots or 0))])()


def is_elementwise(tx: Any) -> bool:
    """Whether no entry of the update depends on another entry's gradient."""
    leaf = jnp.ones((4, 3))
    program = jax.make_jaxpr(tx.update)(leaf, tx.init(leaf), leaf)

    def primitives(jaxpr):
        for equation in jaxpr.eqns:
            yield equation.primitive.name
            for part in jaxprs_in_params(equation.params):
                yield from primitives(part)

    return not set(primitives(program.jaxpr)) & set(_MIXING)


def measured() -> list[catalogue.Entry]:
    """The methods to measure.

    Raises:
      ValueError: for a name that is not in the catalogue, or that needs more.
    """
    fit = {
        entry.name: entry
        for entry in catalogue.entries("link", "optimizer")
        if set(entry.needs) <= {"params"}
    }
    for name in _METHODS.value:
        if catalogue.find(name).name not in fit:
            raise ValueError(f"{name} needs more than gradients and parameters")
    return [fit[name] for name in _METHODS.value or fit]


def row(entry: catalogue.Entry, params: Any, copy_of: Callable) -> dict[str, Any]:
    """All figures of one method."""
    ours = optax.with_extra_args_support(entry.make(**entry.example()))
    theirs = peer(entry)
    programs = [_timing.compiled_update(tx, params) for tx in (ours, theirs)]
    size = _bytes(params)
    state, its_state = (_bytes(program.carried[1]) for program in programs)
    least = 2 * size + 2 * state + ("params" in entry.needs) * size
    mine, its = (_timing.repeating(program) for program in programs)
    against_peer = _timing.alternate(mine, its, _REPEATS.value)
    against_copy = _timing.alternate(mine, copy_of(least), _REPEATS.value // 2)
    return {
        "method": entry.name,
        "kind": entry.kind,
        "elementwise": is_elementwise(ours),
        "state bytes a parameter": 4 * state / size,
        "peer state bytes a parameter": 4 * its_state / size,
        "bytes over least": programs[0].bytes_moved / least,
        "time over peer": against_peer.median,
        "time over peer, quartiles": [against_peer.low, against_peer.high],
        "time over copy": against_copy.median,
        "step ms": 1e3 * against_peer.first_seconds,
        "compile s": programs[0].seconds,
    }


def _bytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def copies(total: int) -> Callable[[], Any]:
    """One pass that reads and writes `total` bytes together, over its last result."""
    source = jnp.ones((total // 8,), jnp.float32)
    written = jnp.zeros_like(source)
    negate = jax.jit(lambda old, x: -x, donate_argnums=0, keep_unused=True)

    def call():
        nonlocal written
        written = negate(written, source)
        return written

    return call


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(f"{x:.2f}" for x in value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    columns = list(results["rows"][0])
    rows = [[_text(row[column]) for column in columns] for row in results["rows"]]
    return f"""# Cost of an update

`python -m benchmarks.cost`, on {results["tree"]} of float32. {_report.where(results)}

*Least* bytes: gradient and update, the parameter if the method needs it, state read
and written, each once. *Peer*: optax's nearest rule with as many slots. *Copy*: one
pass over as many bytes as the least. Times are medians of neighbours in one process, in
turn.

{_report.markdown(columns, rows)}
"""


def main(argv: list[str]) -> None:
    """Measure, print, keep."""
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    side = _SIDE.value
    params = {
        f"w{i}": jnp.linspace(-1.0, 1.0, side**2).reshape(side, side) for i in "0123"
    }
    results = {
        **_report.environment(),
        "tree": f"4 leaves of {side}x{side}",
        "rows": [],
    }
    console = _report.console()
    for entry in measured():
        results["rows"].append(row(entry, params, copies))
        console.print(f"{len(results['rows'])} {entry.name}", highlight=False)
    columns = ("method", "elementwise", "bytes over least", "time over peer")
    columns = (*columns, "time over peer, quartiles", "time over copy", "step ms")
    table = [[_text(each[c]) for c in columns] for each in results["rows"]]
    _report.print_table(console, "Cost of an update", columns, table)
    path = pathlib.Path(_OUTPUT.value) / "cost.json"
    _report.write_json(path, results)
    path.with_suffix(".md").write_text(_markdown(results))
    console.print(path)


if __name__ == "__main__":
    app.run(main)
