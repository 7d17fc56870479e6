"""Every counter on the same network, and what each leaves out."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from nas.build import build, example_inputs
from nas.network import NetworkSpec
from nas.profile.counters import FVCORE, FVCORE_SDPA, LEAVES_OUT, OURS, THOP, TORCH, _Called, count, count_all
from nas.profile.network import profile
from nas.profile.operators import OPERATIONS
from nas.profile.subject import Subject, candidate_subject
from nas.space import load_space

# One network of each kind of input: text; text, pooled text and sizes; text by cross-attention in a transformer; none.
KINDS = [("snapgen_unet", "snapgen"), ("sdxl_unet", "koala-700m"), ("dit", "koala-dit-m"), ("decoder", "taesd")]


def subject(space: str, reference: str) -> Subject:
    found = load_space(space)
    return candidate_subject(found.at_resolution(max(64, found.resolution_step_px)).reference(reference), reference)


@pytest.mark.parametrize(("space", "reference"), KINDS)
def test_every_counter_runs_and_differs_by_what_it_leaves_out(space: str, reference: str):
    network = subject(space, reference)
    found = {c.name: c for c in count_all(network.spec)}
    assert list(found) == [OURS, TORCH, FVCORE, FVCORE_SDPA, THOP]
    assert {c.latent for c in found.values()} == {f"{network.spec.input.height}x{network.spec.input.width}"}
    ours, attention = found[OURS].macs, profile(network).operations["attention"]
    assert found[TORCH].macs == ours
    assert found[FVCORE_SDPA].macs - found[FVCORE].macs == attention
    # The rest is norms and resizes, which fvcore counts by element and we do not; thop counts fewer of them.
    assert 0 <= found[FVCORE_SDPA].macs - ours < 0.02 * ours
    assert abs(found[THOP].macs - (ours - attention)) < 0.02 * ours
    assert found[OURS].params == sum(p.numel() for p in build(network.spec, "meta").parameters())
    assert {name: c.leaves_out for name, c in found.items()} == LEAVES_OUT
    missed = f"{attention / 1e9:.1f} of {ours / 1e9:.1f} GMAC, {100 * attention / ours:.1f} %"
    for name in (THOP, FVCORE):
        rest = found[name].macs - (ours - attention)
        said = f"leaves out attention matmuls: {missed}" if attention else "no attention to leave out"
        assert found[name].why.startswith(f"{said}; ")
        assert (f"{rest / 1e9:+.3g} GMAC".replace("-", "−") if rest else "otherwise equal") in found[name].why
    assert found[FVCORE_SDPA].why.startswith(f"given a rule for attention ({missed}), ")
    assert found[TORCH].why.startswith("counts what we count; ")


def test_thop_counts_what_the_publisher_of_bk_sdm_counted_with_it():
    # https://github.com/Nota-NetsPresso/BK-SDM/issues/53: 338,749,194,240 MACs of Stable Diffusion 1.4.
    (found,) = count(candidate_subject(load_space("sd_unet").published("sd-v1.5")).spec, THOP)
    assert found.macs == 338_749_194_240
    assert found.why.startswith("leaves out attention matmuls: 63.0 of 401.6 GMAC, 15.7 %; ")


def first_blocks(count: int) -> NetworkSpec:
    spec = subject("snapgen_unet", "snapgen").spec
    return NetworkSpec(name="start", input=spec.input, blocks=spec.blocks[:count])


def test_fvcore_on_meta_counts_what_it_counts_on_real_tensors():
    from fvcore.nn import FlopCountAnalysis

    spec = first_blocks(4)
    called = _Called(spec)
    called.network = build(spec, "cpu", seed=0).eval()
    inputs = tuple(example_inputs(spec).values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
        analysis = FlopCountAnalysis(called, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        real = int(analysis.total())
    found = {c.name: c.macs for c in count(spec, FVCORE)}
    assert found[FVCORE] == real > 0


def test_tracing_leaves_torch_as_it_was():
    before = (torch.Tensor.shape, torch.Tensor.size, torch.Tensor.numel, torch.nn.Conv2d._conv_forward)
    count(first_blocks(2), FVCORE)
    assert (torch.Tensor.shape, torch.Tensor.size, torch.Tensor.numel, torch.nn.Conv2d._conv_forward) == before


def test_a_counter_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    (found,) = count(first_blocks(2), THOP)
    assert found.macs is None
    assert found.leaves_out.startswith("could not run: ")
    assert found.why == found.leaves_out


def test_operation_groups_hold_every_kind_that_multiplies():
    from nas.op import MULTIPLYING

    kinds = [kind for group in OPERATIONS.values() for kind in group]
    assert sorted(kinds) == sorted(MULTIPLYING)
