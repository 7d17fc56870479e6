"""`nas cache`: what is read from images and captions, what is written, and that a killed run loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from image_cases import folder_of_images

from nas import cache as cache_module
from nas.cache import CacheSettings, TargetSettings, cache_images, cache_prompts, cache_targets, check
from nas.cache.pixels import square
from nas.cache.sources import find_images
from nas.cli import main
from nas.diffusion import noised
from nas.errors import NasError
from nas.tasks.latents import Store, Task
from nas.teachers import DiffusersTeacher, load_pipeline, load_teacher, teacher_digest


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.stable_diffusion(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.sdxl(tmp_path_factory.mktemp("sdxl")))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("images"))


def settings(pipeline: str, **options: Any) -> CacheSettings:
    return CacheSettings(pipeline=pipeline, **{"batch": 3, "shard_rows": 3, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


class TestImages:
    def test_what_is_stored_is_what_the_pipeline_gives(self, images: Path, sdxl: str, tmp_path: Path) -> None:
        store = cache_images(images, settings(sdxl, keep_images=True), tmp_path / "d")
        pipe = load_pipeline(sdxl)
        assert len(store) == 7
        assert [shard.rows for shard in store.manifest.shards] == [3, 3, 1]
        assert store.manifest.latent_shape == (4, 8, 8)
        assert store.manifest.image_size == 16
        rows = [4, 1]
        items = find_images(images)
        cut = [square(items[row], 16) for row in rows]
        pixels = torch.from_numpy(np.stack([each for each, _ in cut])).permute(0, 3, 1, 2).float() / 127.5 - 1
        torch.testing.assert_close(store.images(rows), pixels)
        torch.testing.assert_close(store.latents(rows), pipe.encode_images(pixels), rtol=1e-3, atol=1e-3)
        text, wanted = store.conditions(rows), pipe.encode(["picture e", "picture b"], [crop for _, crop in cut])
        torch.testing.assert_close(text.tokens, wanted.tokens, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(text.pooled, wanted.pooled, rtol=1e-3, atol=1e-3)
        assert text.size_ids is not None
        assert text.size_ids.tolist() == [[20, 24, 0, 1, 16, 16], [20, 21, 0, 0, 16, 16]]
        null = store.null()
        torch.testing.assert_close(null.tokens, pipe.null().tokens)
        assert null.size_ids is None
        assert store.captions([6]) == ["picture g"]
        # Of no caption, the sizes are still those of the image.
        batch = Task(tmp_path / "d").batches(4, null_share=1.0).batch(0)
        assert torch.equal(batch.text.tokens, null.tokens.expand(4, -1, -1))
        assert batch.text.size_ids is not None
        assert set(batch.text.size_ids[:, 0].tolist()) == {20.0}
        assert store.manifest.vae["scaling"]["factor"] == 0.13025
        assert store.manifest.text["encoders"] == ["CLIPTextModel", "CLIPTextModelWithProjection"]

    def test_another_vae(self, images: Path, sd: str, tmp_path: Path) -> None:
        tiny.vae(channels=8).save_pretrained(tmp_path / "vae")
        store = cache_images(images, settings(sd, vae=str(tmp_path / "vae")), tmp_path / "d")
        assert store.manifest.latent_shape == (8, 8, 8)

    def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
        self, images: Path, sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = cache_images(images, settings(sd), tmp_path / "whole")
        calls: list[int] = []
        plain = cache_module._Maker._write

        def dying(self: Any, *arguments: Any) -> None:
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            plain(self, *arguments)

        monkeypatch.setattr(cache_module._Maker, "_write", dying)
        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            cache_images(images, settings(sd), out)
        assert sorted(files(out)) == ["data-000000.tar", "data.ledger.json"]
        with pytest.raises(NasError, match="is not finished"):
            Store.open(out)
        (out / ".data-000001.tar.unfinished").write_bytes(b"what SIGKILL leaves")
        again = cache_images(images, settings(sd), out)
        assert len(calls) == 2 + 2  # the first shard was not made again
        assert again.digest == whole.digest
        assert files(out) == files(tmp_path / "whole")
        assert not list(out.glob(".*.unfinished"))

    def test_finished_data_is_left_and_lost_files_are_made_again(
        self, images: Path, sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache_images(images, settings(sd), tmp_path)
        before = files(tmp_path)
        (tmp_path / "data-000001.tar").unlink()
        (tmp_path / "data-000000.tar").write_bytes(before["data-000000.tar"][:-512])
        cache_images(images, settings(sd), tmp_path)
        assert files(tmp_path) == before

        def never(self: object, *arguments: object) -> None:
            raise AssertionError("made again")

        monkeypatch.setattr(cache_module._Maker, "_write", never)
        assert len(cache_images(images, settings(sd), tmp_path)) == 7

    def test_data_of_other_settings_is_not_continued(self, images: Path, sd: str, sdxl: str, tmp_path: Path) -> None:
        cache_images(images, settings(sd), tmp_path / "d")
        for other, sentence in (
            (settings(sd, size=8), "size was 16 and is now 8"),
            (settings(sdxl), "text encoders was .* VAE was"),
        ):
            with pytest.raises(NasError, match=f"was made otherwise: .*{sentence}"):
                cache_images(images, other, tmp_path / "d")
        more = folder_of_images(tmp_path / "more", 8)
        with pytest.raises(NasError, match="was made otherwise: images was"):
            cache_images(more, settings(sd), tmp_path / "d")

    def test_unreadable_images(self, sd: str, tmp_path: Path) -> None:
        source = folder_of_images(tmp_path / "images", 5)
        (source / "03.png").write_bytes((source / "03.png").read_bytes()[:90])
        with pytest.raises(NasError, match=r"the image 03\.png cannot be read"):
            cache_images(source, settings(sd), tmp_path / "d")
        store = cache_images(source, settings(sd, skip_unreadable=True), tmp_path / "d")
        assert store.manifest.skipped == ("03.png",)
        assert store.captions(range(4)) == [f"picture {letter}" for letter in "abce"]

    def test_nothing_readable(self, sd: str, tmp_path: Path) -> None:
        source = folder_of_images(tmp_path / "images", 1)
        (source / "00.png").write_bytes(b"no")
        with pytest.raises(NasError, match="none of the 1 images could be read"):
            cache_images(source, settings(sd, skip_unreadable=True), tmp_path / "d")

    def test_values_that_overflow_are_refused(
        self, images: Path, sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from nas.teachers import Vae

        monkeypatch.setattr(Vae, "encode", lambda self, x: torch.full((len(x), 4, 8, 8), 1e6))
        with pytest.raises(NasError, match=r"the latents of the image 00\.png .* not finite in float16"):
            cache_images(images, settings(sd), tmp_path / "d")

    def test_a_full_disk_keeps_what_is_finished(
        self, images: Path, sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from nas.tasks.latents.shards import ShardWriter

        plain, calls = ShardWriter.add, list[str]()

        def full(self: Any, key: str, fields: Any) -> None:
            calls.append(key)
            if len(calls) == 5:
                raise OSError(28, "No space left on device")
            plain(self, key, fields)

        monkeypatch.setattr(ShardWriter, "add", full)
        with pytest.raises(NasError, match="No space left on device; 1 finished shards are kept"):
            cache_images(images, settings(sd), tmp_path / "d")
        assert len(cache_images(images, settings(sd), tmp_path / "d")) == 7

    def test_two_at_once_and_strange_folders_are_refused(self, images: Path, sd: str, tmp_path: Path) -> None:
        from filelock import FileLock

        (tmp_path / "d").mkdir()
        with FileLock(tmp_path / "d" / ".lock"), pytest.raises(NasError, match="another nas cache is writing"):
            cache_images(images, settings(sd), tmp_path / "d")
        (tmp_path / "d" / "thesis.tex").touch()
        with pytest.raises(NasError, match=r"holds thesis\.tex, which is no cached data"):
            cache_images(images, settings(sd), tmp_path / "d")

    def test_sizes_that_do_not_fit_the_vae(self, images: Path, sd: str, tmp_path: Path) -> None:
        with pytest.raises(NasError, match="15x15 px do not fit the VAE"):
            cache_images(images, settings(sd, size=15), tmp_path / "d")

    @pytest.mark.parametrize("options", [{"batch": 0}, {"shard_rows": 0}, {"size": 0}, {"precision": "fp8"}])
    def test_settings_are_checked(self, options: dict[str, Any]) -> None:
        with pytest.raises(NasError, match=r"of at least 1|unknown precision"):
            settings("x", **options)


class TestPrompts:
    def test_prompts_alone(self, sd: str, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("a cat\na dog\nthe sea\na hill\n")
        store = cache_prompts(tmp_path / "p.txt", settings(sd), tmp_path / "d")
        assert len(store) == 4
        assert store.manifest.latent_shape is None
        wanted = load_pipeline(sd, vae=False).encode(["the sea"]).tokens
        torch.testing.assert_close(store.conditions([2]).tokens, wanted, rtol=1e-3, atol=1e-3)
        assert len(Task(tmp_path / "d").prompts(3).batch(0)) == 3


class TestTargets:
    def asked(self, sd: str, **options: Any) -> TargetSettings:
        return TargetSettings(teacher=sd, **{"batch": 2, **options})

    def test_answers_are_the_teachers(
        self, images: Path, sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[torch.Tensor] = []
        plain = DiffusersTeacher.velocity

        def heard(self: DiffusersTeacher, x: torch.Tensor, t: torch.Tensor, text: Any) -> torch.Tensor:
            asked.extend(x)
            return plain(self, x, t, text)

        cache_images(images, settings(sd), tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(DiffusersTeacher, "velocity", heard)
            targets = cache_targets(tmp_path, self.asked(sd))
        data = Task(tmp_path).batches(6, null_share=0.5, teacher_digest=teacher_digest(sd))
        assert data.targets is not None
        teacher, batch = load_teacher(sd), data.batch(1)
        x, t = batch.point()
        assert torch.equal(x, noised(batch.clean, batch.noise, t))
        # To the last bit where the teacher was asked, rounding to float16 included.
        assert all(any(torch.equal(row, other) for other in asked) for row in x)
        assert batch.teacher is not None
        torch.testing.assert_close(batch.teacher.velocity, teacher.velocity(x, t, batch.text), rtol=2e-3, atol=2e-3)
        null = teacher.velocity(x, t, batch.null_text.like(batch.text))
        torch.testing.assert_close(batch.teacher.null_velocity, null, rtol=2e-3, atol=2e-3)
        grid = teacher.schedule.times(torch.arange(1000))
        assert all(bool(torch.isclose(grid, each, atol=1e-6).any()) for each in t)
        assert "uniform" in targets.times["statement"]
        check(tmp_path)

    def test_are_taken_up_and_not_asked_twice(
        self, images: Path, sd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from nas.cache import targets as module

        cache_images(images, settings(sd), tmp_path)
        plain, calls = module._ask, list[range]()

        def dying(writer: Any, store: Any, teacher: Any, times: Any, how: Any, rows: range, tick: Any) -> list[str]:
            calls.append(rows)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return plain(writer, store, teacher, times, how, rows, tick)

        monkeypatch.setattr(module, "_ask", dying)
        with pytest.raises(KeyboardInterrupt):
            cache_targets(tmp_path, self.asked(sd))
        assert Task(tmp_path).store.targets(teacher_digest(sd)) is None
        cache_targets(tmp_path, self.asked(sd))
        cache_targets(tmp_path, self.asked(sd))
        assert [rows.start for rows in calls] == [0, 3, 3, 6]
        with pytest.raises(NasError, match="was made otherwise: seed was 0 and is now 1"):
            cache_targets(tmp_path, self.asked(sd, seed=1))

    def test_a_teacher_that_does_not_fit(self, images: Path, sd: str, sdxl: str, tmp_path: Path) -> None:
        cache_images(images, settings(sd), tmp_path / "d")
        with pytest.raises(NasError, match=r"scaling factor 0\.18215 .* has 0\.13025"):
            cache_targets(tmp_path / "d", self.asked(sdxl))
        with pytest.raises(NasError, match=r"latents of 4 channels .* and the teacher embedded takes 3"):
            cache_targets(tmp_path / "d", self.asked("embedded"))


class TestCommand:
    def test_says_what_it_made_and_what_comes_next(
        self, images: Path, sd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = str(tmp_path / "d")
        command = ["cache", str(images), "--pipeline", sd, "--out", out, "--shard-rows", "4", "--teacher-targets", sd]
        assert main(command) == 0
        said = capsys.readouterr()
        assert "7 latents of 4x8x8 with tokens 8x16; " in said.out
        assert " in 2 shards" in said.out
        assert "training times are uniform" in said.out
        assert f"wrote {out}" in said.out
        assert f"next: nas train STUDY#CANDIDATE --teacher {sd} --data {out}" in said.out
        assert "cache 7/7" in said.err
        assert "targets 7/7" in said.err
        assert main([*command, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert (answer["rows"], answer["shards"], answer["latent_shape"]) == (7, 2, [4, 8, 8])
        assert answer["digest"] == Store.open(Path(out)).digest
        assert main(["cache", "--out", out, "--check"]) == 0
        assert "7 rows read, every file has its hash" in capsys.readouterr().out
        (tmp_path / "d" / "data-000000.tar").unlink()
        assert main(["cache", "--out", out, "--check"]) == 1
        assert "data-000000.tar is missing" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("words", "sentence", "code"),
        [
            (["--out", "x"], "nas: nas cache needs a folder of images or --prompts FILE", 2),
            (["images", "--out", "x"], "nas: nas cache needs --pipeline, whose text encoders", 2),
            (["images", "--prompts", "p"], "nas: give either images or --prompts, and not both", 2),
            (["images", "--check"], "nas: --check makes nothing", 2),
            (["images", "--pipeline", "p", "--device", "tpu"], "nas: unknown device to encode on 'tpu'", 2),
            (["nowhere", "--pipeline", "p"], "nas: there is no folder of images at nowhere", 1),
            (["--check", "--out", "nowhere"], "nas: nowhere holds no cached data", 1),
            (["--out", "nowhere", "--teacher-targets", "embedded"], "nas: nowhere holds no cached data", 1),
        ],
    )
    def test_one_sentence_each(
        self,
        words: list[str],
        sentence: str,
        code: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert main(["cache", *words]) == code
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nas: ")]
        assert len(said) == 1
        assert said[0].startswith(sentence)
