"""A Core ML device, played by a fake phone below coremltools' own code: it answers `devicectl` and times predictions.

Everything above `devicectl`, Xcode and Core ML itself is the installed coremltools; what is replaced is checked to have
its signature.
"""

from __future__ import annotations

import gc
import inspect
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nas.backends import coreml_remote as backend
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.exporters import coreml as exporter

if reason := exporter.unavailable():
    pytest.skip(reason, allow_module_level=True)

with exporter.calm():
    from coremltools.models import compute_plan
    from coremltools.models.ml_program.experimental import async_wrapper, perf_utils, remote_device
    from fake_phone import Gate, Phone, Plan, like, listed

TARGET = Target(device="iphone-15-pro", runtime="coreml", precision="fp16")


@pytest.fixture(scope="module")
def module() -> Gate:
    torch.manual_seed(0)
    return Gate().eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {"gate": torch.randn(1, 4, 1, 1), "x": torch.randn(1, 4, 6, 6)}


@pytest.fixture(scope="module")
def package(module: Gate, inputs: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporter.export(module, inputs, tmp_path_factory.mktemp("coreml") / "gate.mlpackage")


@pytest.fixture
def engine() -> dict[str, str]:
    """Operator -> the processor that the plan names for it; the Neural Engine where none is given."""
    return {}


@pytest.fixture
def phone(module: Gate, package: Path, engine: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Phone]:
    played = Phone(module=module, devices=[listed("Lab phone", "A1", "iPhone 15 Pro")])
    control, builder = remote_device._DeviceCtl, remote_device._ModelRunnerAppBuilder

    def _run_command(command: str) -> dict[str, Any]:
        return played.command(command)

    def _run_command_async(command: str) -> Any:
        played.starts += 1
        stopped: list[bool] = []
        return type(
            "Process", (), {"poll": lambda self: None if played.alive else 1, "terminate": lambda self: stopped}
        )()

    def build(device: Any, build_directory: Path, credentials: Any, clean: bool = False) -> Path:
        played.signing = credentials
        return build_directory / "ModelRunner.app"

    def compile_model(model: Any, destination_path: str | None = None) -> str:
        shutil.copytree(model, destination_path)
        return str(destination_path)

    async def retrieve_compute_plan(self: Any) -> Any:
        return Plan(self.spec_or_path, engine)

    wrapper = async_wrapper.RemoteMLModelAsyncWrapper
    monkeypatch.setattr(control, "_run_command", staticmethod(like(control._run_command, _run_command)))
    monkeypatch.setattr(
        control, "_run_command_async", staticmethod(like(control._run_command_async, _run_command_async))
    )
    monkeypatch.setattr(builder, "build", staticmethod(like(builder.build, build)))
    monkeypatch.setattr(async_wrapper, "compile_model", like(async_wrapper.compile_model, compile_model))
    monkeypatch.setattr(wrapper, "retrieve_compute_plan", like(wrapper.retrieve_compute_plan, retrieve_compute_plan))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")

    def export(module: Any, inputs: Any, path: Any, *, precision: str = "fp16", weights: str | None = None) -> Path:
        assert (precision, weights) == ("fp16", None)
        return Path(shutil.copytree(package, path))

    monkeypatch.setattr(exporter, "export", like(exporter.export, export))

    def devicectl(command: list[str], **_: Any) -> Any:
        Path(command[-1]).write_text(json.dumps(played.command(shlex.join(command[:-2]))))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(backend.subprocess, "run", devicectl)
    monkeypatch.setattr(backend, "_DROPPED", [])
    backend._prepared.cache_clear()
    yield played
    backend._prepared.cache_clear()


def test_the_plans_methods_are_coremltools_own() -> None:
    for name in ("get_compute_device_usage_for_mlprogram_operation", "get_estimated_cost_for_mlprogram_operation"):
        like(getattr(compute_plan.MLComputePlan, name), getattr(Plan, name))


def test_what_is_called_is_there() -> None:
    """The interface is called experimental; what the backend relies on is named here."""
    benchmarker = perf_utils.MLModelBenchmarker
    assert list(inspect.signature(benchmarker).parameters) == ["model", "device"]
    assert list(inspect.signature(benchmarker.benchmark_load).parameters) == ["self", "iterations"]
    for name in ("benchmark_predict", "benchmark_operation_execution"):
        found = inspect.signature(getattr(benchmarker, name)).parameters
        assert list(found) == ["self", "inputs", "iterations", "warmup"]
        assert found["warmup"].default is False
    assert list(inspect.signature(remote_device.Device.get_connected_devices).parameters) == ["device_type"]
    prepare = inspect.signature(remote_device.Device.prepare_for_model_debugging).parameters
    assert list(prepare) == ["self", "credentials", "working_directory", "clean"]
    assert set(backend._SIGNING) == set(inspect.signature(remote_device.AppSigningCredentials).parameters)
    assert {unit.name for unit in exporter_units()} == set(backend.COMPUTE_UNITS)


def exporter_units() -> Any:
    with exporter.calm() as coremltools:
        return coremltools.ComputeUnit


def test_it_runs_on_the_phone_and_says_so(phone: Phone, module: Gate, inputs: dict[str, Tensor]) -> None:
    loaded = backend.load(module, inputs, TARGET)
    assert phone.loads == 1
    with torch.no_grad():
        expected = module(**inputs).numpy()
    np.testing.assert_allclose(loaded(), expected, atol=2e-3)
    described = loaded.describe()
    assert described["runtime"] == "coreml"
    assert described["provider"] == phone.units == "CPU_AND_NE"
    assert described["precision"] == "fp16"
    assert described["device"] == "iPhone 15 Pro"
    assert described["os"] == "18.1 (22B83)"
    assert described["load_ms"] == 812
    assert described["neural_engine"] == "100% of the predicted time; operations: 3 on Neural Engine"
    assert described["coremltools"] == "9.0"
    assert phone.loads == 1


def test_models_that_nobody_needs_leave_the_phone(phone: Phone, module: Gate, inputs: dict[str, Tensor]) -> None:
    first = backend.load(module, inputs, TARGET)
    second = backend.load(module, inputs, TARGET)
    assert phone.loads == 2
    del first, second
    gc.collect()
    kept = backend.load(module, inputs, TARGET)
    assert phone.loads == 1
    kept()


def test_time_is_the_phones_own(phone: Phone, module: Gate, inputs: dict[str, Tensor]) -> None:
    loaded = backend.load(module, inputs, TARGET)
    assert loaded.device_ms is not None
    before = phone.predictions
    assert loaded.device_ms(3) == pytest.approx(np.mean([before + 2, before + 3, before + 4]))
    assert phone.predictions == before + 3


def test_the_app_is_started_once_and_again_when_it_ended(
    phone: Phone, module: Gate, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        backend.load(module, inputs, TARGET, {"udid": "A1", "development_team": "TEAM"})
    assert phone.starts == 1
    assert phone.signing.development_team == "TEAM"
    prepared = backend._prepared
    ended = [True]
    monkeypatch.setattr(remote_device._AppSession, "is_alive", lambda self: not (ended and ended.pop()))
    backend.load(module, inputs, TARGET, {"udid": "A1", "development_team": "TEAM"})
    assert phone.starts == 2
    assert backend._prepared is prepared


def test_a_product_off_the_engine_is_told_and_can_be_refused(
    phone: Phone, module: Gate, inputs: dict[str, Tensor], engine: dict[str, str]
) -> None:
    engine["softmax"] = "MLCPUComputeDevice"
    told = backend.load(module, inputs, TARGET, {"require_neural_engine": True}).describe()["neural_engine"]
    assert told == "90% of the predicted time; operations: 1 on CPU, 2 on Neural Engine"
    engine["conv"] = "MLGPUComputeDevice"
    told = backend.load(module, inputs, TARGET).describe()["neural_engine"]
    assert told == "20% of the predicted time; operations: 1 on CPU, 1 on GPU, 1 on Neural Engine"
    with pytest.raises(NasError, match="not all of the network runs on the Neural Engine: 1 x conv elsewhere"):
        backend.load(module, inputs, TARGET, {"require_neural_engine": True})


def test_a_phone_that_goes_away_is_one_sentence(
    phone: Phone, module: Gate, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = backend.load(module, inputs, TARGET)
    monkeypatch.setattr(remote_device._asyncio, "sleep", _no_sleep)
    phone.alive = False
    for call in (loaded, lambda: loaded.device_ms(1)):
        with pytest.raises(NasError, match=r"^'Lab phone' failed to predict: The device went away$"):
            call()


async def _no_sleep(delay: float) -> None:
    """The time between two tries."""


def test_the_device_is_picked_by_udid_or_name(phone: Phone, module: Gate, inputs: dict[str, Tensor]) -> None:
    phone.devices.append(listed("Other phone", "B2", "iPhone 13"))
    phone.devices.append(listed("Far phone", "C3", "iPhone 15 Pro", state="disconnected"))
    with pytest.raises(NasError, match=r"several connected devices fit: 'Lab phone' \(udid A1\), 'Other phone'") as few:
        backend.load(module, inputs, TARGET)
    assert few.value.hint == "set udid in [options] of the device sheet"
    assert backend.load(module, inputs, TARGET, {"name": "Lab phone"}).describe()["device"] == "iPhone 15 Pro"
    with pytest.raises(NasError, match="no connected iphone with udid 'C3'"):
        backend.load(module, inputs, TARGET, {"udid": "C3"})
    with pytest.raises(NasError, match=r"connected device is an iPhone 13, target .* is iphone-15-pro"):
        backend.load(module, inputs, TARGET, {"udid": "B2"})
    with pytest.raises(NasError, match="no connected ipad with any name; connected: none"):
        backend.load(module, inputs, TARGET, {"device_type": "ipad"})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"udids": "A1"}, "unknown option 'udids'"),
        ({"udid": 7}, "option 'udid' of backend coreml must be a text, got 7"),
        ({"require_neural_engine": "yes"}, "must be true or false, got 'yes'"),
        ({"compute_units": "NPU"}, "unknown compute_units 'NPU'"),
        ({"weights": "5-bit"}, "unknown weights '5-bit'"),
        ({"device_type": "fridge"}, "unknown device_type 'fridge'"),
    ],
)
def test_wrong_options_are_refused(
    phone: Phone, module: Gate, inputs: dict[str, Tensor], options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        backend.load(module, inputs, TARGET, options)
    assert phone.starts == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"precision": "int8"}, "precision is 'int8'"),
        ({"threads": 2}, "threads is 2"),
        ({"runtime": "onnxruntime"}, "runtime is 'onnxruntime'"),
        ({"batch": 2}, "batch 2"),
    ],
)
def test_a_target_it_cannot_honour_is_refused(
    module: Gate, inputs: dict[str, Tensor], change: dict[str, Any], named: str
) -> None:
    with pytest.raises(NasError, match=named):
        backend.load(module, inputs, replace(TARGET, **change))


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert backend.unavailable() == "it needs macOS with Xcode and a connected iPhone or iPad; this is linux"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "devicectl" else name)
    assert backend.unavailable() == "Xcode's devicectl is not on the PATH"
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert backend.unavailable() is None
