"""The page of one network: where its cost goes, how fast it runs, and the counters side by side."""

from __future__ import annotations

from pathlib import Path

from nas import __version__, page
from nas.page import Section, escape
from nas.page.numbers import label, milliseconds, percent, plain, scaled
from nas.profile.network import Profile
from nas.profile.network_figures import icicle, roofline_figure, shares_figure, times_figure
from nas.profile.network_tables import (
    block_table,
    counter_table,
    kind_table,
    pipeline_table,
    runtime_table,
    share_table,
    stage_table,
    times_table,
)
from nas.profile.statements import measured_statements, roof_statements
from nas.profile.words import NAMES

_MOST_STAGES = 14  # that can be told apart in one bar


def profile_page(profile: Profile, path: Path) -> Path:
    """Writes a network's profile as one offline page."""
    candidate = profile.subject.candidate
    title = profile.name if candidate is None else f"{candidate.space.name}: {profile.name}"
    return page.write_page(
        path,
        title=title,
        lead=_lead(profile),
        sections=[s for s in _sections(profile) if s.body],
        made_by=f"Made by nas {__version__}.",
    )


def _lead(profile: Profile) -> str:
    total, latency, subject = profile.total, profile.latency, profile.subject
    tiles = [
        ("parameters", scaled(total.params), f"{total.params:,}"),
        ("MACs, one call", scaled(total.macs), _shares(profile)),
        ("weights", scaled(total.weight_bytes, "B"), profile.precision),
        ("peak activations", scaled(total.peak_activation_bytes, "B"), "upper bound"),
    ]
    if latency is not None:
        between = (
            f"{milliseconds(latency.low_ms)} to {milliseconds(latency.high_ms)} with {percent(latency.confidence)}"
        )
        tiles.insert(0, ("predicted, one call", milliseconds(latency.ms), between))
    if profile.measured is not None:
        tiles.insert(0, ("measured, one call", milliseconds(profile.measured.whole_ms), "on this machine"))
    words = f"One {subject.call} for an image of {subject.image} pixels (latent {subject.latent}), batch 1."
    where = f" Latency on {latency.target}." if latency is not None else ""
    place = f" It is {subject.place}." if subject.place else ""
    remarks = "".join(page.paragraph(escape(w), "warning") for w in latency.warnings) if latency is not None else ""
    return (
        page.paragraph(escape(f"{profile.headline}."), "headline")
        + page.paragraph(escape(words + where + place), "lead")
        + page.tiles(tiles)
        + remarks
    )


def _shares(profile: Profile) -> str:
    """Which operations the MACs are: "attention 12 %, ..."."""
    whole = max(profile.total.macs, 1)
    return ", ".join(f"{group} {percent(macs / whole)}" for group, macs in profile.operations.items())


def _sections(profile: Profile) -> list[Section]:
    return [
        Section(slug="glance", title="At a glance", body=_glance(profile)),
        Section(slug="where", title="Where it goes", body=_where(profile)),
        Section(slug="kinds", title="Every kind of operator", body=kind_table(profile)),
        Section(slug="measured", title="Predicted and measured", body=_measured(profile)),
        Section(slug="roof", title="Against the device's roof", body=_roof(profile)),
        Section(slug="stages", title="Every stage", body=stage_table(profile)),
        Section(slug="pipeline", title="A whole image", body=pipeline_table(profile)),
        Section(slug="blocks", title="Every block", body=block_table(profile)),
        Section(slug="counters", title="Counted by others", body=counter_table(profile)),
        Section(slug="choices", title="Its choices", body=_choices(profile)),
    ]


def _glance(profile: Profile) -> str:
    found = profile.shares
    views = [
        (f"by {column}", page.figure(f"figure-{column}", shares_figure(found, column), f"shares of every {column}"))
        for column in ("part", *(("stage",) if found["stage"].nunique() <= _MOST_STAGES else ()))
    ]
    note = (
        "Shares of the whole network. Resnets are its convolutional blocks, transformers its blocks with attention,"
        " samplers change the resolution; other is what embeds the inputs and makes the output."
    )
    return page.paragraph(note, "note") + page.views("views-glance", views) + share_table(profile)


def _where(profile: Profile) -> str:
    measures = (["step_ms"] if profile.latency is not None else []) + ["macs", "params", "bytes"]
    names = NAMES | {"bytes": "bytes moved"}
    maps = [
        (f"by {names[m]}", page.figure(f"figure-{m}", icicle(profile, m), f"stages, blocks, operators by {names[m]}"))
        for m in measures
    ]
    note = (
        "From left to right: stage, block, kind of operator. Heights and figures are percent of the whole. Click one to"
        " look into it."
    )
    return page.paragraph(note, "note") + page.views("views-where", maps)


def _measured(profile: Profile) -> str:
    measured = profile.measured
    if measured is None:
        return ""
    drawn = page.figure("figure-times", times_figure(profile), "time of every block, predicted and measured")
    note = (
        "In the network: the measured whole, divided between blocks as onnxruntime's own profile divides its kernels."
        if measured.nodes is not None
        else ""
    )
    return (
        page.bullets(measured_statements(profile))
        + (page.paragraph(note, "note") if note else "")
        + drawn
        + times_table(profile, measured)
        + runtime_table(measured)
    )


def _roof(profile: Profile) -> str:
    if profile.roof is None or profile.latency is None:
        return ""
    drawn = page.figure("figure-roof", roofline_figure(profile), "blocks under the device's roof")
    note = "A circle is a block, its area the share of the time; filled is measured, open is predicted."
    return page.bullets(roof_statements(profile)) + page.paragraph(note, "note") + drawn


def _choices(profile: Profile) -> str:
    candidate = profile.subject.candidate
    if candidate is None:
        return ""
    return page.facts((label(k), plain(v)) for k, v in candidate.choices.items())
