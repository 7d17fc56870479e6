"""Networks that people bring: configurations, folders and files, found in our spaces or not."""

from __future__ import annotations

import json

import pytest

from nas import families
from nas.build import build
from nas.checkpoint import NETWORK, save_network
from nas.errors import NasError, UsageError
from nas.profile import model_subject, profile
from nas.space import load_space
from tests.model_configs import KOALA, VAE, write


def test_a_published_configuration_is_its_reference(tmp_path):
    subject = model_subject(write(tmp_path / "koala.json", KOALA), 256)
    assert (subject.name, subject.image) == ("koala", "256 × 256")
    assert subject.point.reference == "koala-700m"
    assert subject.place == "the reference koala-700m of the space sdxl_unet"
    assert profile(subject).total.params == 782_822_724


def test_a_configuration_without_a_size_given_is_at_its_own(tmp_path):
    subject = model_subject(write(tmp_path / "koala.json", KOALA))
    assert (subject.resolution_px, subject.latent) == (1024, "4 × 128 × 128")


def test_a_shape_between_the_references_is_a_candidate(tmp_path):
    subject = model_subject(write(tmp_path / "mine.json", KOALA | {"transformer_layers_per_block": [1, 2, 4]}), 256)
    assert subject.point.references == ()
    assert subject.candidate.choices["depth_2_0"] == 4
    assert subject.place == "a candidate of the space sdxl_unet"
    assert families.network(subject.candidate).blocks == subject.spec.blocks


def test_a_shape_outside_our_spaces_says_why(tmp_path):
    subject = model_subject(write(tmp_path / "mine.json", KOALA | {"block_out_channels": [320, 640, 1920]}), 256)
    assert subject.point is None
    assert subject.place.startswith("no point of our spaces: in sdxl_unet, no candidate has its block 'down_blocks.2.")
    assert "1920" in subject.place
    data = profile(subject).to_json()
    assert (data["space"], data["choices"], data["pipeline"]) == (None, None, None)
    assert data["no_point_because"] == subject.miss


def test_a_decoder_knows_its_own_scale(tmp_path):
    subject = model_subject(write(tmp_path / "vae" / "config.json", VAE), 256)
    assert subject.name == tmp_path.name
    assert (subject.latent, subject.image, subject.call) == ("4 × 32 × 32", "256 × 256", "decoder call")
    assert subject.miss == "in decoder, no candidate has its block 'post_quant_conv'; without it, it is sd-vae"
    assert profile(subject).total.params == 49_490_199


def test_a_folder_is_called_by_its_name(tmp_path):
    write(tmp_path / "vega" / "unet" / "config.json", KOALA)
    assert model_subject(str(tmp_path / "vega"), 256).name == "vega"
    assert model_subject(str(tmp_path / "vega" / "unet"), 256).name == "vega"


def test_a_file_of_ours_is_its_candidate_at_any_size(tmp_path):
    space = load_space("decoder").at_resolution(64)
    taesd = space.reference("taesd")
    path = save_network(tmp_path / "mine.safetensors", build(families.network(taesd), seed=0))
    subject = model_subject(str(path))
    assert (subject.name, subject.point.reference, subject.resolution_px) == ("mine", "taesd", 64)
    assert model_subject(str(path), 128).spec.input.height == 16
    (tmp_path / "run").mkdir()
    path.rename(tmp_path / "run" / NETWORK)
    assert model_subject(str(tmp_path / "run")).name == "run"


@pytest.mark.parametrize(
    ("file", "content", "kind", "words"),
    [
        ("none.json", None, UsageError, "no model at .*none.json: there is no such file or folder"),
        ("bad.json", "nope", UsageError, "bad.json is not JSON"),
        ("bad.json", "[]", UsageError, "bad.json must hold a JSON object"),
        ("bad.json", "{}", UsageError, "bad.json has no '_class_name'"),
        ("bad.json", {"_class_name": "UNet2DModle"}, UsageError, "unknown '_class_name' 'UNet2DModle' in .*bad.json"),
        ("bad.json", KOALA | {"layers_per_blok": 1}, UsageError, "'layers_per_blok' in .*bad.json; did you mean"),
        ("bad.json", KOALA | {"layers_per_block": "x"}, UsageError, "bad.json: layers_per_block = 'x'"),
        ("bad.json", KOALA | {"sample_size": 65}, UsageError, "bad.json: a 65x65 latent cannot be halved"),
        ("bad.json", KOALA | {"norm_num_groups": 7}, UsageError, "bad.json: width 320 .* multiple of 7 norm groups"),
        ("bad.json", VAE | {"norm_num_groups": 7}, UsageError, "bad.json: block 'mid_block.* norm_groups = 7"),
        ("bad.json", "[" * 100_000, UsageError, "bad.json is not JSON"),
        ("bad.safetensors", "nope", NasError, "bad.safetensors"),
    ],
)
def test_a_wrong_model_is_one_sentence_that_names_the_file(tmp_path, file, content, kind, words):
    path = tmp_path / file
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(kind, match=words):
        model_subject(str(path))


@pytest.mark.parametrize(
    ("px", "words"),
    [
        (100, "must be a positive multiple of 8 px for .*koala.json"),
        (520, "520 px does not suit .*koala.json: a 65x65"),
    ],
)
def test_a_size_that_a_model_cannot_take_is_refused(tmp_path, px, words):
    with pytest.raises(UsageError, match=words):
        model_subject(write(tmp_path / "koala.json", KOALA), px)


def test_a_configuration_that_leaves_the_size_open_asks_for_it(tmp_path):
    path = write(tmp_path / "koala.json", {k: v for k, v in KOALA.items() if k != "sample_size"})
    with pytest.raises(UsageError) as caught:
        model_subject(path)
    assert caught.value.hint == "--resolution PX"
    assert model_subject(path, 256).resolution_px == 256


def test_a_model_of_the_hub_that_cannot_be_reached_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NasError, match="no model at someone/something: there is no such file or folder, and the hub"):
        model_subject("someone/something")
