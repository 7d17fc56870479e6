"""Training at length, tiny: what a run leaves behind, how it resumes, and what can be sampled from it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_lesson import candidate, write_teacher

from nas import quality
from nas.build import build
from nas.checkpoint import load_network, read_metadata, save_network
from nas.distill import checkpoint_files
from nas.errors import NasError, UsageError
from nas.train import RecipeSettings, TrainResult, load_student, sample_checkpoint, train_candidate

SETTINGS = RecipeSettings(
    steps=6, batch=4, width_divisor=32, norm_groups=2, checkpoint_every=2, prompts=6, sampling_steps=2
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def whole(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train_candidate(candidate(), SETTINGS, tmp_path_factory.mktemp("run"), teacher=teacher)


def weights(result: TrainResult) -> torch.Tensor:
    return torch.cat([p.flatten() for p in load_network(result.weights).parameters()])


def test_a_run_leaves_weights_losses_grid_and_result(whole: TrainResult) -> None:
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == ["checkpoints", "grid.png", "identity.json", "losses.csv", "network.safetensors", "result.json"]
    with (whole.folder / "losses.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [int(line["step"]) for line in lines] == [2, 4, 6]
    assert set(lines[0]) == {"step", "loss", "output", "lr", "seconds"}
    record = json.loads((whole.folder / "result.json").read_text())
    assert record["scores"]["all"]["correct"] == whole.scores["all"]["correct"]
    assert record["identity"]["candidate"] == candidate().key
    assert record["provenance"]["seed"] == 0
    assert whole.grid.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert whole.resumed_from is None
    assert whole.params == sum(p.numel() for p in load_network(whole.weights).parameters())
    assert whole.held_out_loss > 0


def test_student_and_teacher_are_judged_on_both_caption_sets(whole: TrainResult) -> None:
    for scores in (whole.scores, whole.teacher_scores):
        assert set(scores) == {"held-out", "all"}
        assert all(0 <= scores[split]["correct"] <= 1 for split in scores)


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [3, 5])
def test_a_killed_run_ends_with_the_same_weights(
    teacher: str, whole: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: int
) -> None:
    from nas.targets import Fresh

    plain = Fresh.batch

    def dying(self: Fresh, step: int) -> object:
        if step == die_at:
            raise KeyboardInterrupt
        return plain(self, step)

    monkeypatch.setattr(Fresh, "batch", dying)
    with pytest.raises(KeyboardInterrupt):
        train_candidate(candidate(), SETTINGS, tmp_path, teacher=teacher)
    monkeypatch.setattr(Fresh, "batch", plain)
    resumed = train_candidate(candidate(), SETTINGS, tmp_path, teacher=teacher)
    assert resumed.resumed_from == die_at // 2 * 2
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.scores["all"]["correct"] == whole.scores["all"]["correct"]


def test_progress_is_told_in_stages(teacher: str, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    settings = replace(SETTINGS, steps=2, prompts=2)
    train_candidate(
        candidate(),
        settings,
        tmp_path,
        teacher=teacher,
        report=lambda stage, done, total, _: told.append((stage, done, total)),
    )
    assert told[0] == ("train", 2, 2)
    assert told[-1] == ("sample", 4, 4)


def test_another_run_is_never_written_over(teacher: str, whole: TrainResult) -> None:
    with pytest.raises(NasError, match="already holds a run"):
        train_candidate(candidate(), SETTINGS, whole.folder, teacher=teacher, resume=False)
    with pytest.raises(NasError, match="differs from this one in lr"):
        train_candidate(candidate(), replace(SETTINGS, lr=1.0), whole.folder, teacher=teacher)
    with pytest.raises(NasError, match="differs from this one in candidate, choices, network"):
        train_candidate(candidate(conv_0="separable-1"), SETTINGS, whole.folder, teacher=teacher)


def test_saved_network_is_the_average_and_loads_as_the_same_denoiser(teacher: str, whole: TrainResult) -> None:
    denoiser, lesson, _ = load_student(whole.weights)
    state = torch.load(checkpoint_files(whole.folder / "checkpoints")[0], weights_only=True)
    average = {name.removeprefix("network."): value for name, value in state["average"].items()}
    loaded = load_network(whole.weights).state_dict()
    assert all(torch.equal(average[name], loaded[name]) for name in loaded)
    assert denoiser.preconditioner == quality.embedded_lesson(teacher, "shapes")[0].preconditioner
    assert denoiser.patch == 4
    assert lesson.teacher.null_text().shape == (1, 12, 8)


def test_sampling_given_captions(whole: TrainResult, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    asked = ["a red circle", "a blue square above a green triangle"]
    first = sample_checkpoint(whole.folder, asked, grid, count=2, steps=2)
    assert first.captions == (asked[0], asked[0], asked[1], asked[1])
    assert first.images.shape == (4, 3, 32, 32)
    assert len(first.correct) == 4
    assert grid.is_file()
    again = sample_checkpoint(whole.weights, asked, grid, count=2, steps=2)
    assert torch.equal(first.images, again.images)
    other = sample_checkpoint(whole.weights, asked, grid, count=2, steps=2, seed=1)
    assert not torch.equal(first.images, other.images)
    unguided = sample_checkpoint(whole.weights, asked, grid, count=2, steps=2, guidance=1.0)
    assert not torch.equal(first.images, unguided.images)


def test_sampling_without_captions_takes_held_out_ones(whole: TrainResult, tmp_path: Path) -> None:
    found = sample_checkpoint(whole.weights, [], tmp_path / "grid.png", count=3, steps=1)
    task = quality.embedded_lesson(_teacher_of(whole), "shapes")[1].task
    held_out = {caption.text for caption in task.captions("held-out")}  # type: ignore[attr-defined]
    assert len(found.captions) == 3
    assert set(found.captions) <= held_out


def _teacher_of(result: TrainResult) -> str:
    return str(read_metadata(result.weights)["teacher"])


def test_sampling_refuses_what_it_cannot_read(whole: TrainResult, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    with pytest.raises(UsageError, match="a purple dog"):
        sample_checkpoint(whole.weights, ["a purple dog"], grid)
    with pytest.raises(NasError, match="no weights file"):
        sample_checkpoint(tmp_path, ["a red circle"], grid)
    bare = save_network(tmp_path / "bare.safetensors", build(load_network(whole.weights).spec))
    with pytest.raises(NasError, match="not a network that nas train wrote"):
        sample_checkpoint(bare, ["a red circle"], grid)
    about = {**read_metadata(whole.weights), "teacher_digest": "another"}
    stale = save_network(tmp_path / "stale.safetensors", load_network(whole.weights), about)
    with pytest.raises(NasError, match="another version of the teacher"):
        sample_checkpoint(stale, ["a red circle"], grid)
    assert not grid.exists()


def test_text_weight_trains_on_both_answers(teacher: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=2, prompts=2, text_weight=0.5)
    train_candidate(candidate(), settings, tmp_path, teacher=teacher)
    header = (tmp_path / "losses.csv").read_text().splitlines()[0]
    assert header == "step,loss,output,text,lr,seconds"
