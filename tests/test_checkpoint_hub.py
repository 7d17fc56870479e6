"""Networks of the hub: what is fetched, and what is said when it cannot be."""

from __future__ import annotations

import shutil

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DConditionModel

from nas.build import example_inputs
from nas.checkpoint import load_diffusers
from nas.errors import NasError, UsageError

WEIGHTS = "diffusion_pytorch_model.safetensors"
FP16 = "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def folder(tmp_path):
    """What diffusers writes for a small network."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=6,
        norm_num_groups=4,
        attention_head_dim=4,
        layers_per_block=1,
    )
    theirs.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.fixture
def hub(monkeypatch, folder, tmp_path):
    """A hub that holds one pipeline; it gives only the files that are asked for."""
    asked = []

    def fetch(repository, *, allow_patterns, ignore_patterns=None):
        assert repository == "owner/network"
        asked.append((tuple(allow_patterns), tuple(ignore_patterns or ())))
        root = tmp_path / "cache"
        for file in folder.iterdir():
            names = list(
                huggingface_hub.utils.filter_repo_objects(
                    [f"unet/{file.name}"], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
                )
            )
            for name in names:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, root / name)
        root.mkdir(exist_ok=True)
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return asked


def test_a_hub_id_is_fetched_configuration_first(hub, folder):
    found = load_diffusers("owner/network")
    assert found.spec.name == "owner/network"
    given = example_inputs(found.spec, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(found(**given), load_diffusers(folder)(**given))
    assert hub[0][0] == ("config.json", "unet/config.json", "transformer/config.json")
    assert hub[1] == (
        ("unet/*.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model-*.safetensors"),
        ("unet/*fp16*",),
    )
    assert len(hub) == 2


def test_a_repository_with_nothing_but_the_variant(hub, folder):
    (folder / WEIGHTS).rename(folder / FP16)
    assert load_diffusers("owner/network").spec.blocks
    assert [ignored for _, ignored in hub[1:]] == [("unet/*fp16*",), ()]


@pytest.mark.parametrize(("variant", "kept"), [(None, WEIGHTS), ("", WEIGHTS), ("fp16", FP16)])
def test_only_the_weights_that_are_wanted_are_fetched(hub, folder, tmp_path, variant, kept):
    for name in (FP16, "diffusion_pytorch_model.non_ema.safetensors"):
        shutil.copy(folder / WEIGHTS, folder / name)
    assert load_diffusers("owner/network", variant=variant).spec.blocks
    fetched = {file.name for file in (tmp_path / "cache" / "unet").iterdir()}
    assert fetched == {"config.json", kept}


def test_a_repository_without_a_network(hub, folder):
    (folder / "config.json").unlink()
    with pytest.raises(NasError, match=r"owner/network has none of config\.json, unet/config\.json"):
        load_diffusers("owner/network")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NasError, match="'nobody/nothing' is no folder here and cannot be fetched from the hub: "):
        load_diffusers("nobody/nothing")


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "./a/b", "a/b/c"])
def test_a_name_that_is_neither_folder_nor_hub_id(name):
    with pytest.raises(UsageError, match=r"there is no folder .* no hub id"):
        load_diffusers(name)


def test_a_file_where_a_folder_belongs(folder):
    with pytest.raises(UsageError, match="is a file; a diffusers network is a folder"):
        load_diffusers(folder / "config.json")
