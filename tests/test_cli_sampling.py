"""`nas sample` and `nas evaluate`, on the embedded task and on a pipeline of diffusers made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_lesson import candidate, write_teacher
from tiny_pipelines import stable_diffusion

from nas import bench
from nas.checkpoint import load_diffusers
from nas.cli import main
from nas.diffusion import NativeDenoiser
from nas.students import Sampling, load_student, save_student
from nas.teachers import load_teacher


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an untrained student of an untrained teacher."""
    folder = tmp_path_factory.mktemp("run")
    name = write_teacher(folder)
    loaded, _ = bench.embedded_lesson(name, "shapes")
    settings = bench.ProxySettings(width_divisor=32, norm_groups=2)
    denoiser = bench.student(bench.small_copy(candidate(), loaded, settings), loaded, 4, 0)
    about = {"teacher": name, "teacher_digest": bench.teacher_hash(name), "task": "shapes"}
    save_student(folder / "network.safetensors", denoiser, Sampling(steps=2, guidance=1.5), about)
    few = Sampling(times=(1.0, 0.7, 0.3))
    save_student(folder / "few" / "network.safetensors", denoiser, few, about)
    return folder


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that is the UNet of a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("latent")
    pipeline = stable_diffusion(folder / "pipeline")
    teacher = load_teacher(str(pipeline))
    network = load_diffusers(pipeline, height=8, width=8)
    denoiser = NativeDenoiser(network, teacher.schedule)
    about = {"teacher": str(pipeline)}
    save_student(folder / "network.safetensors", denoiser, Sampling(steps=2, guidance=2.0), about)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# nas sample


def test_prompts_are_drawn_checked_and_laid_out(capsys: pytest.CaptureFixture[str], embedded: Path, here: Path) -> None:
    texts = ["a red circle", "a blue square above a green triangle"]
    prompts = [word for text in texts for word in ("--prompt", text)]
    code, out, err = run(capsys, "sample", str(embedded), *prompts, "--count", "3", "--out", str(here / "x" / "a.png"))
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split("  ", 1)[1] for line in lines[:6]] == [texts[0]] * 3 + [texts[1]] * 3
    assert all(line.startswith(("right", "wrong")) for line in lines[:6])
    assert "correct" in lines[6]
    assert lines[-2] == f"wrote {here}/x/a.png"
    assert lines[-1] == f"next: nas evaluate {embedded}"
    # A row per prompt, a column per image: 3 of 128 and the lines between.
    assert size(here / "x" / "a.png") == (3 * 128 + 2 * 4, 2 * 128 + 4)


def test_without_prompts_it_draws_random_captions_into_the_run(
    capsys: pytest.CaptureFixture[str], embedded: Path
) -> None:
    found = []
    for seed in ("0", "0", "1"):
        code, out, _ = run(capsys, "sample", str(embedded), "--count", "2", "--seed", seed, "--json")
        assert code == 0
        found.append((json.loads(out), (embedded / "samples.png").read_bytes()))
    assert found[0] == found[1] != found[2]
    said = found[0][0]
    assert (said["steps"], said["guidance"], said["batch"]) == (2, 1.5, 16)
    assert {"prompt", "correct"} == set(said["images"][0])


def test_a_run_is_found_by_its_name(capsys: pytest.CaptureFixture[str], embedded: Path, here: Path) -> None:
    (here / "runs").mkdir()
    (here / "runs" / "mine").symlink_to(embedded)
    assert run(capsys, "sample", "mine", "--count", "1", "--steps", "1")[0] == 0
    code, _, err = run(capsys, "sample", "mime")
    assert code == 2
    assert "did you mean 'mine'?" in err


def test_a_few_step_network_takes_its_own_steps(capsys: pytest.CaptureFixture[str], embedded: Path, here: Path) -> None:
    few = str(embedded / "few")
    code, out, _ = run(capsys, "sample", few, "--count", "1", "--steps", "2", "--json", "--out", str(here / "a.png"))
    assert code == 0
    assert json.loads(out)["steps"] == 2
    code, _, err = run(capsys, "sample", few, "--steps", "8")
    assert code == 2
    assert "distilled to few steps and cannot be sampled in 8; possible are 1, 2, 3" in err
    code, _, err = run(capsys, "sample", few, "--guidance", "3")
    assert code == 2
    assert "--guidance changes nothing" in err


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["--prompt", "a red dog"], "caption 'a red dog' is not one of the task shapes", 2),
        (["--device", "gpu"], "unknown device to draw on 'gpu'", 2),
        (["--out", "/proc/none/a.png"], "cannot write to the output folder", 1),
    ],
)
def test_what_cannot_be_sampled_is_one_sentence(
    capsys: pytest.CaptureFixture[str], embedded: Path, arguments: list[str], sentence: str, code: int
) -> None:
    found, out, err = run(capsys, "sample", str(embedded), *arguments)
    assert found == code
    assert not out
    assert sentence in err


def test_a_changed_teacher_is_noticed(capsys: pytest.CaptureFixture[str], embedded: Path, here: Path) -> None:
    saved = load_student(embedded)
    save_student(here / "a.safetensors", saved.denoiser, saved.sampling, saved.about | {"teacher_digest": "0"})
    code, _, err = run(capsys, "sample", str(here / "a.safetensors"))
    assert code == 1
    assert "another version of the teacher" in err


# nas evaluate


def test_an_evaluation_stands_beside_the_teacher(
    capsys: pytest.CaptureFixture[str], embedded: Path, here: Path
) -> None:
    arguments = ["--prompts", "4", "--steps", "2,1", "--teacher-steps", "2", "--batch", "4", "--out", str(here)]
    code, out, err = run(capsys, "evaluate", str(embedded), *arguments)
    assert code == 0, err
    lines = out.splitlines()
    assert "4 prompts, seed 777" in lines[0]
    assert lines[1].split()[:2] == ["steps", "count"]
    assert "shapes-FD" in lines[1]
    assert [line.split()[0] for line in lines[3:7]] == ["student", "student", "teacher", "real"]
    assert "100.0%" in lines[6]
    assert lines[-1] == f"next: nas export {embedded / 'network.safetensors'}"
    assert "no FID" in err
    record = json.loads((here / "evaluation.json").read_text())
    assert [(row["who"], row["steps"], row["evaluations"]) for row in record["rows"]] == [
        ("student", 1, 2.0),
        ("student", 2, 4.0),
        ("teacher", 2, 4.0),
        ("real", 0, 0.0),
    ]
    assert record["rows"][3]["images_per_second"] is None
    assert record["rows"][0]["images_per_second"] > 0
    assert record["provenance"]["seed"] == 777
    assert record["guidance"] == 1.5
    assert size(here / "evaluation.png") == (4 * 128 + 3 * 4, 4 * 128 + 3 * 4)


def test_prompts_of_a_file(capsys: pytest.CaptureFixture[str], embedded: Path, here: Path) -> None:
    (here / "prompts.txt").write_text("a red circle\n\n a cyan square left of a red square\n")
    arguments = ["--prompts", "prompts.txt", "--steps", "1", "--teacher-steps", "1", "--out", ".", "--json"]
    code, out, err = run(capsys, "evaluate", str(embedded), *arguments)
    assert code == 0, err
    record = json.loads(out)
    assert (record["prompts"], record["prompts_from"]) == (2, "prompts.txt")
    (here / "prompts.txt").write_text("a red circle\n")
    assert "holds 1 prompts" in run(capsys, "evaluate", str(embedded), "--prompts", "prompts.txt")[2]


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["--prompts", "none.txt"], "a number or a text file", 2),
        (["--steps", "1,two"], "--steps must be whole numbers", 2),
        (["--steps", "0"], "--steps must be numbers from 1", 2),
        (["--teacher-steps", ","], "the teacher at some number of steps", 2),
        (["--split", "test"], "unknown split", 2),
        (["--prompts", "1"], "at least 2 prompts", 2),
        (["--fid-weights", "none.pt"], "the FID network none.pt does not exist", 1),
        (["--clip", "none"], "none cannot be loaded", 1),
        (["--real", "none"], "the folder of real pictures none does not exist", 1),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(
    capsys: pytest.CaptureFixture[str], embedded: Path, here: Path, arguments: list[str], sentence: str, code: int
) -> None:
    found, out, err = run(capsys, "evaluate", str(embedded), "--out", str(here), *arguments)
    assert found == code, err
    assert not out
    assert sentence in err
    assert not (here / "evaluation.json").exists()


# A pipeline of diffusers


def test_a_latent_student_draws_prompts_through_its_teachers_pipeline(
    capsys: pytest.CaptureFixture[str], latent: Path, here: Path
) -> None:
    prompts = ["--prompt", "a cat", "--prompt", "a dog"]
    code, out, err = run(capsys, "sample", str(latent), *prompts, "--count", "1", "--out", "a.png")
    assert code == 0, err
    assert out.splitlines()[:2] == ["a cat", "a dog"]
    # Latents of 8x8 are pictures of 16x16, enlarged eightfold.
    assert size(here / "a.png") == (2 * 128 + 8, 128)
    code, _, err = run(capsys, "sample", str(latent))
    assert code == 2
    assert "must be told prompts" in err


def test_a_student_that_is_its_teacher_is_as_good(capsys: pytest.CaptureFixture[str], latent: Path, here: Path) -> None:
    (here / "prompts.txt").write_text("a cat\na dog\na bee\n")
    arguments = ["--prompts", "prompts.txt", "--steps", "2", "--teacher-steps", "2", "--out", ".", "--json"]
    code, out, err = run(capsys, "evaluate", str(latent), *arguments)
    assert code == 0, err
    rows = json.loads(out)["rows"]
    assert [row["who"] for row in rows] == ["student", "teacher"]
    # The same network, once as ours and once as diffusers', on the same noise.
    assert rows[0]["scores"]["teacher_psnr_db"] is None or rows[0]["scores"]["teacher_psnr_db"] > 60
    code, _, err = run(capsys, "evaluate", str(latent), "--prompts", "4")
    assert code == 2
    assert "must be told prompts" in err
