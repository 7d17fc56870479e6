"""FID and CLIP score with tiny random networks: the arithmetic is ours, the networks come from files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import TOKENS, clip_tokenizer, seeded
from torch import Tensor, nn
from torch.nn import functional

from nas.errors import NasError
from nas.judge import frechet_distance, load_clip, load_inception, read_pictures, statistics
from nas.judge.networks import pixels


class Features(nn.Module):
    """What the published file looks like from outside: pixels in, features out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride=3)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        hidden = torch.relu(self.conv(img.float() / 127.5 - 1))
        return hidden.mean((2, 3)) if return_features else hidden


def write_network(path: Path, module: nn.Module) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return str(path)


def random_pictures(count: int, seed: int, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    return write_network(tmp_path_factory.mktemp("fid") / "inception.pt", Features())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "bos_token_id": len(tokenizer) - 2,
        "eos_token_id": len(tokenizer) - 1,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    seeded(lambda: CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


def test_pixels_are_those_of_a_file() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert pixels(values)[0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_fid_is_the_distance_of_the_networks_features(weights: str) -> None:
    fid = load_inception(weights)
    one, other = random_pictures(40, 0), random_pictures(50, 1) * 0.5
    features = [statistics([fid.network(pixels(each), return_features=True)]) for each in (one, other)]
    assert fid.score(one, [], other) == pytest.approx(frechet_distance(*features), rel=1e-4)
    assert fid.score(one, [], one) == pytest.approx(0, abs=1e-6)
    assert fid.score(one, [], one * 0.9) < fid.score(one, [], other)
    with pytest.raises(NasError, match="compares with other pictures"):
        fid.score(one, [], None)


def test_a_file_that_is_no_network_for_fid_is_refused(tmp_path: Path) -> None:
    class Map(nn.Module):
        def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
            return img.float()

    with pytest.raises(NasError, match=r"gives no features \[B, F\]"):
        load_inception(write_network(tmp_path / "map.pt", Map()))
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(NasError, match="no TorchScript network"):
        load_inception(str(tmp_path / "text.pt"))
    with pytest.raises(NasError, match="does not exist") as raised:
        load_inception(str(tmp_path / "missing.pt"))
    assert raised.value.hint is not None
    assert "inception-2015-12-05.pt" in raised.value.hint
    with pytest.raises(NasError, match="does not exist"):
        load_inception("inception-2015-12-05.pt")


def test_an_unreachable_hub_file_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NasError, match="cannot be fetched"):
        load_inception("somebody/something/inception.pt")
    with pytest.raises(NasError, match="cannot be fetched"):
        load_clip("somebody/clip")


def test_the_clip_score_is_that_of_the_models_own_embeddings(clip_folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pictures, texts = random_pictures(34, 2), [f"a {'abc'[i % 3]} b" for i in range(34)]
    score = load_clip(str(clip_folder)).score(pictures, texts, None)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    words = CLIPTokenizer.from_pretrained(clip_folder)(texts, padding=True, return_tensors="pt")
    shown: Any = [image.permute(1, 2, 0).numpy() for image in pixels(pictures)]
    values = CLIPImageProcessorPil.from_pretrained(clip_folder)(images=shown, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        said = model(**words, pixel_values=values)
    # The model's logits are its scale times the cosines.
    cosines = torch.diagonal(said.logits_per_image) / model.logit_scale.detach().exp()
    assert score == pytest.approx(float(100 * cosines.clamp_min(0).mean()), rel=1e-4)
    assert cosines.min() < 0 < cosines.max()  # or the clamp would not be tested
    other = load_clip(str(clip_folder)).score(pictures, texts[::-1], None)
    assert other != pytest.approx(score, rel=1e-6)


def test_long_prompts_are_cut_and_pairs_are_needed(clip_folder: Path) -> None:
    score = load_clip(str(clip_folder))
    assert 0 <= score.score(random_pictures(2, 0), ["a b c d e f g h i j k l m n o p", "a"], None) <= 100
    with pytest.raises(NasError, match="one text per picture, got 1 and 2"):
        score.score(random_pictures(2, 0), ["a"], None)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NasError, match="cannot be loaded"):
        load_clip(str(tmp_path))


def test_real_pictures_are_read_cut_and_resized(tmp_path: Path) -> None:
    tall = np.zeros((40, 20, 3), dtype=np.uint8)
    tall[10:30] = (255, 0, 51)  # what a square cut from the middle holds
    (tmp_path / "inner").mkdir()
    Image.fromarray(tall).save(tmp_path / "inner" / "b.png")
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(tmp_path / "a.png")
    found = read_pictures(tmp_path, (16, 16))
    assert found.shape == (2, 3, 16, 16)
    assert torch.equal(found[0], torch.ones(3, 16, 16))  # a grey file has three channels too
    assert found[1].mean((1, 2)).tolist() == pytest.approx([1.0, -1.0, -0.6], abs=0.05)
    with pytest.raises(NasError, match="does not exist"):
        read_pictures(tmp_path / "none", (16, 16))
    with pytest.raises(NasError, match="holds 1 PNG or JPEG"):
        read_pictures(tmp_path / "inner", (16, 16))


def test_scores_do_not_keep_gradients(weights: str) -> None:
    pictures = random_pictures(3, 0).requires_grad_(True)
    assert load_inception(weights).score(pictures, [], functional.relu(pictures)) >= 0
