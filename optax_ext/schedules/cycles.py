r"""Learning rates that rise and fall, once or again and again.

All are pieces of optax's (linear, cosine, exponential) one after the other. A piece
sees the steps since its start in the default float: an integer count would make
float32 values even under x64, and fails under strict promotion.
"""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
import optax

from optax_ext._core.catalogue import catalogued
from optax_ext._core.checks import (
    check_choice,
    check_hyperparam,
    check_interval,
    check_rate,
)

_CONTINUAL = (
    "Simple and Scalable Strategies to Continually Pre-train Large Language Models"
)


def _sequence(*pieces: tuple[optax.Schedule, int], end: float) -> optax.Schedule:
    """Schedules of given lengths one after the other, then `end`."""

    def on_floats(piece):
        return lambda count: jnp.asarray(piece(jnp.asarray(count, float)), float)

    boundaries = list(itertools.accumulate(steps for _, steps in pieces))
    schedules = [*(piece for piece, _ in pieces), optax.constant_schedule(end)]
    return optax.join_schedules([on_floats(s) for s in schedules], boundaries)


def _half_cosine(start: float, end: float, steps: int) -> optax.Schedule:
    """From `start` to `end`; optax's own divides by the start."""
    fall = optax.cosine_decay_schedule(1.0, max(steps, 1))
    return lambda count: end + (start - end) * fall(count)


def _inverse_root(start: float, end: float, steps: int, alpha: float) -> optax.Schedule:
    """From `start` to `end` as (1 + alpha x)^-1/2 falls for x from 0 to 1."""

    def shape(x):
        return (1 + alpha * x) ** -0.5 - 1

    return lambda count: start + (end - start) * shape(count / steps) / shape(1.0)


def _check_steps(owner: str, **values: int) -> None:
    """Check durations: a piece of 0 steps is left out."""
    for name, value in values.items():
        if value != 0 or isinstance(value, bool):
            check_interval(owner, **{name: value})


@catalogued(
    title="A disciplined approach to neural network hyper-parameters: Part 1 -- "
    "learning rate, batch size, momentum, and weight decay",
    arxiv="1803.09820",
    kind="schedule",
    variant="linear, three phases; corners at whole steps.",
    compared="golden one_cycle (torch OneCycleLR, three_phase)",
    example=lambda: {"total_steps": 100, "peak_value": 0.1},
)
def one_cycle(
    total_steps: int,
    peak_value: float,
    div_factor: float = 10.0,
    final_div_factor: float = 100.0,
    pct_start: float = 0.45,
    max_momentum: float = 0.95,
    min_momentum: float = 0.85,
) -> tuple[optax.Schedule, optax.Schedule]:
    r"""One cycle of the learning rate, and of the momentum against it.

    With :math:`s = \lfloor \text{pct\_start} \cdot T \rfloor` and all pieces linear:

    ========  ==================================  =========
    step      learning rate                       momentum
    ========  ==================================  =========
    0         peak / div                          max
    s         peak                                min
    2 s       peak / div                          max
    T, after  peak / (div * final_div)            max
    ========  ==================================  =========

    `optax.linear_onecycle_schedule` has the learning rate alone; with it, pct_final =
    2 s / T can land one step early (``int(29 / 100 * 100)`` is 28).

    Args:
      total_steps: T, number of updates.
      peak_value: largest learning rate.
      div_factor: peak over initial learning rate, above 0 (usual: 10).
      final_div_factor: initial over final learning rate, above 0 (usual: 100).
      pct_start: share of the steps in which the rate rises, in (0, 0.5]; 0.45 leaves a
        tenth for the last fall (paper).
      max_momentum: momentum at both ends of the cycle, in [0, 1) (paper).
      min_momentum: momentum at the peak, in [0, 1) (paper).

    Returns:
      Schedules of learning rate and momentum. Both go into
      ``optax.inject_hyperparams(optax.sgd)(learning_rate=..., momentum=...)``.

    Raises:
      ValueError: for values outside their range, or fewer than one step up.

    Example:
      >>> import optax_ext as ox
      >>> rate, momentum = ox.one_cycle(100, 0.1)
      >>> print(f"{rate(45):.2f} {momentum(45):.2f}")
      0.10 0.85
    """
    check_interval("one_cycle", total_steps=total_steps)
    owner = "one_cycle"
    check_hyperparam(owner, low=0.0, peak_value=peak_value)
    check_hyperparam(owner, low=0.0, open_low=True, div_factor=div_factor)
    check_hyperparam(owner, low=0.0, open_low=True, final_div_factor=final_div_factor)
    check_hyperparam(owner, low=0.0, high=0.5, open_low=True, pct_start=pct_start)
    check_rate(owner, max_momentum=max_momentum, min_momentum=min_momentum)
    s = int(pct_start * total_steps)
    if s < 1:
        raise ValueError(
            f"one_cycle: pct_start = {pct_start} of {total_steps} steps is less than "
            "one step: raise pct_start or total_steps"
        )
    initial = peak_value / div_factor
    final = initial / final_div_factor
    rest = total_steps - 2 * s
    learning_rate = _sequence(
        (optax.linear_schedule(initial, peak_value, s), s),
        (optax.linear_schedule(peak_value, initial, s), s),
        (optax.linear_schedule(initial, final, rest), rest),
        end=final,
    )
    momentum = _sequence(
        (optax.linear_schedule(max_momentum, min_momentum, s), s),
        (optax.linear_schedule(min_momentum, max_momentum, s), s),
        end=max_momentum,
    )
    return learning_rate, momentum


@catalogued(
    title=_CONTINUAL,
    arxiv="2403.08763",
    kind="schedule",
    variant="durations, not boundaries.",
    compared="goldens infinite_schedule_cosine, infinite_schedule_rsqrt",
    example=lambda: {
        "peak_value": 3e-4,
        "constant_value": 1.65e-4,
        "end_value": 3e-5,
        "warmup_steps": 10,
        "cooldown_steps": 20,
        "constant_steps": 50,
        "anneal_steps": 20,
    },
)
def infinite_schedule(
    peak_value: float,
    constant_value: float,
    end_value: float,
    warmup_steps: int,
    cooldown_steps: int,
    constant_steps: int,
    anneal_steps: int,
    cooldown: str = "cosine",
    alpha: float = 10.0,
    init_value: float = 0.0,
) -> optax.Schedule:
    r"""Warm up, cool down to a rate that can be kept for ever, and anneal at the end.

    Training goes on from the constant phase as often as new data comes; only what is to
    be used is annealed. With x from 0 to 1 in each phase:

    .. math::
      \begin{aligned}
      \text{warm-up} &: \text{linear from init to peak} \\
      \text{cool-down} &: c + \tfrac12 (p - c)(1 + \cos \pi x), \quad \text{or} \quad
        p + (c - p)\, h(x) / h(1), \; h(x) = (1 + \alpha x)^{-1/2} - 1 \\
      \text{constant} &: c \\
      \text{anneal} &: c\, (e / c)^x, \; \text{and } e \text{ afterwards}
      \end{aligned}

    Args:
      peak_value: p, learning rate after the warm-up (paper: 3e-4).
      constant_value: c, above 0 (paper: 1.65e-4).
      end_value: e, above 0 (paper: a tenth of the peak).
      warmup_steps: length of the warm-up (paper: 1 % of the steps); 0 leaves it out,
        as for the other lengths.
      cooldown_steps: length of the cool-down.
      constant_steps: length of the constant phase.
      anneal_steps: length of the anneal.
      cooldown: "cosine" or "rsqrt".
      alpha: how fast "rsqrt" falls, above 0.
      init_value: learning rate at step 0.

    Returns:
      A schedule.

    Raises:
      ValueError: for values outside their range or an unknown `cooldown`.

    Example:
      >>> import optax_ext as ox
      >>> rate = ox.infinite_schedule(1.0, 0.5, 0.125, 10, 20, 50, 20)
      >>> print(f"{rate(10):.2f} {rate(30):.2f} {rate(90):.2f} {rate(100):.3f}")
      1.00 0.50 0.25 0.125
    """
    owner = "infinite_schedule"
    check_choice(owner, "cooldown", cooldown, ("cosine", "rsqrt"))
    check_hyperparam(owner, low=0.0, peak_value=peak_value, init_value=init_value)
    check_hyperparam(owner, low=0.0, open_low=True, constant_value=constant_value)
    check_hyperparam(owner, low=0.0, open_low=True, end_value=end_value, alpha=alpha)
    _check_steps(
        owner,
        warmup_steps=warmup_steps,
        cooldown_steps=cooldown_steps,
        constant_steps=constant_steps,
        anneal_steps=anneal_steps,
    )
    cool = (peak_value, constant_value, max(cooldown_steps, 1))
    anneal_rate = end_value / constant_value
    return _sequence(
        (optax.linear_schedule(init_value, peak_value, warmup_steps), warmup_steps),
        (
            _half_cosine(*cool)
            if cooldown == "cosine"
            else _inverse_root(*cool, alpha),
            cooldown_steps,
        ),
        (optax.constant_schedule(constant_value), constant_steps),
        (
            optax.exponential_decay(constant_value, anneal_steps, anneal_rate),
            anneal_steps,
        ),
        end=end_value,
    )


@catalogued(
    title=_CONTINUAL,
    arxiv="2403.08763",
    kind="schedule",
    variant="later stages warm up from the end value, so that nothing jumps; gpt-neox "
    "starts again from 0.",
    compared="golden rewarmed_cosine_schedule",
    example=lambda: {
        "stage_steps": (40, 60),
        "peak_value": 3e-4,
        "end_value": 3e-5,
        "warmup_steps": (5, 8),
    },
)
def rewarmed_cosine_schedule(
    stage_steps: Sequence[int],
    peak_value: float | Sequence[float],
    end_value: float,
    warmup_steps: int | Sequence[int],
    init_value: float = 0.0,
) -> optax.Schedule:
    r"""Warm up and decay again for each stage of data.

    In stage i: linear to :math:`\text{peak}_i` over the warm-up, from `init_value` in
    the first stage and from `end_value` later; then half a cosine to `end_value` over
    the rest of the stage. The step on a boundary is the first of the next stage.

    Args:
      stage_steps: lengths of the stages, warm-up included.
      peak_value: learning rate after the warm-up, one for all stages or one for each
        (paper: 3e-4).
      end_value: learning rate at the end of every stage, and afterwards (paper: a tenth
        of the peak).
      warmup_steps: length of the warm-up, one for all stages or one for each, shorter
        than its stage (paper: 1 % of it); 0 leaves it out.
      init_value: learning rate at step 0.

    Returns:
      A schedule.

    Raises:
      ValueError: for values outside their range, or of another number than the stages.

    Example:
      >>> import optax_ext as ox
      >>> rate = ox.rewarmed_cosine_schedule([40, 60], 1.0, 0.1, [5, 8])
      >>> print(f"{rate(5):.1f} {rate(40):.1f} {rate(48):.1f} {rate(1000):.1f}")
      1.0 0.1 1.0 0.1
    """
    owner = "rewarmed_cosine_schedule"
    check_hyperparam(owner, low=0.0, end_value=end_value, init_value=init_value)
    stages = list(stage_steps)
    peaks = _for_each("peak_value", peak_value, len(stages))
    warmups = _for_each("warmup_steps", warmup_steps, len(stages))
    pieces, start = [], init_value
    for steps, peak, warmup in zip(stages, peaks, warmups, strict=True):
        check_interval(owner, stage_steps=steps)
        check_hyperparam(owner, low=0.0, peak_value=peak)
        _check_steps(owner, warmup_steps=warmup)
        if warmup >= steps:
            raise ValueError(
                f"{owner}: warmup_steps = {warmup} must be less than the {steps} steps "
                "of its stage"
            )
        rest = steps - warmup
        pieces.append((optax.linear_schedule(start, peak, warmup), warmup))
        pieces.append((_half_cosine(peak, end_value, rest), rest))
        start = end_value
    return _sequence(*pieces, end=end_value)


def _for_each(name: str, value: float | Sequence[float], stages: int) -> list:
    """One value for every stage."""
    values = list(value) if isinstance(value, Sequence) else [value] * stages
    if not stages or len(values) != stages:
        raise ValueError(
            f"rewarmed_cosine_schedule: stage_steps has {stages} stages, {name} has "
            f"{len(values)}: give one value, or one for each of 1 or more stages"
        )
    return values
