"""Training runs that can be stopped at any moment and go on bit-equal."""

import dataclasses
import functools
import hashlib
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_ext as ox
from benchmarks import _data, _model, _optimizers

CHUNK = 10  # steps in one compiled call
_WARMUP = 0.05  # share of the steps


def setting(default: Any, text: str) -> Any:
    """A dataclass field that is also a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Problem:
    """What two runs must share to be compared."""

    steps: int = setting(480, f"Training steps, a multiple of {CHUNK}.")
    batch: int = setting(16, "Windows a batch.")
    length: int = setting(128, "Bytes a window.")
    width: int = setting(128, "Width of the model.")
    layers: int = setting(2, "Layers of the model.")
    validation: int = setting(256, "Windows of validation text.")
    evaluate_every: int = setting(40, "Steps between two evaluations.")

    def __post_init__(self):
        for name in ("steps", "evaluate_every"):
            value = getattr(self, name)
            if value <= 0 or value % CHUNK:
                raise ValueError(f"--{name} must be a multiple of {CHUNK}, got {value}")


class Trainer:
    """One optimizer on the problem, compiled once for all seeds and learning rates.

    Attributes:
      parameters: number of parameters of the model.
      state_bytes: bytes of optimizer state per parameter, from its abstract shapes.
      chunk: jitted (state, text, starts, peak) -> (state, mean loss) over some steps.
      arguments: what it takes, as shapes.
    """

    def __init__(
        self,
        recipe: _optimizers.Recipe,
        problem: Problem,
        corpus: _data.Corpus,
    ):
        self.problem, self.corpus = problem, corpus
        heads = max(1, problem.width // 32)
        model = _model.Decoder(problem.width, problem.layers, heads)
        warmup = max(1, round(_WARMUP * problem.steps))
        shape = optax.warmup_cosine_decay_schedule(
            1.0 / warmup, 1.0, warmup, problem.steps
        )

        def loss_fn(params: optax.Params, window: jax.Array) -> jax.Array:
            return _model.loss(model, params, window)

        def logits_fn(params: optax.Params, window: jax.Array) -> jax.Array:
            return _model.logits(model, params, window)

        # The peak is an argument of the compiled step, so that a sweep compiles once.
        def optimizer(peak: jax.Array | float) -> optax.GradientTransformation:
            layers = {"layers": _model.layers(model, problem.length)}
            layers = layers if recipe.layered else {}
            return recipe.make(lambda count: peak * shape(count), **layers)

        def initial(seed: jax.Array | int) -> tuple[optax.Params, optax.OptState]:
            key = jax.random.key(seed)
            params = _model.initial_params(model, key, problem.length)
            return params, optimizer(1.0).init(params)

        def advance(state, text, starts, peak):
            step = ox.make_train_step(
                loss_fn,
                optimizer(peak),
                logits_fn=logits_fn,
                per_example_grads="per_example_grads" in recipe.needs,
                extra_args=_model.extra_args(model, recipe.needs),
                gradient_at=recipe.gradient_at,
                jit=False,
            )

            def body(state, starts):
                window = _data.windows(text, starts, problem.length)
                *state, metrics = step(*state, window)
                return tuple(state), metrics.loss

            state, losses = jax.lax.scan(body, state, starts)
            return state, losses.mean()

        self.initial = jax.jit(initial)
        self.text = jnp.asarray(corpus.train)
        self.held_out = jnp.asarray(
            corpus.validation_windows(problem.validation, problem.length)
        )
        self.evaluate = jax.jit(loss_fn)
        params, opt_state = abstract = jax.eval_shape(initial, 0)
        self.parameters = sum(x.size for x in jax.tree.leaves(params))
        self.state_bytes = (
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(opt_state))
            / self.parameters
        )
        starts = jax.ShapeDtypeStruct((CHUNK, problem.batch), jnp.int32)
        peak = jax.ShapeDtypeStruct((), jnp.float32)
        self.chunk = jax.jit(advance, donate_argnums=0)
        self.arguments = (abstract, self.text, starts, peak)

    @functools.cached_property
    def _compiled(self) -> tuple[Any, float]:
        started = time.perf_counter()
        compiled = self.chunk.lower(*self.arguments).compile()
        return compiled, time.perf_counter() - started

    @property
    def advance(self) -> Callable[..., Any]:
        """The compiled chunk of steps."""
        return self._compiled[0]

    @property
    def compile_seconds(self) -> float:
        """Time to trace and compile it."""
        return self._compiled[1]


@dataclasses.dataclass
class Curve:
    """The history of a run: losses, and seconds of training without evaluations."""

    step: int = 0
    train_loss: list[float] = dataclasses.field(default_factory=list)
    chunk_seconds: list[float] = dataclasses.field(default_factory=list)
    validation_step: list[int] = dataclasses.field(default_factory=list)
    validation_loss: list[float] = dataclasses.field(default_factory=list)


class Run:
    """One training run: a seed and a learning rate, the state, and the curve so far."""

    def __init__(self, trainer: Trainer, seed: int, learning_rate: float):
        problem = trainer.problem
        self.trainer, self.learning_rate = trainer, jnp.float32(learning_rate)
        self.starts = trainer.corpus.train_starts(
            seed, problem.steps, problem.batch, problem.length
        )
        self.state = trainer.initial(seed)
        self.curve = Curve()

    @property
    def done(self) -> bool:
        """Whether every step was made."""
        return self.curve.step == self.trainer.problem.steps

    def advance(self) -> None:
        """Trains for one chunk; evaluates where the problem says so, and at the end."""
        trainer, curve = self.trainer, self.curve
        starts = self.starts[curve.step : curve.step + CHUNK]
        started = time.perf_counter()
        self.state, loss = trainer.advance(
            self.state, trainer.text, starts, self.learning_rate
        )
        curve.train_loss.append(float(loss))
        curve.chunk_seconds.append(time.perf_counter() - started)
        curve.step += CHUNK
        if curve.step % trainer.problem.evaluate_every == 0 or self.done:
            curve.validation_step.append(curve.step)
            validation = trainer.evaluate(self.state[0], trainer.held_out)
            curve.validation_loss.append(float(validation))

    def save(self, folder: pathlib.Path) -> None:
        """Writes a checkpoint: parameters, optimizer state, and the curve.

        The position in the data is the step, since the batches are given by the seed.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
            manager.save(
                self.curve.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(self.state),
                    curve=ocp.args.JsonSave(dataclasses.asdict(self.curve)),
                ),
            )

    def restore(self, folder: pathlib.Path) -> None:
        """Goes back to the last checkpoint in `folder`; without one, does nothing."""
        if not folder.exists():
            return
        with ocp.CheckpointManager(folder.absolute()) as manager:
            if manager.latest_step() is None:
                return
            saved = manager.restore(
                manager.latest_step(),
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(self.state),
                    curve=ocp.args.JsonRestore(),
                ),
            )
        self.state, self.curve = saved.state, Curve(**saved.curve)

    def params_sha256(self) -> str:
        """Digest of the parameters: equal for two runs that agree in every bit."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.state[0]):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()


class Interrupt:
    """Makes the first Ctrl-C a request; the second one interrupts as ever."""

    requested = False

    def __enter__(self) -> "Interrupt":
        self._before = signal.signal(signal.SIGINT, self._request)
        return self

    def _request(self, *_: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)
