"""Images and captions as people have them: found, decoded, cut, and refused in one sentence."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_cases import folder_of_images, one_image, picture
from PIL import Image

from nas.cache.pixels import square
from nas.cache.sources import Item, find_images, read_prompts
from nas.errors import NasError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("images"))


class TestSources:
    def test_texts_beside_images(self, images: Path) -> None:
        found = find_images(images)
        assert [item.name for item in found] == [f"{number:02d}.png" for number in range(7)]
        assert found[2].caption == "picture c"
        assert found[2].read() == (images / "02.png").read_bytes()

    @pytest.mark.parametrize(
        ("table", "line"),
        [
            ("metadata.jsonl", '{{"file_name": "{0}", "text": "about {0}"}}'),
            ("captions.jsonl", '{{"file_name": "{0}", "caption": "about {0}"}}'),
            ("metadata.csv", "{0},about {0}"),
        ],
    )
    def test_tables_of_image_folders(self, tmp_path: Path, table: str, line: str) -> None:
        names = ["a.jpg", "deep/b.webp"]
        (tmp_path / "deep").mkdir()
        for number, name in enumerate(names):
            picture(number).save(tmp_path / name)
        head = ["file_name,text"] if table.endswith(".csv") else []
        (tmp_path / table).write_text("\n".join([*head, *(line.format(name) for name in names)]) + "\n")
        assert [(item.name, item.caption) for item in find_images(tmp_path)] == [(n, f"about {n}") for n in names]

    def test_webdataset_shards(self, tmp_path: Path, images: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for number in (3, 1):
                tar.add(images / f"{number:02d}.png", f"x/{number}.png")
                tar.add(images / f"{number:02d}.txt", f"x/{number}.txt")
        for source in (tmp_path, tmp_path / "a.tar"):
            found = find_images(source)
            assert [item.caption for item in found] == ["picture d", "picture b"]
            assert found[0].read() == (images / "03.png").read_bytes()

    def test_missing_captions_name_the_first(self, tmp_path: Path) -> None:
        folder_of_images(tmp_path, 6)
        for number in (0, 2, 3, 5):
            (tmp_path / f"{number:02d}.txt").unlink()
        sentence = r"4 of 6 images in .* have no caption: 00\.png, 02\.png, 03\.png and 1 more$"
        with pytest.raises(NasError, match=sentence):
            find_images(tmp_path)
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            tar.add(tmp_path / "00.png", "1.png")
        with pytest.raises(NasError, match=r"1 of 1 samples in .*a\.tar have no caption: 1\.png"):
            find_images(tmp_path / "a.tar")

    @pytest.mark.parametrize(
        ("make", "sentence"),
        [
            (lambda at: None, "holds no images"),
            (lambda at: (at / "metadata.jsonl").write_text("{"), "holds no images"),
            (lambda at: (at / "x.tar").write_bytes(b"no"), "not a readable tar file"),
            (lambda at: one_image(at, "x.tar", ""), r"both images and \.tar shards"),
            (
                lambda at: one_image(at, "metadata.jsonl", '{"file_name": "b.png", "text": "x"}'),
                r"metadata\.jsonl, line 1 names b\.png, which is not in",
            ),
            (
                lambda at: one_image(at, "metadata.jsonl", '{"file_name": "a.png", "label": 1}'),
                "line 1 must have file_name and one of text, caption, prompt, got file_name, label",
            ),
            (lambda at: one_image(at, "a.txt", b"\xff\xfe"), r"a\.txt is not UTF-8 text"),
        ],
    )  # fmt: skip
    def test_bad_folders(self, tmp_path: Path, make: Callable[[Path], object], sentence: str) -> None:
        make(tmp_path)
        with pytest.raises(NasError, match=sentence):
            find_images(tmp_path)
        with pytest.raises(NasError, match="no folder of images at"):
            find_images(tmp_path / "nowhere")

    def test_prompts_are_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "p.txt"
        path.write_text("one\n\n  two  \n")
        assert read_prompts(path) == ["one", "two"]
        path.write_text("\n")
        with pytest.raises(NasError, match="has no prompts in it"):
            read_prompts(path)


class TestPixels:
    def item(self, path: Path) -> Item:
        return Item(name=path.name, caption="x", path=path, place=None, size=0)

    @pytest.mark.parametrize(
        ("width", "height", "corner"), [(32, 16, (0, 8)), (16, 48, (16, 0)), (8, 8, (0, 0)), (64, 32, (0, 8))]
    )
    def test_the_middle_is_cut_after_resizing(
        self, tmp_path: Path, width: int, height: int, corner: tuple[int, int]
    ) -> None:
        picture(1, width, height).save(tmp_path / "a.png")
        pixels, crop = square(self.item(tmp_path / "a.png"), 16)
        assert pixels.shape == (16, 16, 3)
        assert (crop.original, crop.corner, crop.size) == ((height, width), corner, (16, 16))
        if min(width, height) == 16:  # nothing to resize
            top, left = corner
            whole = np.asarray(picture(1, width, height))
            np.testing.assert_array_equal(pixels, whole[top : top + 16, left : left + 16])

    def test_transparency_is_white_and_grey_is_colour(self, tmp_path: Path) -> None:
        Image.new("RGBA", (16, 16), (10, 20, 30, 0)).save(tmp_path / "a.png")
        assert square(self.item(tmp_path / "a.png"), 16)[0].min() == 255
        Image.new("L", (16, 16), 40).save(tmp_path / "b.png")
        assert square(self.item(tmp_path / "b.png"), 16)[0].tolist()[0][0] == [40, 40, 40]

    def test_the_cameras_orientation_is_followed(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by a quarter
        picture(1, 32, 16).save(tmp_path / "a.png", exif=exif)
        assert square(self.item(tmp_path / "a.png"), 16)[1].original == (32, 16)
