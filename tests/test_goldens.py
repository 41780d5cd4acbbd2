"""Every golden file, replayed: trajectories and values of independent implementations.

The files are those below the folders in the environment variable OPTAX_EXT_GOLDENS
(separated as in PATH; by default tests/goldens, whose README says what is in a file).
Each is replayed by evaluating the call that it holds, one test a file. A file whose
methods are not there yet is an expected failure that names them; a file whose methods
are there and that nothing here can replay is a failure.
"""

import ast
import builtins
import dataclasses
import functools
import inspect
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import optax_ext as ox
from tests import golden_adapters as adapters

HERE = pathlib.Path(__file__).parent / "goldens"
FOLDERS = os.environ.get("OPTAX_EXT_GOLDENS", str(HERE)).split(os.pathsep)

Names = Mapping[str, Any]
Comparison = tuple[str, Any, Any]
"""What is compared, our value, the file's value."""


class NotReplayedError(AssertionError):
    """No replay fits a file."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file: its arrays by key, and its meta."""

    arrays: Mapping[str, np.ndarray]
    meta: Mapping[str, Any]

    @classmethod
    def load(cls, path: pathlib.Path) -> "Golden":
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        return cls(arrays, json.loads(str(arrays.pop("meta"))))

    def flat(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays below a prefix, by the rest of their key."""
        start = len(prefix) + 1
        below = (key for key in self.arrays if key.startswith(prefix + "/"))
        return {key[start:]: self.arrays[key] for key in below}

    def tree(self, prefix: str) -> dict[str, Any]:
        """The same as nested dicts of jax arrays; text as str."""
        tree: dict[str, Any] = {}
        for key, value in self.flat(prefix).items():
            *folders, leaf = key.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[leaf] = str(value) if value.dtype.kind in "US" else jnp.asarray(value)
        return tree

    @property
    def code(self) -> list[str]:
        """All of the file's Python: definitions, the call, what is differentiated."""
        names = ("setup", "call", "loss", "scalar")
        return [self.meta[name] for name in names if self.meta.get(name)]

    @functools.cached_property
    def calls(self) -> set[str]:
        """The names that the file's Python uses and does not define itself."""
        used: set[str] = set()
        bound = set(self.tree("in")) | set(self.tree("x")) | set(self.meta)
        for code in self.code:
            try:
                tree = ast.parse(code)
            except SyntaxError:  # prose around a call
                used |= set(re.findall(r"([A-Za-z_]\w*)\(", code))
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Name):
                    loaded = isinstance(node.ctx, ast.Load)
                    (used if loaded else bound).add(node.id)
                elif isinstance(node, ast.arg):
                    bound.add(node.arg)
                elif isinstance(node, ast.FunctionDef):
                    bound.add(node.name)
        return used - bound - {"x", "params", "result", "grads", "trajectory"}

    def check(self, what: str, got: Any, want: np.ndarray) -> None:
        """Compare within the file's tolerance; a NaN is never equal."""
        rtol = self.meta.get("tolerance", 1e-9)
        assert not np.isnan(want).any(), f"{what}: the file holds a NaN"
        largest = np.max(np.abs(want), initial=1e-9)
        atol = max(self.meta.get("atol", 1e-3 * rtol * largest), 1e-12)
        got = np.asarray(got)
        assert got.shape == want.shape, f"{what}: {got.shape}, wanted {want.shape}"
        np.testing.assert_allclose(got, want, rtol, atol, equal_nan=False, err_msg=what)


def public_names() -> dict[str, Any]:
    """optax, jax, numpy, and all public names of the package, flat."""
    names: dict[str, Any] = {}
    spaces = [ox]
    for space in spaces:
        for name in getattr(space, "__all__", dir(space)):
            value = getattr(space, name)
            if not inspect.ismodule(value):
                names.setdefault(name, value)
            elif value.__name__.startswith("optax_ext.") and value not in spaces:
                spaces.append(value)
    names |= adapters.DEFINITIONS
    return {**names, "ox": ox, "optax": optax, "jax": jax, "jnp": jnp, "np": np}


NAMES = public_names()


def missing(golden: Golden) -> list[str]:
    """Names that the file calls and the package does not have."""
    return sorted(golden.calls - set(NAMES) - set(dir(builtins)))


def replay(golden: Golden) -> None:
    """Replay a file and compare everything that it lets us compare.

    Raises:
      AssertionError: where a value differs.
      NotReplayedError: if nothing was compared.
    """
    compared = [golden.check(*each) for each in _choose(golden)(golden, NAMES)]
    if not compared:
        raise NotReplayedError(
            f"nothing replays {golden.meta.get('call')!r} with keys "
            f"{sorted(golden.arrays)}: add what it needs to tests/golden_adapters.py"
        )


def _choose(golden: Golden) -> Callable[..., Iterator[Comparison]]:
    for name in sorted(golden.calls & set(adapters.REPLAY)):
        return adapters.REPLAY[name]
    call = golden.meta["call"]
    if _compiles(call, "eval"):
        return replay_optimizer if golden.flat("p") else replay_function
    return replay_script if _compiles(call, "exec") else lambda *_: iter(())


def _compiles(code: str, mode: str) -> bool:
    try:
        compile(code, "call", mode)
    except SyntaxError:
        return False
    return True


def replay_optimizer(golden: Golden, names: Names) -> Iterator[Comparison]:
    """The call makes an optimizer; follow its parameters step by step."""
    x, trajectory = golden.tree("x"), golden.flat("p")
    scope = {**golden.meta, **names, **x, "x": x}
    tx = optax.with_extra_args_support(eval(golden.meta["call"], scope))
    params = golden.tree("p0")
    state = tx.init(params)
    for name in golden.calls & set(adapters.INITIAL_STATE):
        fields = adapters.INITIAL_STATE[name].items()
        given = {field: x[key] for field, key in fields if key in x}
        state = optax.tree.set(state, **given)
    gradient = gradient_source(golden, names)

    @jax.jit
    def step(params, state, recorded, extra):
        grads, more = gradient(params, state, recorded)
        updates, state = tx.update(grads, state, params, **{**more, **extra})
        return optax.apply_updates(params, updates), state

    for t, (recorded, extra) in enumerate(recorded_steps(golden, params)):
        params, state = step(params, state, recorded, extra)
        for key, want in trajectory.items():
            yield f"step {t}, leaf {key}", at_path(params, key), want[t]


def at_path(tree: Any, key: str) -> Any:
    return functools.reduce(lambda node, name: node[name], key.split("/"), tree)


def recorded_steps(golden: Golden, params: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Gradients (none where they are to be computed) and extra arguments by step.

    An extra argument is a series if its leading axis is that of the steps, else it is
    the same at every step. Leaves that a tree like the parameters lacks are None.
    """
    recorded, call = golden.tree("g"), golden.meta["call"]
    steps = len(next(iter(golden.flat("p").values())))
    series, constants = {}, {}
    shapes = jax.tree.map(jnp.shape, params)
    for name, tree in golden.tree("x").items():
        if name in quartics(golden)[1] or re.search(rf"\b{name}\b", call):
            continue
        leading = {leaf.shape[:1] for leaf in jax.tree.leaves(tree)}
        once = jax.tree.map(jnp.shape, tree) == shapes or leading != {(steps,)}
        if isinstance(tree, dict) and tree.keys() < params.keys():
            tree = {key: tree.get(key) for key in params}
        (constants if once else series)[name] = tree
    for t in range(steps):
        now = jax.tree.map(lambda leaf, t=t: leaf[t], (recorded, series))
        yield now[0], {**constants, **now[1]}


def gradient_source(golden: Golden, names: Names) -> Callable[..., Any]:
    """Make (params, state, recorded) -> gradients, extra arguments that follow."""
    functions, _ = quartics(golden)

    def given(params, state, recorded):
        del params, state
        return recorded, {}

    def evaluated(params, state, recorded):
        del recorded
        point = params
        for name in golden.calls & set(adapters.GRADIENT_POINT):
            notes = golden.meta.get("notes", "")
            point = adapters.GRADIENT_POINT[name](names, state, params, notes)
        value_fn = functions["value_fn"]
        value, grads = jax.value_and_grad(value_fn)(point)
        flat, unravel = ravel_pytree(point)
        hessian = jax.hessian(lambda p: value_fn(unravel(p)))(flat)
        more = {
            "value": value,
            "grad": grads,
            "grad_fn": jax.grad(value_fn),
            "hessian_diag": unravel(jnp.diagonal(hessian)),
        }
        return grads, {**functions, **more}

    return given if golden.flat("g") else evaluated


def quartics(golden: Golden) -> tuple[dict[str, Callable[..., Any]], set[str]]:
    """The functions p'Ap/2 - b'p + c sum(p^4)/4 of a file, and the keys they use."""
    x, functions, used = golden.tree("x"), {}, set()
    for name, (suffix, sign) in adapters.FUNCTIONS.items():
        keys = [letter + suffix for letter in "Abc"]
        if not set(keys) <= set(x):
            continue

        def quartic(params, keys=keys, sign=sign):
            a, b, c = (x[key] for key in keys)
            p = jnp.concatenate([jnp.ravel(params[k]) for k in sorted(params)])
            return sign * (p @ a @ p / 2 - b @ p + c * jnp.sum(p**4) / 4)

        functions[name] = quartic
        used |= set(keys)
    return functions, used


def replay_function(golden: Golden, names: Names) -> Iterator[Comparison]:
    """The call is an expression of the inputs: its value, and gradients of a loss."""
    meta, inputs, out = golden.meta, golden.tree("in"), golden.flat("out")

    def evaluate(**changed):
        scope = {**names, **inputs, **changed}
        exec(meta.get("setup", ""), scope)
        scope["result"] = eval(meta["call"], scope)
        return scope["result"], scope

    def loss(**changed):
        result, scope = evaluate(**changed)
        if "loss" in meta:
            return eval(meta["loss"], scope)
        summed = "gradients of the sum" in meta.get("notes", "")
        return jnp.sum(result) if summed else jnp.mean(result)

    result, _ = evaluate()
    if meta.get("emits") == "schedule":
        yield from schedules(golden, result)
        return
    if "loss" in meta:
        yield "loss", loss(), out["loss"]
    elif meta.get("emits") in out:
        yield meta["emits"], result, out[meta["emits"]]
    for key, want in out.items():
        name, _, rest = key.partition("/")
        if name == "result":
            yield key, at_path(result, rest) if rest else result, want
    for name, wants in golden.tree("out").get("grad", {}).items():
        got = jax.grad(lambda value, name=name: loss(**{name: value}))(inputs[name])
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wants), strict=True)
        for ours, theirs in pairs:
            yield f"gradient of {name}", ours, np.asarray(theirs)


def schedules(golden: Golden, result: Any) -> Iterator[Comparison]:
    """A schedule, or a pair of them for learning rate and momentum."""
    steps = golden.arrays["in/steps"].astype(int).tolist()
    each = result if isinstance(result, tuple) else (result,)
    for schedule, name in zip(each, ("schedule", "momentum"), strict=False):
        yield name, [schedule(step) for step in steps], golden.arrays[f"out/{name}"]


def replay_script(golden: Golden, names: Names) -> Iterator[Comparison]:
    """The call is statements: compare the names that they leave behind."""
    meta, inputs = golden.meta, golden.tree("in")
    given = {"x": golden.tree("x")}
    given["params"] = {k: jnp.asarray(v) for k, v in golden.flat("p0").items()}

    def run(**changed):
        scope = {**names, **given, **inputs, **changed}
        exec(meta["call"], scope)
        return scope

    def gradient(key):
        if key in scope.get("grads", {}):
            return scope["grads"][key]
        scalar = meta["scalar"]
        return jax.grad(lambda v: eval(scalar, run(**{key: v})))(inputs[key])

    scope = run()
    for key, want in golden.flat("p").items():
        yield f"trajectory of {key}", scope["trajectory"][key], want
    for key, want in golden.flat("out").items():
        name, _, rest = key.partition("/")
        if any(f"{key}/".startswith(f"{n.rstrip('/')}/") for n in meta["not_replayed"]):
            continue
        if name == "grad":
            yield f"gradient of {rest}", gradient(rest), want
        else:
            yield key, scope[name][rest] if rest else scope[name], want


def collect() -> Iterator[Any]:
    """One parameter a file, marked where its methods are not there yet."""
    for folder in map(pathlib.Path, FOLDERS):
        for path in sorted(folder.rglob("*.npz")):
            golden = Golden.load(path)
            absent = missing(golden)
            reason = f"{golden.meta.get('method')}: no {', '.join(absent)} yet"
            marks = [pytest.mark.xfail(reason=reason, run=False)] if absent else []
            yield pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=marks)


@pytest.mark.usefixtures("x64", "optimized")
@pytest.mark.parametrize("path", list(collect()))
def test_golden(path):
    replay(Golden.load(path))


def corrupted(golden: Golden, prefix: str) -> Golden:
    """The file with the largest entry of one array changed by one millionth."""
    key = next(key for key in golden.arrays if key.startswith(prefix))
    array = golden.arrays[key].copy()
    array.flat[np.argmax(np.abs(array))] *= 1 + 1e-6
    return dataclasses.replace(golden, arrays={**golden.arrays, key: array})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("first_order/cautious_adamw", "p/"),
        ("curvature/sophia", "p/"),
        ("curvature/gnb_diag", "out/expected_diag"),
        ("losses_policy/ppo_clip", "out/loss"),
        ("losses_policy/ppo_clip", "out/grad"),
    ],
)
def test_one_entry_that_is_off_by_a_millionth_fails(file, prefix):
    golden = Golden.load(HERE / f"{file}.npz")
    replay(golden)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        replay(corrupted(golden, prefix))


@pytest.mark.parametrize(
    "call", ["ox.cautious(optax.scale(1.0))", "cautious(inner) for inner in links"]
)
def test_a_file_of_a_landed_method_that_nothing_replays_fails(call):
    golden = Golden({"z/values": np.ones(3)}, {"call": call})
    assert not missing(golden)
    with pytest.raises(NotReplayedError, match=r"golden_adapters\.py"):
        replay(golden)


def test_a_file_of_a_missing_method_is_known_by_its_name():
    made_up = {"call": "optax.chain(no_such_link(lambda t: t), cautious(z))"}
    assert missing(Golden({"x/z": np.ones(3)}, made_up)) == ["no_such_link"]


def test_a_nan_is_never_equal():
    golden = Golden({}, {"call": ""})
    with pytest.raises(AssertionError, match="NaN"):
        golden.check("loss", np.array([np.nan]), np.array([np.nan]))
