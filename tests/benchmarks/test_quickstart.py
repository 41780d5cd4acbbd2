"""The quickstart in its short form, as a user meets it: from the command line."""

import functools
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from benchmarks import _data, _optimizers, _summary, _training
from optax_ext._core import catalogue

ROOT = pathlib.Path(__file__).parents[2]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.quickstart", "--short", *arguments]


def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}


def quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run of three optimizers, two of them with curvature or masks."""
    output = tmp_path_factory.mktemp("straight")
    names = "--optimizers=adamw,cautious_adamw,flagship"
    done = quickstart(names, "--seeds=2", f"--output={output}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads((output / "quickstart.json").read_text()), output


def test_the_short_run_prints_a_row_for_every_optimizer(straight):
    printed, result, _ = straight
    table = printed.split("Validation loss in nats")[1].splitlines()
    for row in result["table"]:
        line = next(x for x in table if x.split()[:1] == [row["optimizer"]])
        assert f"{row['final_validation_loss']['median']:.3f}" in line
    assert "cautious_adamw - adamw:" in printed


def test_the_results_say_where_what_and_on_which_data_they_were_measured(straight):
    _, result, output = straight
    assert result["versions"]["jax"] and result["versions"]["optax"]
    assert result["device"]["platform"] and result["device"]["cores"] >= 1
    assert result["settings"]["seeds"] == 2 and result["settings"]["short"]
    assert len(result["data"]["sha256"]) == 64
    assert result["data"]["train_bytes"] > 5 * result["data"]["validation_bytes"] > 0
    assert [row["optimizer"] for row in result["table"]] == [
        "adamw",
        "cautious_adamw",
        "flagship",
    ]
    assert (output / "quickstart.png").stat().st_size > 10_000
    assert not (output / "quickstart.unfinished").exists()


def test_every_optimizer_has_its_row_and_its_curves(straight):
    _, result, _ = straight
    for row in result["table"]:
        spread = row["final_validation_loss"]
        assert spread["min"] <= spread["median"] <= spread["max"] < math.log(256)
        assert row["ms_per_step"] > 0.0 and row["compile_seconds"] > 0.0
        # Adam: two float32 moments. The flagship: a momentum and a curvature. Both
        # besides a few counters and a key.
        assert 8.0 < row["state_bytes_per_parameter"] < 8.01
        runs = [r for r in result["runs"] if r["optimizer"] == row["optimizer"]]
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            assert run["curve"]["validation_step"] == [10, 20, 30, 40]
            assert run["curve"]["validation_loss"][-1] == run["final_validation_loss"]
    adamw = result["table"][0]
    assert adamw["steps_to_adamw"] == 40 and adamw["seeds_that_reach_adamw"] == 2


@pytest.mark.parametrize("optimizer", ["flagship"])
def test_a_run_stopped_by_ctrl_c_and_resumed_ends_in_the_same_bits(
    straight, tmp_path, optimizer
):
    _, result, _ = straight
    expected = next(
        r for r in result["runs"] if r["optimizer"] == optimizer and r["seed"] == 0
    )
    arguments = [f"--optimizers={optimizer}", f"--output={tmp_path}"]
    with subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if "step 10/40" in line:
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, printed
    assert "To go on:" in printed and "--resume" in printed
    assert not (tmp_path / "quickstart.json").exists()

    resumed = quickstart(*arguments, "--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "step 10/40" not in resumed.stdout  # it did not start again
    (run,) = json.loads((tmp_path / "quickstart.json").read_text())["runs"]
    assert run["params_sha256"] == expected["params_sha256"]
    assert run["curve"]["train_loss"] == expected["curve"]["train_loss"]
    assert run["curve"]["validation_loss"] == expected["curve"]["validation_loss"]


def test_an_unknown_optimizer_is_answered_with_the_names_that_are_known(tmp_path):
    done = quickstart("--optimizers=adamw,cautios_lion", f"--output={tmp_path}")
    assert done.returncode == 2
    for name in ("cautios_lion", *_optimizers.OPTIMIZERS, "grams_adamw"):
        assert name in done.stdout.replace("\n", " ")


def test_resume_with_nothing_to_resume_says_so(tmp_path):
    done = quickstart("--resume", f"--output={tmp_path}")
    assert done.returncode == 2 and "nothing to resume" in done.stdout


def test_a_rate_after_the_name_overrides_the_table():
    found = _optimizers.recipes("lion=3e-4, adamw")
    assert found["lion"].learning_rate == 3e-4
    assert found["adamw"] == _optimizers.OPTIMIZERS["adamw"]
    with pytest.raises(ValueError, match="positive number"):
        _optimizers.recipes("lion=fast")


@pytest.mark.parametrize("name", ["grams_adamw", "scale_by_lion_k", "grams"])
def test_optimizers_links_and_wrappers_of_the_catalogue_train_by_name(name):
    recipe = _optimizers.recipes(name)[name]
    run = _training.Run(_training.Trainer(recipe, TINY, corpus()), 0, 1e-3)
    while not run.done:
        run.advance()
    assert run.curve.train_loss[1] < run.curve.train_loss[0]


TINY = _training.Problem(steps=20, batch=2, length=16, width=16, layers=1, validation=4)


@functools.cache
def corpus() -> _data.Corpus:
    return _data.Corpus.of_standard_library()


@pytest.mark.parametrize(
    "name",
    [e.name for e in catalogue.entries("optimizer", "link", "wrapper", "aggregator")],
)
def test_every_gradient_method_of_the_catalogue_makes_a_step_by_its_name(name):
    recipe = _optimizers.recipes(name)[name]
    trainer = _training.Trainer(recipe, TINY, corpus())
    before = trainer.arguments[0]
    after, loss = jax.eval_shape(trainer.chunk, *trainer.arguments)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert loss.shape == ()


def test_a_base_and_its_cautious_variant_are_tuned_over_the_same_rates():
    table = _optimizers.OPTIMIZERS
    for name, recipe in table.items():
        assert recipe.learning_rate in recipe.grid
        assert recipe.grid == table[name.removeprefix("cautious_")].grid


def test_a_file_that_is_missing_elsewhere_moves_no_other_file_across_the_split(
    tmp_path,
):
    for at in range(40):
        (tmp_path / f"m{at}.py").write_text(f"x = {at}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text("never read\n")
    before = _data.Corpus.of_standard_library(str(tmp_path))
    (tmp_path / "m7.py").unlink()
    after = _data.Corpus.of_standard_library(str(tmp_path))
    lines = [bytes(part).splitlines() for part in (*before[:2], *after[:2])]
    assert set(lines[2]) == set(lines[0]) - {b"x = 7"}
    assert set(lines[3]) == set(lines[1]) - {b"x = 7"}
    assert lines[1] and b"never read" not in lines[0] + lines[1]


def record(optimizer: str, losses: list[float], seed: int = 0) -> dict:
    return {
        "optimizer": optimizer,
        "learning_rate": 1e-3,
        "seed": seed,
        "final_validation_loss": losses[-1],
        "ms_per_step": 1.0,
        "compile_seconds": 1.0,
        "state_bytes_per_parameter": 8.0,
        "curve": {
            "chunk_seconds": [1.0] * len(losses),
            "validation_step": [10 * (at + 1) for at in range(len(losses))],
            "validation_loss": losses,
        },
    }


def test_steps_to_adamw_are_interpolated_between_evaluations():
    runs = [record("adamw", [4.0, 3.0, 2.0]), record("quick", [3.0, 1.0, 0.5])]
    table = _summary.summarise(runs)["table"]
    assert table[0]["steps_to_adamw"] == 30
    assert table[1]["steps_to_adamw"] == 15  # half-way from 3 at 10 to 1 at 20
    assert table[1]["seconds_to_adamw"] == 1.5


def test_a_run_that_never_reaches_adamw_is_said_to_take_for_ever():
    runs = [record("adamw", [4.0, 2.0]), record("slow", [4.0, math.nan])]
    row = _summary.summarise(runs)["table"][1]
    assert row["steps_to_adamw"] == math.inf and row["seeds_that_reach_adamw"] == 0


def test_cautious_variants_are_compared_with_their_base_seed_by_seed():
    runs = [
        record(name, [loss], seed)
        for name, losses in {"adamw": (2.0, 3.0), "cautious_adamw": (1.5, 3.5)}.items()
        for seed, loss in enumerate(losses)
    ]
    pairs = _summary.summarise(runs)["against_base"]
    assert pairs == {"cautious_adamw": {"base": "adamw", "differences": [-0.5, 0.5]}}
