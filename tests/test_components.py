"""Pipeline components: exact sizes of the text encoders, names, and what a target charges for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nas import components, tables
from nas.device import find_target
from nas.errors import NasError, UsageError
from nas.latency import load_predictor
from nas.space import SearchSpace, load_space
from nas.tables import Measurement
from tests.toy_space import ToyPredictor

SHEET: Any = SimpleNamespace(slug="toy--none--fp32", chip="fast")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("snapgen_unet")


def row(subject: str, ms: float, role: str, px: int | None = None, **more: Any) -> Measurement:
    given: dict[str, Any] = {"statistic": "min_cpu", "chip": "fast", "source": "measured", "session": "s", **more}
    return Measurement(
        target=SHEET.slug,
        subject=subject,
        subject_kind="component",
        latency_ms=ms,
        device="toy",
        resolution_px=px,
        role=role,
        **given,
    )


@pytest.mark.parametrize(
    ("name", "params", "gmacs", "tokens", "width"),
    [
        ("clip-l", 123_060_480, 6.649, 77, 768),
        ("openclip-bigg", 694_659_840, 48.932, 77, 1280),
        ("openclip-h", 340_387_840, 22.564, 77, 1024),
        # torch's own counter gives 1406.848 for 300 tokens.
        ("t5-xxl", 4_762_310_656, 1406.848, 300, 4096),
    ],
)
def test_text_encoders_have_their_published_sizes(name: str, params: int, gmacs: float, tokens: int, width: int):
    found = components.text_encoder(name)
    assert (found.params, found.tokens, found.width) == (params, tokens, width)
    assert found.macs is not None
    assert found.macs / 1e9 == pytest.approx(gmacs, rel=1e-3)
    assert found.features is not None
    assert (found.features > 0).any()


def test_a_text_encoder_may_run_at_the_pipelines_length():
    assert components.text_encoder("t5-xxl", 120).tokens == 120
    assert components.text_encoder("clip-l", 300).tokens == 77  # made for one length
    short, long = (components.text_encoder("t5-xxl", tokens).macs for tokens in (120, 300))
    assert short is not None
    assert long is not None
    assert 0.3 < short / long < 0.4


def test_a_text_encoder_puts_out_what_it_says():
    with torch.device("meta"):
        module, inputs = components.build_text_encoder("openclip-bigg", 77, batch=2)
        assert module(**inputs).shape == (2, 77, 1280)


def test_unknown_names_list_the_known(space: SearchSpace):
    with pytest.raises(UsageError, match="unknown text encoder 'clip'; did you mean 'clip-l'") as caught:
        components.text_encoder("clip")
    assert "openclip-bigg, openclip-h, snapgen-text-encoders, t5-xxl" in caught.value.message
    with pytest.raises(UsageError, match="known: sd-vae, snapfusion-half, snapgen-tiny, taesd"):
        components.decoder("vae", space)


def test_a_decoder_has_the_size_of_the_denoisers_image(space: SearchSpace):
    at = {px: components.decoder("taesd", space.at_resolution(px)).macs for px in (512, 1024)}
    assert at[1024] == 4 * (at[512] or 0)
    assert (at[512] or 0) / 1e9 == pytest.approx(70.675, rel=1e-3)
    other = replace(space, input=replace(space.input, latent_channels=16))
    with pytest.raises(UsageError, match=r"decoder taesd reads latents of 4 channels.* make 16 channels"):
        components.decoder("taesd", other)


def test_a_spaces_components_stand_in_running_order(space: SearchSpace):
    found = components.components(space)
    assert [(c.name, c.role) for c in found] == [
        ("snapgen-text-encoders", "text_encoders"),
        ("snapgen-tiny", "decoder"),
    ]
    assert (found[0].params, found[0].macs, found[0].features) == (None, None, None)
    with pytest.raises(UsageError, match=r"has no \[pipeline\]"):
        components.components(load_space("decoder"))


def test_every_shipped_pipeline_names_components_that_exist():
    for name in ("snapgen_unet", "sdxl_unet", "sd_unet", "dit"):
        found = load_space(name)
        assert len(components.components(found)) == len(found.pipeline.text_encoders) + 1  # type: ignore[union-attr]


def test_the_subjects_of_tables_are_named_after_components():
    for name, role, px in (("clip-l", "text_encoders", None), ("sd-vae", "decoder", 512)):
        assert components.component_of(components.subject_name(name, role, px)) == name
    assert components.component_of("taesd-decoder-1024px") == "taesd"
    assert components.component_of("clip-l-text-encoder") == "clip-l"
    assert components.component_of("snapgen-decoder") == "snapgen-tiny"
    assert components.component_of("snapgen-text-encoders-and-overhead") == "snapgen-text-encoders"
    # Every component row of the shipped tables belongs to a component that there is.
    known = {*components.text_encoder_names(), *components.decoder_names()}
    for slug in ("cpu--onnxruntime--fp32", "iphone-16-pro-max--coreml--fp16"):
        charged = [r for r in tables.read(slug) if r.role]
        assert charged
        assert {components.component_of(r.subject) for r in charged} <= known


def test_a_row_of_exactly_this_resolution_is_charged(space: SearchSpace, tmp_path: Path):
    tables.append(
        SHEET.slug,
        [
            row("taesd-decoder-1024px", 120.0, "decoder", 1024, session="a"),
            row("taesd-decoder-1024px", 110.0, "decoder", 1024, session="b"),
            row("taesd-decoder-1024px", 100.0, "decoder", 1024, session="c"),
            row("taesd-decoder-1024px", 1.0, "decoder", 1024, flagged="drift"),
            row("taesd-decoder-1024px", 2.0, "decoder", 1024, chip="slow"),
            row("sd-vae-decoder-1024px", 3.0, "decoder", 1024),
            row("clip-l-text-encoder", 7.0, "text_encoders", statistic="published", source="a paper"),
        ],
        tmp_path,
    )
    taesd, clip = components.decoder("taesd", space), components.text_encoder("clip-l")
    found = components.charge(taesd, 1024, SHEET, None, 0.8, tmp_path)
    assert (found.name, found.role, found.basis, found.source) == ("taesd", "decoder", "measured", "measured")
    assert (found.low_ms, found.ms, found.high_ms) == (110.0, 110.0, 110.0)
    # A text encoder's row has no resolution and serves them all.
    for px in (512, 1024):
        told = components.charge(clip, px, SHEET, None, 0.8, tmp_path)
        assert (told.ms, told.basis, told.source) == (7.0, "published", "a paper")
    with pytest.raises(NasError, match=r"no latency of 'taesd' at 512 px \(it has one at 1024 px\)") as caught:
        components.charge(taesd, 512, SHEET, None, 0.8, tmp_path)
    assert "--decoder NAME" in str(caught.value.hint)
    assert "/step@DEVICE" in str(caught.value.hint)


def test_without_a_row_the_predictor_prices_it_and_says_so(space: SearchSpace, tmp_path: Path):
    taesd, predictor = components.decoder("taesd", space), ToyPredictor()
    found = components.charge(taesd, 1024, SHEET, predictor, 0.8, tmp_path)  # type: ignore[arg-type]
    assert taesd.features is not None
    features = taesd.features[None]
    assert found.basis == "predicted"
    assert "predicted from its operators by the predictor of toy" in found.source
    assert found.ms == pytest.approx(float(predictor.predict(features)[0][0]))
    assert found.low_ms == pytest.approx(float(predictor.lower(features)[0]))
    assert found.high_ms == pytest.approx(float(predictor.upper(features)[0]))
    surer = components.charge(taesd, 1024, SHEET, predictor, 0.95, tmp_path)  # type: ignore[arg-type]
    assert surer.low_ms < found.low_ms < found.ms < found.high_ms < surer.high_ms


def test_what_has_neither_row_nor_layers_is_refused(tmp_path: Path):
    part = components.text_encoder("snapgen-text-encoders")
    with pytest.raises(NasError, match=r"no latency of 'snapgen-text-encoders'.*layers are not published") as caught:
        components.charge(part, 1024, SHEET, ToyPredictor(), 0.8, tmp_path)  # type: ignore[arg-type]
    assert "--text-encoders NAME,..." in str(caught.value.hint)


def test_operators_that_were_never_fitted_are_refused(space: SearchSpace, tmp_path: Path):
    class Narrow(ToyPredictor):
        def predict(self, features: np.ndarray, confidence: float = 0.8) -> Any:
            raise NasError("toy was fitted without operators of kind resize")

    with pytest.raises(NasError, match="'taesd' at 1024 px, and it cannot be predicted: toy was fitted without") as e:
        components.charge(components.decoder("taesd", space), 1024, SHEET, Narrow(), 0.8, tmp_path)  # type: ignore[arg-type]
    assert "--decoder NAME" in str(e.value.hint)


def test_the_phone_predicts_what_nobody_timed_there(space: SearchSpace):
    """Rows of older phones do not count as this one's, although the predictor has learnt from them."""
    sheet = find_target("iphone")
    predictor = load_predictor(sheet.slug)
    half = components.charge(
        components.decoder("snapfusion-half", space.at_resolution(512)), 512, sheet, predictor, 0.8
    )
    assert half.basis == "predicted"
    assert half.low_ms < half.ms < 116.0  # SnapFusion's on an iPhone 14 Pro
    clip = components.charge(components.text_encoder("clip-l"), 512, sheet, predictor, 0.8)
    assert "far outside" in clip.source
    assert clip.high_ms / clip.low_ms > half.high_ms / half.low_ms


def test_the_cpu_has_measured_taesd_and_clip(space: SearchSpace):
    sheet = find_target("cpu")
    for part in (components.decoder("taesd", space), components.text_encoder("clip-l")):
        assert components.charge(part, 1024, sheet, None, 0.8).basis == "measured"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder": "sd-va"}, "did you mean 'sd-vae'"),
        ({"text_encoders": ("clip",)}, "did you mean 'clip-l'"),
    ],
)
def test_a_name_that_a_space_files_pipeline_has_wrong_names_the_file(change: dict[str, Any], words: str):
    space = load_space("sdxl_unet")
    assert space.pipeline is not None
    components.check_pipeline(space)
    wrong = replace(space, pipeline=replace(space.pipeline, **change))
    with pytest.raises(UsageError, match=rf"sdxl_unet\.toml \[pipeline\]: .*{words}"):
        components.check_pipeline(wrong)
