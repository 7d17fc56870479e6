"""Cached data: rows by number from webdataset shards, batches as a function of the step, and what does not fit."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import latents_case as case
import numpy as np
import pytest
import torch
from torch import Tensor

from nas import registry
from nas.errors import NasError
from nas.tasks.latents import LatentBatches, Manifest, Shard, Store, Task, check_fit
from nas.tasks.latents import store as store_module
from nas.tasks.latents.shards import ShardWriter, build_index
from nas.tasks.latents.store import TARGETS_FORMAT, targets_file
from nas.teachers import GaussianTeacher, Scaling


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return case.write(tmp_path / "data", images=True)


def half(array: Any) -> Tensor:
    return torch.from_numpy(np.asarray(array)).float()


class TestShards:
    def test_webdataset_reads_them(self, store: Store) -> None:
        from webdataset.autodecode import Decoder, imagehandler
        from webdataset.tariterators import group_by_keys, tar_file_expander

        samples: list[dict[str, Any]] = []
        for shard in store.manifest.shards:
            with (store.folder / shard.name).open("rb") as stream:
                samples += map(
                    Decoder([imagehandler("rgb8")]),
                    group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}])),
                )
        assert len(samples) == 10
        for row, sample in enumerate(samples):
            assert sample["__key__"] == f"{row:09d}"
            assert sample["txt"] == f"caption {row}"
            np.testing.assert_array_equal(sample["latent.npy"], case.latent(row))
            np.testing.assert_array_equal(sample["png"], case.pixels(row))

    def test_equal_rows_make_equal_bytes(self, tmp_path: Path) -> None:
        first, again = case.write(tmp_path / "a"), case.write(tmp_path / "b")
        assert first.manifest.shards == again.manifest.shards
        assert first.digest == again.digest

    def test_a_shard_appears_only_when_it_is_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "data-000000.tar"

        def fail() -> None:
            with ShardWriter(path) as writer:
                writer.add("0", {"t": np.zeros(3)})
                assert not path.exists()
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_rows_of_other_fields_and_cut_files_are_named(self, store: Store, tmp_path: Path) -> None:
        other = ShardWriter(tmp_path / "other.tar")
        with other:
            other.add("000000010", {"tokens": case.tokens(10)})
        with pytest.raises(NasError, match=r"other\.tar: row 000000010 has tokens\.npy, and the rows before"):
            build_index([store.folder / store.manifest.shards[0].name, other.path])
        (tmp_path / "cut.tar").write_bytes(b"x" * 700)
        with pytest.raises(NasError, match=r"cut\.tar is not a readable shard"):
            build_index([tmp_path / "cut.tar"])


class TestStore:
    def test_rows_in_any_order(self, store: Store) -> None:
        rows = [9, 0, 4, 4]
        assert len(store) == 10
        torch.testing.assert_close(store.latents(rows), torch.stack([half(case.latent(row)) for row in rows]))
        text = store.conditions(rows)
        torch.testing.assert_close(text.tokens, torch.stack([half(case.tokens(row)) for row in rows]))
        assert text.pooled is not None
        assert text.pooled[:, 0].tolist() == rows
        assert text.tokens.dtype == torch.float32
        assert store.captions([3, 8]) == ["caption 3", "caption 8"]
        images = store.images([5])
        torch.testing.assert_close(images[0], half(case.pixels(5)).permute(2, 0, 1) / 127.5 - 1)

    def test_no_prompt_is_one_row(self, store: Store) -> None:
        null = store.null()
        assert torch.equal(null.tokens, torch.full((1, *case.TOKENS), 7.0))
        assert len(null) == 1

    def test_the_index_is_made_once(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        first = store.latents([7])

        def never(paths: object) -> None:
            raise AssertionError("indexed again")

        monkeypatch.setattr(store_module, "build_index", never)
        assert torch.equal(Store.open(store.folder).latents([7]), first)

    def test_travels_to_other_processes(self, store: Store) -> None:
        first = store.latents([1])
        assert torch.equal(pickle.loads(pickle.dumps(store)).latents([1]), first)

    def test_digest_follows_the_content_only(self, store: Store, tmp_path: Path) -> None:
        assert case.write(tmp_path / "moved", images=True).digest == store.digest
        assert case.write(tmp_path / "longer", rows=11, images=True).digest != store.digest
        assert replace(store.manifest, text={"name": "elsewhere"}).digest == store.digest

    def test_prompts_have_no_latents(self, tmp_path: Path) -> None:
        prompts = case.write(tmp_path / "p", latents=False)
        with pytest.raises(NasError, match="has prompts only, and images are needed"):
            prompts.latents([0])
        with pytest.raises(NasError, match="has no pixels"):
            prompts.images([0])

    def test_check_reads_everything(self, store: Store) -> None:
        seen: list[tuple[int, int]] = []
        store.check(lambda done, total, name: seen.append((done, total)))
        assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
        path = store.folder / "data-000001.tar"
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
        Store.open(store.folder)  # of the right length, so only reading it shows
        with pytest.raises(NasError, match=r"data-000001\.tar has changed since it was written"):
            store.check()


class TestDamage:
    def test_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(NasError, match="holds no cached data"):
            Store.open(tmp_path)
        (tmp_path / "data.ledger.json").write_text("{}")
        with pytest.raises(NasError, match="is not finished"):
            Store.open(tmp_path)

    def test_files_that_are_missing_or_cut(self, store: Store) -> None:
        path = store.folder / "data-000002.tar"
        path.write_bytes(path.read_bytes()[:-512])
        with pytest.raises(NasError, match=r"data-000002\.tar has .* bytes, the manifest beside it says"):
            Store.open(store.folder)
        path.unlink()
        with pytest.raises(NasError, match=r"data-000002\.tar is missing"):
            Store.open(store.folder)

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            (lambda data: data | {"format": "nas-latents-0"}, "has format 'nas-latents-0'"),
            (lambda data: {k: v for k, v in data.items() if k != "null"}, "is damaged"),
            (lambda data: [], "is damaged"),
        ],
    )
    def test_manifests(self, store: Store, change: Callable[[Any], Any], sentence: str) -> None:
        path = store.folder / "manifest.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        with pytest.raises(NasError, match=sentence):
            Store.open(store.folder)

    def test_a_manifest_comes_back_as_it_was(self, store: Store) -> None:
        assert Manifest.read(store.folder) == store.manifest


def write_targets(store: Store, digest: str = "d" * 64, rows: int = 10) -> None:
    """Answers that can be told apart: velocity 100 + row, without caption 200 + row, at t = (row + 1) / 20."""
    writer = ShardWriter(store.folder / f"targets-{digest[:16]}-000000.tar")
    with writer:
        for row in range(rows):
            noise = np.random.default_rng(3000 + row).normal(size=case.SHAPE).astype(np.float16)
            fields = {
                "noise": noise,
                "t": np.array((row + 1) / 20, np.float32),
                "velocity": np.full(case.SHAPE, 100 + row, np.float16),
                "null_velocity": np.full(case.SHAPE, 200 + row, np.float16),
            }
            writer.add(f"{row:09d}", fields)
    shard = writer.record()
    about = {
        "format": TARGETS_FORMAT,
        "data": store.digest,
        "teacher": "a/teacher",
        "teacher_digest": digest,
        "times": {"kind": "uniform", "statement": "as they came"},
        "shards": [{"name": shard.name, "rows": shard.rows, "bytes": shard.bytes, "sha256": shard.sha256}],
    }
    targets_file(store.folder, digest).write_text(json.dumps(about))


class TestTargets:
    def test_answers_come_with_their_noise_and_time(self, store: Store) -> None:
        write_targets(store)
        data = LatentBatches(store=store, size=6, null_share=0.5, targets=store.targets("d" * 64))
        seen = set()
        for step in range(6):
            batch = data.batch(step)
            assert batch.teacher is not None
            assert batch.teacher.null_velocity is not None
            rows = (batch.teacher.null_velocity[:, 0, 0, 0] - 200).int().tolist()
            assert torch.equal(batch.clean, store.latents(rows))
            torch.testing.assert_close(batch.t, (torch.tensor(rows) + 1) / 20)
            noise = [np.random.default_rng(3000 + row).normal(size=case.SHAPE).astype(np.float16) for row in rows]
            assert torch.equal(batch.noise, half(np.stack(noise)))
            # Without its caption a row has the answer to no caption.
            without = (batch.text.tokens == 7).flatten(1).all(1)
            wanted = torch.where(without, 200.0, 100.0) + torch.tensor(rows)
            assert torch.equal(batch.teacher.velocity[:, 1, 2, 3], wanted)
            seen |= set(without.tolist())
        assert seen == {True, False}
        assert data.statement() == "as they came (cached with the answers of a/teacher)"

    def test_of_another_teacher_there_are_none(self, store: Store) -> None:
        write_targets(store)
        assert store.targets("e" * 64) is None
        assert Task(store.folder).batches(4, teacher_digest="e" * 64).targets is None
        assert Task(store.folder).batches(4, teacher_digest="d" * 64).targets is not None

    def test_of_other_data_they_are_refused(self, store: Store) -> None:
        write_targets(store)
        path = targets_file(store.folder, "d" * 64)
        path.write_text(path.read_text().replace(store.digest, "0" * 64))
        with pytest.raises(NasError, match="are of other data or of another teacher"):
            store.targets("d" * 64)
        path.write_text("[]")
        with pytest.raises(NasError, match="is damaged"):
            store.targets("d" * 64)

    def test_check_reads_them_too(self, store: Store) -> None:
        write_targets(store)
        path = store.folder / f"targets-{'d' * 16}-000000.tar"
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
        with pytest.raises(NasError, match=r"targets-d+-000000\.tar has changed"):
            store.check()


@dataclass
class Fits:
    """A teacher that the data fits, but for what a test changes."""

    image_shape: tuple[int, ...] = (2, 4, 4)
    conditions: Any = None
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        self.conditions = self.conditions or {"tokens": 5, "pooled": 6}


class TestFit:
    def test_what_fits(self, store: Store) -> None:
        check_fit(store.manifest, Fits(scaling=Scaling.from_json(case.SCALING)))
        check_fit(store.manifest, Fits(scaling=Scaling(kind="AutoencoderTiny", factor=1.0)))
        check_fit(store.manifest, GaussianTeacher(mean=torch.zeros(2, 4, 4), sd=torch.tensor(1.0)))

    @pytest.mark.parametrize(
        ("teacher", "sentence"),
        [
            (Fits(image_shape=(16, 4, 4)), r"latents of 2 channels \(cached with the VAE a/vae\) and T takes 16"),
            (
                Fits(scaling=Scaling(kind="AutoencoderKL", factor=0.13025)),
                r"scaling factor 0\.18215 .* has 0\.13025; no factor makes",
            ),
            (
                Fits(scaling=Scaling(kind="AutoencoderKL", factor=0.18215, shift=0.1)),
                r"scaling shift 0\.0 .* has 0\.1",
            ),
            (Fits(conditions={"tokens": 768}), "T needs tokens of width 768, and the data, .* has them of width 5"),
            (Fits(conditions={"tokens": 5, "size_ids": 6}), "T needs size_ids of width 6, and the data.* has none"),
        ],
    )
    def test_what_does_not(self, store: Store, teacher: Fits, sentence: str) -> None:
        with pytest.raises(NasError, match=sentence):
            check_fit(store.manifest, teacher, "T")

    def test_of_prompts_only_the_text_counts(self, tmp_path: Path) -> None:
        prompts = case.write(tmp_path, latents=False)
        check_fit(prompts.manifest, Fits(image_shape=(16, 8, 8)))
        with pytest.raises(NasError, match="tokens of width 9"):
            check_fit(prompts.manifest, Fits(conditions={"tokens": 9}))


def test_the_task_opens_its_folder(store: Store) -> None:
    task = registry.load("nas.tasks", "latents").Task(store.folder)
    assert task.image_shape == case.SHAPE
    assert task.digest == store.digest
    assert len(task.batches(4).batch(0)) == 4
    assert len(task.prompts(3).batch(0)) == 3


def test_no_rows_are_refused(store: Store) -> None:
    replace(store.manifest, shards=()).write(store.folder)
    with pytest.raises(NasError, match="has no rows"):
        Store.open(store.folder)
    assert Shard(name="a", rows=1, bytes=2, sha256="b").rows == 1
