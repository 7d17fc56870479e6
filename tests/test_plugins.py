"""Contracts of everything that is found by listing a folder: drop a file in, and it is tested here."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from nas import families, registry, tables
from nas.device import find_target, list_targets
from nas.errors import UsageError
from nas.network import NetworkSpec
from nas.space import list_spaces, load_space

REQUIRED = {
    "families": ("positions",),
    "formats": ("network", "config", "own_name", "their_name"),
    "blocks": ("Settings", "Block"),
    "exporters": ("export", "unavailable"),
    "backends": ("load", "unavailable"),
    "objectives": ("Objective",),
    "tasks": ("Task",),
}


def found(*folders: str) -> list[object]:
    return [
        pytest.param(folder, name, id=f"{folder}/{name}")
        for folder in folders
        for name in registry.plugins(f"nas.{folder}")
    ]


@pytest.mark.parametrize(("folder", "name"), found(*REQUIRED))
def test_a_plugin_loads_and_has_its_names(folder, name):
    module = registry.load(f"nas.{folder}", name)
    missing = [required for required in REQUIRED[folder] if not callable(getattr(module, required, None))]
    assert not missing
    assert module.__doc__, "says what it is"


@pytest.mark.parametrize("folder", REQUIRED)
def test_no_folder_is_empty_and_a_wrong_name_offers_the_nearest(folder):
    names = registry.plugins(f"nas.{folder}")
    assert names
    with pytest.raises(UsageError, match=f"did you mean '{names[0]}'"):
        registry.load(f"nas.{folder}", f"{names[0]}x")


@pytest.mark.parametrize(("folder", "name"), found("blocks", "objectives"))
def test_settings_are_frozen_and_named(folder, name):
    module = registry.load(f"nas.{folder}", name)
    settings = module.Settings if folder == "blocks" else module.Objective
    assert dataclasses.is_dataclass(settings)
    assert settings.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(settings))


@pytest.mark.parametrize(("folder", "name"), found("backends", "exporters"))
def test_a_runtime_says_whether_it_is_there(folder, name):
    reason = registry.load(f"nas.{folder}", name).unavailable()
    assert reason is None or (isinstance(reason, str) and reason)


@pytest.mark.parametrize("name", registry.plugins("nas.backends"))
def test_a_backend_takes_module_inputs_and_target(name):
    assert list(inspect.signature(registry.load("nas.backends", name).load).parameters) == [
        "module",
        "inputs",
        "target",
        "options",
    ]


def test_a_plugin_may_lie_outside_the_tree(tmp_path):
    path = tmp_path / "my_loss.py"
    path.write_text("ANSWER = 42\n")
    assert registry.load("nas.objectives", str(path)).ANSWER == 42


# Spaces


@pytest.mark.parametrize("name", list_spaces())
def test_a_space_loads_and_names_its_sources(name):
    space = load_space(name)
    assert space.sources
    assert space.references
    assert space.summary
    assert all(reference.source for reference in space.references)
    assert set(space.meanings) == set(space.column), "every choice is explained"


@pytest.mark.parametrize("name", list_spaces())
def test_positions_read_only_what_they_say_and_make_the_network(name):
    space = load_space(name)
    for row in space.sample(8, seed=1):
        candidate = space.from_row(row)
        spec = families.network(candidate)
        assert isinstance(spec, NetworkSpec)
        by_position = [
            block
            for position in families.positions(space)
            for block in position.blocks({name: candidate.values[name] for name in position.depends})
        ]
        assert tuple(by_position) == spec.blocks
        assert NetworkSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("name", list_spaces())
def test_every_block_kind_of_a_space_has_a_file(name):
    space = load_space(name)
    kinds = {block.kind for row in space.sample(32, seed=0) for block in families.network(space.from_row(row)).blocks}
    assert kinds <= set(registry.plugins("nas.blocks"))


@pytest.mark.parametrize("name", list_spaces())
def test_any_candidate_builds(name):
    from nas.build import build

    space = load_space(name)
    for row in space.sample(3, seed=5):
        assert sum(p.numel() for p in build(families.network(space.from_row(row)), device="meta").parameters()) > 0


# Devices


@pytest.mark.parametrize("sheet", list_targets(), ids=lambda sheet: sheet.slug)
def test_a_device_sheet_is_found_by_every_name_and_names_its_sources(sheet):
    for name in (sheet.slug, *sheet.aliases):
        assert find_target(name).slug == sheet.slug
    assert sheet.sources
    assert sheet.summary
    assert sheet.backend is None or sheet.backend in registry.plugins("nas.backends")


@pytest.mark.parametrize("sheet", list_targets(), ids=lambda sheet: sheet.slug)
def test_a_table_reads_and_its_subjects_are_known(sheet):
    rows = tables.read(sheet.slug)
    known = tables.subjects(sheet.slug)
    assert {row.subject for row in rows if row.subject_kind in ("block", "network")} <= set(known)
    assert all(row.source for row in rows)
