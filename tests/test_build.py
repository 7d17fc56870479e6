"""BlockSpec and NetworkSpec to modules."""

from __future__ import annotations

import copy

import pytest
import torch

from nas.build import build, build_block
from nas.errors import NasError, UsageError
from nas.families import scaled
from nas.network import Scale, block
from nas.space import load_space

TINY = Scale(
    width_divisor=16,
    head_width=4,
    norm_groups=4,
    latent_channels=3,
    height=8,
    width=16,
    text_tokens=5,
    text_width=12,
)
STEM = {"in_channels": 4, "out_channels": 8}


@pytest.fixture(scope="module")
def spec():
    return scaled(load_space("snapgen_unet").reference("snapgen"), TINY)


def inputs(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 3, 8, 16, generator=generator),
        torch.tensor([7.0, 950.0])[:batch],
        torch.randn(batch, 5, 12, generator=generator),
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({**STEM, "out_chanels": 8}, UsageError, "unknown setting 'out_chanels' in block 'conv_in' .* 'out_channels'"),
        ({"in_channels": 4}, NasError, "lacks the settings out_channels"),
        ({**STEM, "out_channels": "8"}, NasError, "'out_channels' must be of type int, got '8'"),
        ({**STEM, "out_channels": 8.0}, NasError, "must be of type int, got 8.0"),
        ({**STEM, "out_channels": True}, NasError, "must be of type int, got True"),
    ],
)
def test_settings_are_checked_by_name_and_type(settings, error, message):
    with pytest.raises(error, match=message):
        build_block(block("conv_in", "stem", {"x": (4, 8, 8)}, **settings))


def test_an_unknown_kind_offers_the_nearest():
    with pytest.raises(UsageError, match="resnet"):
        build_block(block("b", "resnett", {"x": (4, 8, 8)}))


def test_parameters_are_named_after_blocks(spec):
    network = build(spec, "meta")
    for one in spec.blocks:
        names = {name for name, _ in network.get_submodule(one.name).named_parameters()}
        assert names == {name for name, _ in build_block(one).named_parameters()}
    roots = {name.split(".")[0] for name in network.state_dict()}
    assert roots == {"conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "head"}


def test_meta_building_takes_no_memory(spec):
    assert {p.device.type for p in build(spec, "meta").parameters()} == {"meta"}


def test_a_seed_gives_the_same_weights_and_leaves_the_random_state_alone(spec):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = build(spec, seed=1), build(spec, seed=1), build(spec, seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.conv_in.weight, other.conv_in.weight)


def test_dtype(spec):
    assert {p.dtype for p in build(spec, dtype=torch.float16).parameters()} == {torch.float16}


def test_one_number_is_the_time_of_the_whole_batch(spec):
    network = build(spec, seed=0).eval()
    sample, _, text = inputs()
    with torch.no_grad():
        one = network(sample, 950.0, text)
        assert one.shape == sample.shape
        assert torch.equal(one, network(sample, torch.tensor(950.0), text))
        assert torch.equal(one, network(sample, torch.tensor([950.0, 950.0]), text))
        assert not torch.equal(one, network(sample, torch.tensor([950.0, 7.0]), text))


def test_every_skip_arrives(spec):
    """The output must depend on each skipped output apart from its way through the trunk."""
    network = build(spec, seed=0).eval()
    sources = {one.skip for one in spec.blocks if one.skip is not None}
    assert len(sources) == 9
    _, features = network(*inputs(), return_features=[*sources, spec.blocks[-2].name])
    last = features[spec.blocks[-2].name].square().sum()
    grads = torch.autograd.grad(last, [features[name] for name in sources])
    assert all(grad.abs().sum() > 0 for grad in grads)
    consumer = next(one for one in spec.blocks if one.skip == "conv_in")
    captured = {}
    network.get_submodule(consumer.name).register_forward_pre_hook(
        lambda _, __, given: captured.update(given), with_kwargs=True
    )
    with torch.no_grad():
        network(*inputs())
        torch.testing.assert_close(captured["skip"], network.conv_in(inputs()[0]))


def test_features_are_the_blocks_outputs_and_do_not_change_the_answer(spec):
    network = build(spec, seed=0).eval()
    name = "mid_block.attentions.0"
    seen = []
    network.get_submodule(name).register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        plain = network(*inputs())
        answer, features = network(*inputs(), return_features=[name])
    assert torch.equal(plain, answer)
    assert list(features) == [name]
    assert torch.equal(features[name], seen[0])


def test_an_unknown_feature_is_named(spec):
    with pytest.raises(UsageError, match=r"unknown block 'mid_block.attentions.1'"):
        build(spec)(*inputs(), return_features=["mid_block.attentions.1"])


def test_a_copy_is_independent(spec):
    network = build(spec, seed=0).eval()
    twin = copy.deepcopy(network)
    torch.nn.init.zeros_(twin.head.conv_out.weight)
    with torch.no_grad():
        assert not torch.equal(network(*inputs()), twin(*inputs()))


def test_a_whole_network_passes_torch_export():
    space = load_space("snapgen_unet")
    small = {"resnets_0": 1, "resnets_1": 1, "resnets_2": 1, "depth_0": 0, "depth_1": 0, "depth_2": 1}
    candidate = space.candidate(**{**dict(space.reference("snapgen").choices), **small})
    network = build(scaled(candidate, TINY), seed=0).eval()
    sample, timestep, text = inputs(batch=1)
    program = torch.export.export(network, (sample, timestep, text))
    torch.testing.assert_close(program.module()(sample, timestep, text), network(sample, timestep, text))
