"""Recipes: the shipped ones, what a file may hold, what `--set` changes, and which stages may follow one another."""

from __future__ import annotations

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest

from nas.diffusion import FLOW
from nas.errors import UsageError
from nas.train import as_toml, load_recipe, recipes
from nas.train.forms import UnfitError, fitted, words
from nas.train.recipe import differences, few_times, sampling_after, scaled_steps
from nas.train.recipe_file import FOLDER

SYSTEMS = ("snapgen", "edgefusion", "sid_lsg", "koala", "ssd1b")
STAGE = '[[stage]]\nname = "distil"\nsteps = 10\nbatch = 4\nlr = 1e-3\n'
OUTPUT = '[[stage.objective]]\nname = "output"\n'
FEW = '[[stage]]\nname = "few"\nsteps = 5\nbatch = 4\nlr = 1e-4\n[[stage.objective]]\nname = "consistency"\n'


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


def test_every_published_system_has_a_recipe_and_a_tiny_one() -> None:
    assert set(recipes()) >= {*SYSTEMS, *(f"{name}-tiny" for name in SYSTEMS), "shapes"}


@pytest.mark.parametrize("name", recipes())
def test_a_shipped_recipe_resolves_and_survives_being_written(name: str, tmp_path: Path) -> None:
    found = load_recipe(name)
    assert found.description.endswith(".")
    assert found.sources
    for stage in found.stages:
        for goal in stage.goals:
            assert type(goal.objective).__module__ == f"nas.objectives.{goal.name}"
    path = tmp_path / f"{name}.toml"
    path.write_text(as_toml(found))
    assert load_recipe(str(path)) == found


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_number_of_a_published_recipe_tells_where_it_is_from(name: str) -> None:
    """A value without a comment repeats one that an earlier stage explains, or is no number of a paper."""
    explained: set[tuple[str, str]] = set()
    for line in (FOLDER / f"{name}.toml").read_text().splitlines():
        key, separator, value = line.partition(" = ")
        value, _, comment = value.partition(" #")
        if not separator or key.strip() in ("steps", "checkpoint_every", "points") or not value[:1].isdecimal():
            continue
        if comment:
            explained.add((key, value.strip()))
        zero = float(value.replace("_", "")) == 0  # switched off
        assert comment or zero or (key, value.strip()) in explained, f"{name}: {line}"


def test_facts_from_memory_are_said_to_be_unverified() -> None:
    told = [
        line
        for path in FOLDER.glob("*.toml")
        for line in path.read_text().splitlines()
        if "from memory" in line.lower()
    ]
    assert told
    assert all("unverified" in line for line in told)


def test_a_few_step_recipe_says_how_its_network_is_sampled() -> None:
    for name, steps in (("snapgen", 4), ("edgefusion", 4), ("sid_lsg", 1)):
        found = load_recipe(name)
        how = sampling_after(found, len(found.stages) - 1, FLOW)
        assert len(how.times) == how.steps == steps
        assert how.guidance == 1.0
        assert how.unit_start == (name != "sid_lsg")
    koala = load_recipe("koala")
    how = sampling_after(koala, 0, FLOW)
    assert (how.times, how.steps, how.guidance) == ((), 10, 3.5)


def test_a_few_step_network_stays_one_in_the_stages_after_it(tmp_path: Path) -> None:
    text = FEW + STAGE + "few_step_student = true\n" + OUTPUT
    found = load_recipe(write(tmp_path, text))
    before, after = few_times(found, FLOW)
    assert before == after
    assert len(after[0]) == 4


# What a file may hold


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[stage]", "not valid TOML"),
        ("", r"mine\.toml needs the key 'stage'"),
        ("stage = []", "at least one"),
        ("desciption = 'x'\n" + STAGE + OUTPUT, r"unknown key 'desciption' .*did you mean 'description'"),
        ("[studnet]\n" + STAGE + OUTPUT, "did you mean 'student'"),
        ("[student]\ninherits = true\n" + STAGE + OUTPUT, r"\[student\]; did you mean 'inherit'"),
        ("[student]\ninherit = 1\n" + STAGE + OUTPUT, r"\[student\]: inherit must be true or false, got 1"),
        ("[student]\nwidth_divisor = 0\n" + STAGE + OUTPUT, "width_divisor must be above 0, got 0"),
        ("[sampling]\nsteps = '20'\n" + STAGE + OUTPUT, r"\[sampling\]: steps must be a whole number, got '20'"),
        (STAGE, "needs the key 'objective'"),
        (STAGE + "objective = []\n", r"needs at least one \[\[stage.objective\]\]"),
        (STAGE.replace("lr = 1e-3\n", "") + OUTPUT, r"\[stage distil\] needs the key 'lr'"),
        (STAGE.replace("distil", "../distil") + OUTPUT, "needs a name of letters"),
        (STAGE + OUTPUT + STAGE + OUTPUT, "two stages are named 'distil'"),
        (STAGE + "warm_up = 5\n" + OUTPUT, "did you mean 'warmup'"),
        (STAGE + "warmup = true\n" + OUTPUT, "warmup must be a whole number, got True"),
        (STAGE + "lr = 1\n" + OUTPUT, "not valid TOML"),  # twice
        (STAGE.replace("1e-3", "0") + OUTPUT, "lr must be above 0"),
        (STAGE.replace("steps = 10", "steps = 0") + OUTPUT, "steps must be above 0"),
        (STAGE + "data = 'pictures'\n" + OUTPUT, "data must be one of 'images', 'prompts', got 'pictures'"),
        (STAGE + "betas = [0.9]\n" + OUTPUT, "betas must be a list of 2"),
        (STAGE + "null_share = 0.3\n" + OUTPUT, "one in a whole number"),
        (STAGE + "ema_decay = 1.5\n" + OUTPUT, "ema_decay must be from 0 to 1"),
        (STAGE + "sample_every = 7\n" + OUTPUT, "must be a multiple of checkpoint_every"),
        (STAGE + "remove = 'mid_block.resnets.0'\n" + OUTPUT, "remove must be a list, each a text"),
        (STAGE + OUTPUT.replace("output", "outptu"), "unknown objective 'outptu'; did you mean 'output'"),
        (STAGE + OUTPUT + "wieght = 1.0\n", r"\[objective output\]; did you mean 'weight'"),
        (STAGE + OUTPUT + "weight = 'much'\n", "weight must be a number, got 'much'"),
        (STAGE + OUTPUT + "space = 'pixels'\n", "space must be one of"),
        (STAGE + "[[stage.objective]]\nweight = 1.0\n", "an objective needs a name"),
        (FEW + "points = 7\n", r"\[objective consistency\].*points must divide"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in caught.value.message or "not valid TOML" in caught.value.message
    assert caught.value.exit_code == 2


def test_whole_numbers_do_for_numbers_and_lists_for_tuples(tmp_path: Path) -> None:
    found = load_recipe(write(tmp_path, STAGE + "clip = 1\nbetas = [0, 0.999]\n" + OUTPUT + "weight = 2\n"))
    (stage,) = found.stages
    assert stage.train.clip == 1.0
    assert isinstance(stage.train.clip, float)
    assert stage.train.betas == (0.0, 0.999)
    assert stage.goals[0].settings["weight"] == 2.0


def test_names_and_paths_that_are_not_there() -> None:
    with pytest.raises(UsageError, match="unknown recipe 'snapgne'; did you mean 'snapgen'"):
        load_recipe("snapgne")
    with pytest.raises(UsageError, match=r"no recipe file at nowhere\.toml"):
        load_recipe("nowhere.toml")


# Which stages may follow one another


def test_an_objective_that_needs_images_is_refused_prompts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stage 'distil': the objective output needs images") as caught:
        load_recipe(write(tmp_path, STAGE + 'data = "prompts"\n' + OUTPUT))
    assert "sid_lsg" in str(caught.value.hint)
    with pytest.raises(UsageError, match="the objective consistency needs images"):
        load_recipe(write(tmp_path, FEW.replace("[[stage.obj", 'data = "prompts"\n[[stage.obj')))
    gan = (
        '[[stage]]\nname = "d"\nsteps = 5\nbatch = 4\nlr = 1e-4\ndata = "prompts"\n[[stage.objective]]\nname = "dmd"\n'
    )
    assert load_recipe(write(tmp_path, gan)).stages[0].data == "prompts"
    with pytest.raises(UsageError, match="the objective dmd needs images"):
        load_recipe(write(tmp_path, gan + "gan_weight = 1e-3\n"))


def test_a_many_step_stage_is_refused_after_a_few_step_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'distil' trains a network that is sampled in many steps.*'few'") as caught:
        load_recipe(write(tmp_path, FEW + STAGE + OUTPUT))
    assert "few_step_student = true" in str(caught.value.hint)
    assert len(load_recipe(write(tmp_path, STAGE + OUTPUT + FEW)).stages) == 2


def test_a_decoder_and_a_denoiser_are_two_recipes(tmp_path: Path) -> None:
    paint = STAGE.replace("distil", "paint") + OUTPUT.replace("output", "reconstruction")
    with pytest.raises(UsageError, match="reconstruction trains image decoders, and output train denoisers"):
        load_recipe(write(tmp_path, paint + STAGE + OUTPUT))


def test_two_games_that_want_other_times_cannot_share_a_stage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="consistency and dmd make networks that are sampled at different times"):
        load_recipe(write(tmp_path, FEW + '[[stage.objective]]\nname = "dmd"\n'))


# Changes by --set and --steps


def test_set_changes_every_stage_one_stage_an_objective_or_a_table() -> None:
    changes = ["lr=1e-5", "few.batch=8", "distil.output.weight=2", "student.inherit=true", "sampling.steps=3"]
    two = load_recipe("snapgen-tiny", ["four_steps.batch=8", "lr=1e-5", "student.from_teacher=false"])
    assert [stage.train.batch for stage in two.stages] == [64, 8]
    assert {stage.train.lr for stage in two.stages} == {1e-5}
    assert not two.student.from_teacher
    found = load_recipe("shapes", [changes[2], changes[3], changes[4], "distil.precision=bf16"])
    assert found.stages[0].goals[0].settings["weight"] == 2.0
    assert found.student.inherit
    assert found.sampling.steps == 3
    assert found.stages[0].train.precision == "bf16"  # a text needs no quotes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lr", "--set takes KEY=VALUE, got 'lr'"),
        ("lrr=1", "did you mean 'lr'"),
        ("distill.lr=1", "unknown stage or table 'distill'.*did you mean 'distil'"),
        ("distil.outptu.weight=1", "unknown objective 'outptu'.*did you mean 'output'"),
        ("distil.output.wieght=1", "did you mean 'weight'"),
        ("lr=fast", "lr must be a number, got 'fast'"),
    ],
)
def test_a_bad_change_is_refused(change: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("shapes", [change])


def test_steps_are_shared_by_the_stages_in_proportion() -> None:
    assert scaled_steps([800, 400], 12) == [8, 4]
    assert scaled_steps([1000, 1, 1], 10) == [8, 1, 1]
    assert scaled_steps([1, 1, 1000], 3) == [1, 1, 1]
    assert [stage.train.steps for stage in load_recipe("edgefusion-tiny", steps=12).stages] == [8, 4]
    with pytest.raises(UsageError, match="1 steps cannot be shared by 2 stages"):
        load_recipe("edgefusion-tiny", steps=1)


def test_precision_replaces_every_stages() -> None:
    found = load_recipe("snapgen").with_precision("fp32")
    assert {stage.train.precision for stage in found.stages} == {"fp32"}
    assert load_recipe("snapgen").with_precision(None) == load_recipe("snapgen")
    with pytest.raises(UsageError, match="unknown precision 'fp61'; did you mean 'fp16'"):
        found.with_precision("fp61")


# Words and differences


def test_values_are_fitted_to_annotations_and_nothing_else_passes() -> None:
    assert fitted(3, float) == 3.0
    assert fitted([1, 2], tuple[int, ...]) == (1, 2)
    assert fitted([1, 0.5], tuple[float, float]) == (1.0, 0.5)
    assert fitted("a", Literal["a", "b"]) == "a"
    assert fitted(2, float | None) == 2.0
    assert fitted({"a": 1}, dict[str, Any]) == {"a": 1}
    for value, form in ((True, int), (1, bool), (1.0, int), ("c", Literal["a"]), ([1], tuple[str, ...]), (1, str)):
        with pytest.raises(UnfitError):
            fitted(value, form)
    assert words(tuple[str, ...] | None) == "a list, each a text"


def test_differences_name_the_stage_and_the_setting() -> None:
    one, other = load_recipe("shapes"), load_recipe("shapes", ["lr=1e-5", "distil.output.weight=2"])
    assert differences({"recipe": one.to_json()}, {"recipe": other.to_json()}) == [
        "recipe stage distil lr was 0.002 and is now 1e-05",
        "recipe stage distil objective output weight was 1.0 and is now 2.0",
    ]
    longer = load_recipe("ssd1b-tiny").to_json()
    (said,) = differences(longer, {**longer, "stage": longer["stage"][:1]})
    assert said == "stage decoder was another and is now not there"


def test_a_stages_record_holds_everything_that_trains_it() -> None:
    from nas.distill import TrainSettings

    record = load_recipe("shapes").stages[0].to_json()
    assert {each.name for each in fields(TrainSettings)} - {"seed"} <= set(record)
    assert tomllib.loads(as_toml(load_recipe("shapes")))["stage"][0]["objective"][0]["name"] == "output"
