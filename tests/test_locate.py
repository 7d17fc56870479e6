"""Which candidate a network is: found block by block, in every space, quickly."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from nas import families
from nas.locate import Miss, Point, locate, search
from nas.network import InputShape, NetworkSpec
from nas.space import SearchSpace, list_spaces, load_space

SPACES = [name for name in list_spaces() if load_space(name).references]


@pytest.mark.parametrize("name", SPACES)
def test_every_reference_is_found_by_its_network(name: str):
    space = load_space(name)
    for reference in space.references:
        network = families.network(space.published(reference.name))
        found = locate(network)
        assert found is not None
        assert reference.name in found.references
        assert found.candidate.space.name == name
        assert families.network(found.candidate).blocks == network.blocks


@pytest.mark.parametrize("name", SPACES)
def test_candidates_are_found_at_any_size_within_two_seconds(name: str):
    space = load_space(name)
    space = space.at_resolution(2 * space.resolution_step_px)
    for row in space.sample(4, seed=5):
        network = families.network(space.from_row(row))
        began = time.process_time()
        found = locate(network, [space])
        assert time.process_time() - began < 2.0
        assert found is not None
        assert families.network(found.candidate).blocks == network.blocks
        assert found.candidate.space.input == space.input


def test_a_candidate_is_found_by_its_own_choices():
    space = load_space("sdxl_unet")
    for row in space.sample(6, seed=2):
        candidate = space.from_row(row)
        assert locate(families.network(candidate)).candidate.key == candidate.key


def test_a_reference_with_another_text_is_a_candidate_only():
    # BK-SDM of Stable Diffusion 2 reads text of width 1024; the reference is that of 1.4, with 768.
    space = load_space("sd_unet").with_text_width(1024)
    found = locate(families.network(space.reference("bk-sdm-base")))
    assert found.references == ()
    assert found.candidate.choices == space.reference("bk-sdm-base").choices
    assert found.candidate.space.input.text_width == 1024


def test_the_reference_of_this_input_comes_first():
    space = load_space("sdxl_unet")
    at_512 = families.network(space.published("sdxl-turbo"))
    assert locate(at_512).references == ("sdxl-turbo", "sdxl-base")
    assert locate(families.network(space.published("sdxl-base"))).reference == "sdxl-base"


@pytest.fixture(scope="module")
def koala() -> NetworkSpec:
    return families.network(load_space("sdxl_unet").at_resolution(128).reference("koala-700m"))


def changed(network: NetworkSpec, name: str, **settings: object) -> NetworkSpec:
    blocks = [
        replace(b, settings=tuple(sorted({**dict(b.settings), **settings}.items()))) if b.name == name else b
        for b in network.blocks
    ]
    return replace(network, blocks=tuple(blocks))


def miss(network: NetworkSpec, spaces: list[SearchSpace] | None = None) -> Miss:
    found = search(network, spaces)
    assert isinstance(found, Miss)
    assert locate(network, spaces) is None
    return found


def test_the_first_block_that_no_candidate_has_is_named(koala: NetworkSpec):
    found = miss(changed(koala, "down_blocks.2.attentions.0", depth=7))
    assert found.space == "sdxl_unet"
    assert koala.blocks[found.matched].name == "down_blocks.2.attentions.0"
    assert found.reason.startswith("no candidate has its block 'down_blocks.2.attentions.0' (transformer): depth is 7,")


def test_a_block_too_many_is_named(koala: NetworkSpec):
    # Its head once more, under another name: no position of the family holds it.
    more = replace(koala, blocks=(*koala.blocks, replace(koala.blocks[-1], name="head_again")))
    assert "block 'head_again'" in miss(more).reason


def test_a_block_too_few_is_named(koala: NetworkSpec):
    found = miss(replace(koala, blocks=koala.blocks[:-1]))
    assert found.matched == len(koala.blocks) - 1
    assert found.reason == "its candidates go on with a block 'head'"


def test_another_skip_is_another_network(koala: NetworkSpec):
    blocks = list(koala.blocks)
    i = next(i for i, b in enumerate(blocks) if b.skip is not None)
    blocks[i] = replace(blocks[i], skip="conv_in")
    assert miss(replace(koala, blocks=tuple(blocks))).matched == i


def test_a_latent_that_a_space_cannot_take_is_a_miss(koala: NetworkSpec):
    shape = InputShape(channels=4, height=15, width=15)
    found = miss(replace(koala, input=shape, blocks=koala.blocks), [load_space("sdxl_unet")])
    assert found.matched == 0
    assert "15x15 latent cannot be halved" in found.reason


def test_no_space_at_all(koala: NetworkSpec):
    assert miss(koala, []).reason == "there is no space"


def test_rules_that_forbid_the_network_are_respected(tmp_path):
    text = (load_space("snapgen_unet").path).read_text().partition("[[reference]]")[0]
    text += '[[rules]]\nwhen = { ffn_ratio = [3] }\nforbid = true\nbecause = "no"\n'
    (tmp_path / "mine.toml").write_text(text)
    free, bound = load_space("snapgen_unet").at_resolution(64), load_space(tmp_path / "mine.toml").at_resolution(64)
    network = families.network(free.reference("snapgen"))
    assert isinstance(search(network, [free]), Point)
    assert miss(network, [bound]).reason == "the rules forbid the candidates that would be this network"
