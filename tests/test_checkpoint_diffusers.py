"""Folders of diffusers classes, read and written, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from nas import checkpoint
from nas.build import build, example_inputs
from nas.checkpoint import (
    load,
    load_diffusers,
    read_metadata,
    save,
    save_diffusers,
)
from nas.errors import NasError, UsageError
from nas.families import scaled
from nas.network import Scale
from nas.space import load_space

TINY = Scale(
    width_divisor=32,
    head_width=2,
    norm_groups=2,
    latent_channels=3,
    height=8,
    width=8,
    text_tokens=5,
    text_width=6,
)
SMALL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 6,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "layers_per_block": 1,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(scope="module")
def space():
    return load_space("snapgen_unet")


@pytest.fixture(scope="module")
def network(space):
    return build(scaled(space.reference("snapgen"), TINY), seed=0).eval()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL).eval()


@pytest.fixture
def folder(theirs, tmp_path):
    """What diffusers writes for a small network, in one file."""
    theirs.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.fixture
def shards(theirs, tmp_path):
    """The same in several files."""
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="150KB")
    return tmp_path / "sharded"


def output(network, seed=0):
    given = example_inputs(network.spec, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return network(**{name: value.to(next(network.parameters()).dtype) for name, value in given.items()})


# ------------------------------------------------------------------------------------- reading what diffusers wrote


def test_one_file_and_shards_are_the_same_network(folder, shards, theirs):
    assert len(list(shards.glob("*.safetensors"))) > 2
    one, many = load_diffusers(folder, text_tokens=5), load_diffusers(shards, text_tokens=5)
    assert not one.training
    assert one.spec.blocks == many.spec.blocks
    given = example_inputs(one.spec, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(given["sample"], given["timestep"], given["text"], return_dict=False)[0]
    assert torch.allclose(output(one), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(output(one), output(many))


def test_of_one_file_and_shards_those_are_read_that_diffusers_reads(shards, theirs):
    stale = {name: torch.zeros_like(tensor) for name, tensor in theirs.state_dict().items()}
    save_file(stale, shards / WEIGHTS)
    wanted = UNet2DConditionModel.from_pretrained(shards).conv_in.weight
    assert torch.equal(load_diffusers(shards).state_dict()["conv_in.weight"], wanted)
    assert wanted.any()


def test_half_precision_is_kept_or_converted(theirs, folder, tmp_path):
    half = tmp_path / "half"
    folder.rename(half)
    (half / WEIGHTS).unlink()
    tensors = {name: t.half() for name, t in theirs.state_dict().items()}
    save_file(tensors, half / "diffusion_pytorch_model.fp16.safetensors")
    assert {p.dtype for p in load_diffusers(half).parameters()} == {torch.float16}
    assert {p.dtype for p in load_diffusers(half, dtype=torch.float32).parameters()} == {torch.float32}
    with pytest.raises(NasError, match=r"holds no weights: no diffusion_pytorch_model\.safetensors"):
        load_diffusers(half, variant="")
    # Of both, the plain one is read unless the variant is asked for.
    theirs.save_pretrained(half)
    assert {p.dtype for p in load_diffusers(half).parameters()} == {torch.float32}
    assert {p.dtype for p in load_diffusers(half, variant="fp16").parameters()} == {torch.float16}


def test_shards_of_a_variant(theirs, tmp_path):
    theirs.save_pretrained(tmp_path, variant="fp16", max_shard_size="150KB")
    assert (tmp_path / f"{WEIGHTS}.index.fp16.json").is_file()
    assert load_diffusers(tmp_path).spec.blocks


def test_a_pipeline_and_the_size_of_its_latent(folder, tmp_path):
    found = load_diffusers(folder.parent, height=16, width=24)
    assert (found.spec.input.height, found.spec.input.width) == (16, 24)
    assert found.spec.name == folder.parent.name
    assert load_diffusers(folder.parent, subfolder="unet").spec.name == f"{folder.parent.name}/unet"
    with pytest.raises(UsageError, match=r"looked for .*vae/config\.json"):
        load_diffusers(folder.parent, subfolder="vae")


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (
            AutoencoderKL,
            {
                "block_out_channels": (16, 32),
                "layers_per_block": 1,
                "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2,
                "norm_num_groups": 8,
            },
        ),
        (
            AutoencoderTiny,
            {
                "encoder_block_out_channels": (16, 16),
                "decoder_block_out_channels": (16, 16),
                "num_encoder_blocks": (1, 2),
                "num_decoder_blocks": (2, 1),
            },
        ),
    ],
)
def test_of_an_autoencoder_the_decoder_is_read_and_kept_in_our_format(cls, config, tmp_path):
    torch.manual_seed(0)
    theirs = cls(**config).eval()
    theirs.save_pretrained(tmp_path / "vae")
    ours = load_diffusers(tmp_path, subfolder="vae", height=8, width=8)
    latent = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.allclose(ours(sample=latent), theirs.decode(latent).sample, rtol=1e-4, atol=1e-5)
    with pytest.raises(NasError, match=f"is the decoder of a diffusers {cls.__name__}, whose encoder it does not have"):
        save_diffusers(tmp_path / "out", ours)
    assert (save(tmp_path / "out", ours) / "network.safetensors").is_file()
    assert load(tmp_path / "out").spec == ours.spec


def changed_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_out.bias"), f"{WEIGHTS} do not fit: it lacks conv_out.bias"),
        (lambda t: t.update(stray=torch.zeros(1)), f"{WEIGHTS} has stray, which the network of config.json has not"),
        (
            lambda t: t.update({"conv_norm_out.weight": torch.zeros(3)}),
            rf"{WEIGHTS} has conv_norm_out.weight of shape \(3,\), where config.json makes \(16,\)",
        ),
        (lambda t: t.update({"conv_out.bias": t["conv_out.bias"].int()}), f"{WEIGHTS} has conv_out.bias of type int32"),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(folder, change, message):
    changed_weights(folder, change)
    with pytest.raises(NasError, match=message):
        load_diffusers(folder)


@pytest.mark.parametrize("keep", [0, 6, 5000])
def test_a_cut_download(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(NasError, match=rf"{WEIGHTS} is not a readable safetensors file"):
        load_diffusers(folder)


def test_pickled_weights_are_never_read(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(
        NasError, match=r"diffusion_pytorch_model\.bin only, which is not read because a pickle runs code"
    ):
        load_diffusers(folder)


def test_a_folder_without_weights(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(NasError, match="holds no weights"):
        load_diffusers(folder)


def test_a_missing_shard(shards):
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(NasError, match=rf"lists the shard {gone.name}, which is not there"):
        load_diffusers(shards)


def test_a_cut_shard(shards):
    cut = sorted(shards.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(NasError, match=rf"{cut.name} is not a readable safetensors file"):
        load_diffusers(shards)


def changed_index(shards, change):
    index = json.loads((shards / INDEX).read_text())
    change(index["weight_map"])
    (shards / INDEX).write_text(json.dumps(index))


def test_an_index_that_lacks_a_tensor_or_has_one_too_many(shards):
    changed_index(shards, lambda places: places.pop("conv_in.bias"))
    with pytest.raises(NasError, match=rf"{INDEX} do not fit: it lacks conv_in.bias"):
        load_diffusers(shards)
    first = sorted(shards.glob("*.safetensors"))[0].name
    changed_index(shards, lambda places: places.update({"conv_in.bias": first, "ghost": first}))
    with pytest.raises(NasError, match=rf"{first} lacks the tensor ghost"):
        load_diffusers(shards)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "weights.bin", 3])
def test_an_index_that_points_elsewhere(shards, name):
    changed_index(shards, lambda places: places.update({"conv_in.bias": name}))
    with pytest.raises(NasError, match=r"gives conv_in\.bias the file .* a \.safetensors file beside it"):
        load_diffusers(shards)


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read as JSON"), ("{}", "has no 'weight_map'")])
def test_a_damaged_index(shards, text, message):
    (shards / INDEX).write_text(text)
    with pytest.raises(NasError, match=message):
        load_diffusers(shards)


def test_a_configuration_of_another_network(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(NasError, match=r"do not fit: it lacks down_blocks\.0\.resnets\.1\..*more"):
        load_diffusers(folder)
    (folder / "config.json").write_text(json.dumps({**config, "act_fn": "gelu"}))
    with pytest.raises(UsageError, match=r"unet/config\.json: act_fn = 'gelu'"):
        load_diffusers(folder)


# ---------------------------------------------------------------------------------------------------- writing


def test_what_is_written_loads_in_diffusers(folder, tmp_path):
    ours = load_diffusers(folder, text_tokens=5)
    written = save_diffusers(tmp_path / "out" / "unet", ours)
    assert sorted(file.name for file in written.iterdir()) == ["config.json", WEIGHTS]
    assert [path.name for path in written.parent.iterdir()] == ["unet"]
    config = json.loads((written / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"
    assert config["_diffusers_version"].startswith("0.")
    back, info = UNet2DConditionModel.from_pretrained(written, output_loading_info=True)
    assert not any(info.values())
    before = load_file(folder / WEIGHTS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in back.state_dict().items())


def test_large_weights_are_written_as_shards(folder, tmp_path):
    ours = load_diffusers(folder, text_tokens=5)
    written = save_diffusers(tmp_path / "sharded", ours, max_shard_bytes=150_000)
    assert (written / INDEX).is_file()
    assert len(list(written.glob("*.safetensors"))) > 2
    assert torch.equal(output(load_diffusers(written, text_tokens=5)), output(ours))
    UNet2DConditionModel.from_pretrained(written)
    # Written again in one file, no shard stays behind.
    save_diffusers(written, ours)
    assert sorted(file.name for file in written.iterdir()) == ["config.json", WEIGHTS]


def test_a_folder_is_written_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    ours = load_diffusers(folder, text_tokens=5)
    target = save_diffusers(tmp_path / "net", ours)
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.diffusers, "write_file", fail)
    with pytest.raises(NasError, match=r"cannot write .*net: No space left on device"):
        save_diffusers(target, ours)
    with pytest.raises(NasError, match="cannot write"):
        save_diffusers(tmp_path / "other", ours)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "unet"]


def test_what_stood_in_the_place_is_back_when_the_last_move_fails(folder, tmp_path, monkeypatch):
    target = save_diffusers(tmp_path / "net", load_diffusers(folder))
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    move, moves = os.replace, []

    def fail_once(source, place):
        if str(place) == str(target) and not moves:
            moves.append(source)
            raise OSError(39, "Directory not empty")
        move(source, place)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(NasError, match=r"cannot write .*net: Directory not empty"):
        save_diffusers(target, load_diffusers(folder))
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "unet"]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_written_through(folder, tmp_path, there):
    if there:
        (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert save_diffusers(tmp_path / "link", load_diffusers(folder)) == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()


def test_either_format_takes_the_place_of_the_other_and_of_nothing_else(space, folder, tmp_path):
    plain, odd = (
        load_diffusers(folder),
        build(scaled(space.candidate(**{**dict(space.reference("snapgen").choices), "conv_1": "separable-1"}), TINY)),
    )
    for network, files in ((odd, [checkpoint.NETWORK]), (plain, ["config.json", WEIGHTS]), (odd, [checkpoint.NETWORK])):
        assert sorted(file.name for file in save(tmp_path / "net", network).iterdir()) == files
    (tmp_path / "net" / "diffusion_pytorch_model.bin").write_bytes(b"of somebody")
    with pytest.raises(NasError, match=r"net holds diffusion_pytorch_model\.bin, which is not of a network"):
        save(tmp_path / "net", plain)


def test_a_folder_with_other_files_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(NasError, match=r"mine holds notes\.txt, which is not of a network"):
        save_diffusers(tmp_path / "mine", load_diffusers(folder))
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_network_that_no_class_holds_is_refused_with_its_reasons(space, tmp_path):
    odd = space.candidate(**{**dict(space.reference("snapgen").choices), "conv_1": "separable-1"})
    network = build(scaled(odd, TINY), seed=0)
    with pytest.raises(NasError, match=r"no diffusers class holds it: .*UNet2DConditionModel: .*DreamLiteUNetModel: "):
        save_diffusers(tmp_path / "net", network)
    with pytest.raises(NasError, match=r"block 'down_blocks.1.resnets.0' has expansion = 1, where the class has 2"):
        save_diffusers(tmp_path / "net", network, "DreamLiteUNetModel")
    assert not (tmp_path / "net").exists()


def test_save_takes_the_plain_class_where_it_can_and_load_reads_either(space, network, folder, tmp_path):
    plain = load_diffusers(folder, text_tokens=5)
    assert (save(tmp_path / "plain", plain) / "config.json").is_file()
    back = load(tmp_path / "plain")
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in plain.state_dict().items())
    odd = build(
        scaled(space.candidate(**{**dict(space.reference("snapgen").choices), "conv_1": "separable-1"}), TINY), seed=0
    ).eval()
    own = save(tmp_path / "own", odd, {"seed": 0})
    assert [file.name for file in own.iterdir()] == ["network.safetensors"]
    assert read_metadata(own / "network.safetensors") == {"seed": 0}
    assert load(own).spec == odd.spec
    assert torch.equal(output(load(own)), output(odd))
    file = save(tmp_path / "net.safetensors", plain)
    assert load(file).spec == plain.spec
    assert {p.dtype for p in load(file, dtype=torch.float16).parameters()} == {torch.float16}
    with pytest.raises(NasError, match="no weights file"):
        load(tmp_path / "absent.safetensors")
