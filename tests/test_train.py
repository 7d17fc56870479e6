"""Runs of recipes, tiny: what they leave behind, how they resume, how stages follow one another, what is refused."""

from __future__ import annotations

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lesson import candidate, write_teacher
from train_cases import run, small, two_stages, weights

from nas.checkpoint import load_network, read_metadata
from nas.distill import checkpoint_files
from nas.errors import NasError, UsageError
from nas.features import body
from nas.students import load_student
from nas.targets import Fresh, Prompted
from nas.teachers import load_teacher, save_teacher, teacher_digest
from nas.train import RESULT, Subject, TrainResult, load_recipe, train_recipe


@pytest.fixture(scope="module")
def whole(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(small(), teacher, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def two(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return run(two_stages(tmp_path_factory.mktemp("recipe")), teacher, tmp_path_factory.mktemp("two"))


def stage(result: TrainResult | Path, name: str) -> Path:
    return (result if isinstance(result, Path) else result.folder) / "stages" / name


def dying(die_at: int, plain: Any) -> Any:
    """A `batch` that is interrupted at one turn."""

    def batch(self: Any, step: int, *part: Any) -> Any:
        if step == die_at:
            raise KeyboardInterrupt
        return plain(self, step, *part)

    return batch


# What a run leaves behind


def test_a_run_leaves_its_network_its_record_and_a_folder_per_stage(whole: TrainResult, teacher: str) -> None:
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == ["grid.png", "identity.json", "network.safetensors", "recipe.toml", "result.json", "stages"]
    names = sorted(path.name for path in stage(whole, "1-distil").iterdir())
    assert names == ["checkpoints", "logs", "losses.csv", "network.safetensors", "samples", "stage.json"]
    with (stage(whole, "1-distil") / "losses.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [int(line["step"]) for line in lines] == [2, 4, 6]
    assert set(lines[0]) == {"step", "loss", "output", "lr", "seconds"}
    record = json.loads((whole.folder / RESULT).read_text())
    assert whole.scores is not None
    assert record["scores"]["student"] == whole.scores.student
    assert record["identity"]["candidate"] == candidate().key
    assert record["provenance"]["seed"] == 0
    assert record["stages"][0]["steps"] == 6
    assert whole.scores.grid.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert whole.resumed_from is None
    assert whole.params == len(weights(whole))
    assert whole.scores.held_out_loss is not None
    assert whole.scores.held_out_loss > 0


def test_the_run_keeps_a_recipe_file_that_repeats_it(whole: TrainResult) -> None:
    assert load_recipe(str(whole.folder / "recipe.toml")).stages == small().stages


def test_student_and_teacher_are_judged_on_both_caption_sets(whole: TrainResult) -> None:
    assert whole.scores is not None
    for scores in (whole.scores.student, whole.scores.teacher):
        assert set(scores) == {"held-out", "all"}
        assert all(0 <= scores[split]["correct"] <= 1 for split in scores)


def test_the_saved_network_is_the_average_and_loads_as_the_same_denoiser(whole: TrainResult, teacher: str) -> None:
    found = load_student(whole.folder)
    state = torch.load(checkpoint_files(stage(whole, "1-distil") / "checkpoints")[0], weights_only=True)
    average = {name.removeprefix("network."): value for name, value in state["average"].items()}
    loaded = load_network(whole.weights).state_dict()
    assert all(torch.equal(average[name], loaded[name]) for name in loaded)
    assert found.denoiser.patch == 4  # type: ignore[union-attr]
    about = read_metadata(whole.weights)
    assert about["teacher"] == teacher
    assert about["teacher_digest"] == teacher_digest(teacher)
    assert (about["task"], about["recipe"], about["stage"]) == ("shapes", "shapes", "distil")
    assert (found.sampling.steps, found.sampling.times) == (1, ())


def test_progress_is_told_stage_by_stage(teacher: str, tmp_path: Path) -> None:
    told: list[tuple[str, float, float]] = []
    run(
        two_stages(tmp_path),
        teacher,
        tmp_path / "run",
        report=lambda name, done, total, _: told.append((name, done, total)),
    )
    assert ("1/2 distil", 4, 4) in told
    assert ("2/2 few", 0, 4) in told
    assert ("2/2 few", 4, 4) in told
    assert told[-1][0] == "check"


# Stages


def test_a_stage_starts_from_the_one_before_without_what_is_removed(two: TrainResult, teacher: str) -> None:
    before = load_network(stage(two, "1-distil") / "network.safetensors")
    after = load_network(two.weights)
    assert "mid_block.resnets.0" in [block.name for block in before.spec.blocks]
    assert [b.name for b in after.spec.blocks] == [
        b.name for b in before.spec.blocks if b.name != "mid_block.resnets.0"
    ]
    ours, theirs = after.state_dict(), before.state_dict()
    distance = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    # Adam moves a weight by at most about its rate per step: four of 1e-4 from where the first stage left it.
    assert 0 < distance < 4.5e-4
    assert two.stages[1].params == two.params < two.stages[0].params


def test_a_few_step_result_says_how_it_is_sampled(two: TrainResult) -> None:
    sampling = load_student(two.folder).sampling
    assert sampling.times == pytest.approx((0.714,))
    assert not sampling.unit_start
    assert load_student(stage(two, "1-distil")).sampling.times == ()
    assert two.scores is not None
    assert two.scores.held_out_loss is None


def test_stages_draw_different_examples(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    plain = Fresh.batch

    def noting(self: Fresh, step: int, *part: Any) -> Any:
        seeds.append(self.seed)
        return plain(self, step, *part)

    monkeypatch.setattr(Fresh, "batch", noting)
    recipe = load_recipe("ssd1b-tiny", ["batch=4", "sampling.images=2", "sampling.steps=1"], steps=2)
    run(recipe, teacher, tmp_path)
    assert len(set(seeds) - {777}) == 2  # 777: the drawings that the result is judged on


def test_a_student_of_the_teachers_own_network_starts_as_its_teacher(teacher: str, tmp_path: Path) -> None:
    recipe = two_stages(tmp_path, "distil.lr=1e-12", "few.lr=1e-12", "few.remove=[]")
    found = run(recipe, teacher, tmp_path / "run")
    own: Any = body(load_teacher(teacher))
    assert torch.allclose(weights(found), torch.cat([p.flatten() for p in own.parameters()]), atol=1e-6)


def test_a_candidate_inherits_what_fits(teacher: str, tmp_path: Path) -> None:
    fresh = run(small("lr=1e-12", steps=1), teacher, tmp_path / "new")
    inherited = run(small("lr=1e-12", "student.inherit=true", steps=1), teacher, tmp_path / "inherited")
    assert not torch.equal(weights(fresh), weights(inherited))
    theirs = body(load_teacher(teacher)).state_dict()["conv_in.weight"]
    ours = load_network(inherited.weights).state_dict()["conv_in.weight"]
    assert len(ours) < len(theirs)
    assert torch.allclose(ours, theirs[: len(ours)], atol=1e-6)


def test_a_later_teacher_teaches_from_its_stage_on(teacher: str, two: TrainResult, tmp_path: Path) -> None:
    other: Any = load_teacher(teacher)
    with torch.no_grad():
        for parameter in other.denoiser.parameters():
            parameter.mul_(1.1)
    path = str(save_teacher(tmp_path / "other.safetensors", other))
    found = run(two_stages(tmp_path, f'few.teacher="{path}"'), teacher, tmp_path / "run")
    first = "1-distil"
    assert torch.equal(
        weights(stage(found, first) / "network.safetensors"), weights(stage(two, first) / "network.safetensors")
    )
    assert not torch.equal(weights(found), weights(two))


# Killed and resumed


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [3, 5])
def test_a_killed_run_ends_with_the_same_weights(
    teacher: str, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    plain = Fresh.batch
    monkeypatch.setattr(Fresh, "batch", dying(die_at, plain))
    with pytest.raises(KeyboardInterrupt):
        run(small(), teacher, tmp_path)
    monkeypatch.setattr(Fresh, "batch", plain)
    resumed = run(small(), teacher, tmp_path)
    assert resumed.resumed_from == die_at // 2 * 2
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.scores is not None
    assert whole.scores is not None
    assert resumed.scores.student == whole.scores.student
    losses = [(stage(found, "1-distil") / "losses.csv").read_text().splitlines() for found in (resumed, whole)]
    assert [line.rsplit(",", 1)[0] for line in losses[0]] == [line.rsplit(",", 1)[0] for line in losses[1]]


@pytest.mark.slow
def test_a_run_killed_in_a_later_stage_ends_with_the_same_weights(
    teacher: str, two: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, plain = two_stages(tmp_path), Prompted.batch
    monkeypatch.setattr(Prompted, "batch", dying(5, plain))  # the student's turn of the third step
    with pytest.raises(KeyboardInterrupt):
        run(recipe, teacher, tmp_path / "run")
    monkeypatch.setattr(Prompted, "batch", plain)
    monkeypatch.setattr(Fresh, "batch", dying(0, Fresh.batch))  # the first stage is not run again
    monkeypatch.setattr("nas.train.scores._held_out_loss", lambda *_: 0.0)
    resumed = run(recipe, teacher, tmp_path / "run")
    assert resumed.resumed_from == 4 + 2
    assert torch.equal(weights(resumed), weights(two))


def test_a_finished_run_is_recognised(teacher: str, whole: TrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights(whole)
    monkeypatch.setattr("nas.train.run.train", lambda *_, **__: pytest.fail("trained again"))
    again = run(small(), teacher, whole.folder)
    assert again.resumed_from == 6
    assert torch.equal(weights(again), before)


# What is refused


def test_another_run_is_never_written_over(teacher: str, whole: TrainResult) -> None:
    before = whole.weights.read_bytes()
    with pytest.raises(NasError, match="already holds a run"):
        run(small(), teacher, whole.folder, resume=False)
    with pytest.raises(NasError, match=r"another one: recipe stage distil lr was 0\.002 and is now 1\.0"):
        run(small("lr=1.0"), teacher, whole.folder)
    with pytest.raises(NasError, match="seed was 0 and is now 1"):
        run(small(), teacher, whole.folder, seed=1)
    other = Subject(candidate=candidate(conv_0="separable-1"), teacher=teacher)
    with pytest.raises(NasError, match=r"another one: candidate was .* and is now"):
        train_recipe(small(), other, whole.folder)
    assert whole.weights.read_bytes() == before


def test_another_teacher_is_another_run(teacher: str, whole: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(NasError, match=r"teacher was .*teacher_digest was"):
        run(small(), write_teacher(tmp_path, seed=1), whole.folder)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint_before(
    teacher: str, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Fresh.batch

    def spoilt(self: Fresh, step: int, *part: Any) -> Any:
        found = plain(self, step, *part)
        if step == 4:
            assert found.clean is not None
            found.clean.fill_(float("nan"))
        return found

    monkeypatch.setattr(Fresh, "batch", spoilt)
    with pytest.raises(NasError, match=r"output is not finite at step 5 of 6 \(batch 4\)"):
        run(small(), teacher, tmp_path)
    kept = checkpoint_files(stage(tmp_path, "1-distil") / "checkpoints")
    assert [path.name for path in kept] == ["step-00000004.pt", "step-00000002.pt"]
    monkeypatch.setattr(Fresh, "batch", plain)
    resumed = run(small(), teacher, tmp_path)
    assert resumed.resumed_from == 4
    assert torch.equal(weights(resumed), weights(whole))


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    teacher: str, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fsync

    def full(handle: int) -> None:
        target = os.readlink(f"/proc/self/fd/{handle}")
        if "step-00000004" in target:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        NasError, match=r"step-00000004\.pt: No space left on device; the checkpoint of step 2 is kept"
    ) as caught:
        run(small(), teacher, tmp_path)
    assert "run the same command again" in str(caught.value.hint)
    folder = stage(tmp_path, "1-distil") / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000002.pt"]
    monkeypatch.setattr(os, "fsync", plain)
    resumed = run(small(), teacher, tmp_path)
    assert resumed.resumed_from == 2
    assert torch.equal(weights(resumed), weights(whole))


def test_recipes_and_candidates_that_do_not_go_together(teacher: str, tmp_path: Path) -> None:
    own = two_stages(tmp_path)
    with pytest.raises(UsageError, match="takes no candidate"):
        train_recipe(own, Subject(candidate=candidate(), teacher=teacher), tmp_path / "a")
    with pytest.raises(UsageError, match="needs a network to train") as caught:
        train_recipe(small(), Subject(candidate=None, teacher=teacher), tmp_path / "b")
    assert "STUDY#CANDIDATE" in str(caught.value.hint)
    with pytest.raises(UsageError, match=r"unknown block 'mid_blok.resnets.0' in recipe two, stage 'few'"):
        run(two_stages(tmp_path, 'few.remove=["mid_blok.resnets.0"]'), teacher, tmp_path / "c")
    with pytest.raises(UsageError, match="neither a folder nor a task"):
        train_recipe(small(), Subject(candidate=candidate(), teacher=teacher, data="nowhere"), tmp_path / "d")
    assert not any((tmp_path / name).exists() for name in "abcd")  # refused before anything is written


def test_a_later_teacher_with_another_text_encoder_is_refused(teacher: str, tmp_path: Path) -> None:
    other = write_teacher(tmp_path, seed=1)
    with pytest.raises(NasError, match="reads captions with another text encoder"):
        run(two_stages(tmp_path, f'few.teacher="{other}"'), teacher, tmp_path / "run")
    assert not (tmp_path / "run").exists()
