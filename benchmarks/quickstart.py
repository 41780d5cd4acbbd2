r"""Train a small transformer on real text with each optimizer, against AdamW.

    python -m benchmarks.quickstart                   # one seed, minutes on two cores
    python -m benchmarks.quickstart --seeds=3         # the README's figures
    python -m benchmarks.quickstart --sweep           # where learning rates come from
    python -m benchmarks.quickstart --optimizers=adamw,grams_adamw=2e-3

A decoder-only transformer of about half a million parameters learns to predict the next
byte of Python's standard library. With one seed, every optimizer starts from the same
parameters and sees the same batches; learning rates warm up and then fall to zero along
a cosine. Any method of the catalogue runs by its name. Ctrl-C keeps what was done.
"""

import dataclasses
import functools
import json
import pathlib
import shlex
import shutil
import statistics
import sys
import time
from typing import Any, NamedTuple

import rich.console
import rich.progress
from absl import app, flags, logging

from benchmarks import _data, _optimizers, _report, _summary, _training
from benchmarks._training import setting

_SWEEP_SEED = 1000  # none of the seeds that are reported


@dataclasses.dataclass(frozen=True)
class Settings(_training.Problem):
    """Every flag with its default and its help."""

    optimizers: str = setting(
        ",".join(_optimizers.OPTIMIZERS),
        "Names, separated by commas; NAME=LR sets a learning rate.",
    )
    seeds: int = setting(1, "Number of seeds.")
    output: str = setting("runs/quickstart", "Folder of the results.")
    sweep: bool = setting(False, "Run each optimizer's grid of learning rates instead.")
    short: bool = setting(False, "A tiny model for seconds: does everything work?")
    resume: bool = setting(False, "Go on where an interrupted run stopped.")
    checkpoint_every: int = setting(120, "Steps between two checkpoints.")

    @property
    def problem(self) -> dict[str, int]:
        """The part that two runs must share to be compared."""
        names = [field.name for field in dataclasses.fields(_training.Problem)]
        return {name: getattr(self, name) for name in names}


_SHORT = {
    "steps": 40,
    "batch": 4,
    "length": 32,
    "width": 32,
    "layers": 1,
    "validation": 16,
    "evaluate_every": 10,
    "checkpoint_every": 20,
}


class Job(NamedTuple):
    """One run to make."""

    optimizer: str
    learning_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.optimizer} lr={self.learning_rate:g} seed={self.seed}"


class Stopped(Exception):
    """The user asked to stop, and everything so far is on disk."""


class Unfinished:
    """The folder of what is under way: finished runs, and checkpoints of the others.

    It goes when all is done, so results that are there already stay until then.
    """

    def __init__(self, folder: pathlib.Path, identity: dict[str, Any], resume: bool):
        self.folder, self.identity = folder, identity
        self.runs: dict[Job, dict[str, Any]] = {}
        if resume:
            self._load()
        else:
            shutil.rmtree(folder, ignore_errors=True)
            self._write()

    def _load(self) -> None:
        path = self.folder / "runs.json"
        if not path.exists():
            raise ValueError(f"nothing to resume in {self.folder}: drop --resume")
        saved = json.loads(path.read_text())
        for name, value in self.identity.items():
            if saved["identity"][name] != value:
                raise ValueError(
                    f"cannot resume {self.folder}: its {name} was "
                    f"{saved['identity'][name]}, now it is {value}"
                )
        for run in saved["runs"]:
            self.runs[Job(*(run[field] for field in Job._fields))] = run

    def _write(self) -> None:
        value = {"identity": self.identity, "runs": list(self.runs.values())}
        _report.write_json(self.folder / "runs.json", value)

    def checkpoints(self, job: Job) -> pathlib.Path:
        return self.folder / str(job).replace(" ", "_")

    def finish(self, job: Job, record: dict[str, Any]) -> None:
        self.runs[job] = record
        self._write()
        shutil.rmtree(self.checkpoints(job), ignore_errors=True)


def train(
    jobs: list[Job],
    recipes: dict[str, _optimizers.Recipe],
    settings: Settings,
    corpus: _data.Corpus,
    unfinished: Unfinished,
    console: rich.console.Console,
) -> None:
    """Makes every run that is not finished yet.

    Raises:
      Stopped: after Ctrl-C, once the run under way is saved.
    """
    trainers: dict[str, _training.Trainer] = {}
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("left"),
        console=console,
        disable=not console.is_terminal,
    )
    total = len(jobs) * settings.steps
    with _training.Interrupt() as interrupt, bar:
        task = bar.add_task("", total=total)
        for job in jobs:
            if job in unfinished.runs:
                bar.advance(task, settings.steps)
                continue
            if interrupt.requested:
                raise Stopped(f"before {job}")
            bar.update(task, description=f"{job}: compiling")
            if job.optimizer not in trainers:
                trainers[job.optimizer] = _training.Trainer(
                    recipes[job.optimizer], settings, corpus
                )
            run = _training.Run(trainers[job.optimizer], job.seed, job.learning_rate)
            folder = unfinished.checkpoints(job)
            if settings.resume:
                run.restore(folder)
                bar.advance(task, run.curve.step)
            while not run.done:
                run.advance()
                line = _progress_line(job, run.curve, settings.steps)
                bar.update(task, advance=_training.CHUNK, description=line)
                evaluated = run.curve.validation_step[-1:] == [run.curve.step]
                if run.done or (evaluated and not console.is_terminal):
                    console.print(line, highlight=False)
                if run.done:
                    break
                due = run.curve.step % settings.checkpoint_every < _training.CHUNK
                if due or interrupt.requested:
                    run.save(folder)
                if interrupt.requested:
                    raise Stopped(f"at step {run.curve.step} of {job}")
            unfinished.finish(job, _record(job, run))


def _progress_line(job: Job, curve: _training.Curve, steps: int) -> str:
    line = f"{job}  step {curve.step}/{steps}  loss {curve.train_loss[-1]:.3f}"
    if curve.validation_loss:
        line += f"  validation {curve.validation_loss[-1]:.3f}"
    return line


def _record(job: Job, run: _training.Run) -> dict[str, Any]:
    chunks = run.curve.chunk_seconds
    return {
        **job._asdict(),
        "final_validation_loss": run.curve.validation_loss[-1],
        "ms_per_step": 1e3 * statistics.median(chunks) / _training.CHUNK,
        "train_seconds": sum(chunks),
        "compile_seconds": run.trainer.compile_seconds,
        "state_bytes_per_parameter": run.trainer.state_bytes,
        "parameters": run.trainer.parameters,
        "load_average": _report.load_average(),
        "params_sha256": run.params_sha256(),
        "curve": dataclasses.asdict(run.curve),
    }


def main(argv: list[str]) -> int:
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {shlex.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax says much at INFO
    started = time.perf_counter()
    console = _report.console()
    again = [argument for argument in sys.argv[1:] if argument != "--resume"]
    command = shlex.join(["python", "-m", "benchmarks.quickstart", *again])
    environment = _report.environment()
    corpus = _data.Corpus.of_standard_library()
    try:
        settings = _settings()
        recipes = _optimizers.recipes(settings.optimizers)
        name = "quickstart_sweep" if settings.sweep else "quickstart"
        output = pathlib.Path(settings.output, name)
        unfinished = Unfinished(
            output.with_suffix(".unfinished"),
            {**settings.problem, "data": corpus.facts["sha256"]},
            settings.resume,
        )
    except ValueError as error:
        console.print(f"error: {error}", style="red", highlight=False)
        return 2

    jobs = _jobs(settings, recipes)
    try:
        train(jobs, recipes, settings, corpus, unfinished, console)
    except (Stopped, KeyboardInterrupt) as stop:
        where = str(stop) or "at once; the last checkpoint is kept"
        console.print(f"Stopped {where}. To go on:", highlight=False)
        console.print(f"  {command} --resume", highlight=False, soft_wrap=True)
        return 130

    runs = [unfinished.runs[job] for job in jobs]
    if settings.sweep:
        summary = _summary.best_learning_rates(runs)
        _summary.print_sweep(console, runs, summary)
    else:
        summary = _summary.summarise(runs)
        _summary.print_summary(console, summary)
        _summary.plot(output.with_suffix(".png"), runs, summary, environment)
    result = {
        "command": command,
        "wall_seconds": time.perf_counter() - started,
        **environment,
        "settings": dataclasses.asdict(settings),
        "data": corpus.facts,
        **summary,
        "runs": runs,
    }
    _report.write_json(output.with_suffix(".json"), result)
    shutil.rmtree(unfinished.folder)
    console.print(f"Results: {output}.*, {result['wall_seconds']:.0f} s in all")
    return 0


def _settings() -> Settings:
    """Settings from the flags; ``--short`` changes those that are not given."""
    given = {f.name: flags.FLAGS[f.name] for f in dataclasses.fields(Settings)}
    values: dict[str, Any] = {name: flag.value for name, flag in given.items()}
    if values["short"]:
        values |= {n: v for n, v in _SHORT.items() if not given[n].present}
    return Settings(**values)


def _jobs(settings: Settings, recipes: dict[str, _optimizers.Recipe]) -> list[Job]:
    if settings.sweep:
        return [
            Job(optimizer, rate, _SWEEP_SEED)
            for optimizer, recipe in recipes.items()
            for rate in recipe.grid
        ]
    return [
        Job(optimizer, recipe.learning_rate, seed)
        for seed in range(settings.seeds)
        for optimizer, recipe in recipes.items()
    ]


def define_flags() -> None:
    """One flag for every field of `Settings`."""
    define = {
        bool: flags.DEFINE_boolean,
        int: functools.partial(flags.DEFINE_integer, lower_bound=1),
        str: flags.DEFINE_string,
    }
    for field in dataclasses.fields(Settings):
        define[type(field.default)](field.name, field.default, field.metadata["help"])


if __name__ == "__main__":
    define_flags()
    app.run(main)
