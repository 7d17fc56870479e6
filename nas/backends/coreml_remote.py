"""Core ML on a connected iPhone or iPad, driven from a Mac by coremltools' MLModelBenchmarker.

It builds a small app with Xcode, installs it on the device and talks to it over `devicectl`; the app times each
prediction itself. Sessions, models and predictions are coroutines of one event loop, which this process keeps.

Options of a device sheet:
    udid, name: which of the connected devices, where several fit.
    device_type: iphone (the default), ipad, ...: a name of coremltools' DeviceType.
    compute_units: ALL, CPU_AND_NE (the default), CPU_AND_GPU or CPU_ONLY.
    require_neural_engine: true refuses a network of which a matrix product or convolution runs elsewhere.
    weights: compression, as of the Core ML exporter.
    development_team, provisioning_profile_uuid, bundle_identifier: how the app is signed.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import shutil
import subprocess
import sys
import tempfile
import types
import weakref
from collections import Counter, defaultdict
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from nas.backends import Loaded, check_options
from nas.device import Target
from nas.errors import NasError, UsageError, unknown
from nas.exporters import coreml as exporter
from nas.exporters import missing

NAME = "coreml"
COMPUTE_UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
_OPTIONS: dict[str, type] = {
    "udid": str,
    "name": str,
    "device_type": str,
    "compute_units": str,
    "require_neural_engine": bool,
    "weights": str,
    "development_team": str,
    "provisioning_profile_uuid": str,
    "bundle_identifier": str,
}
_SIGNING = ("development_team", "provisioning_profile_uuid", "bundle_identifier")
_TOOLS = ("xcrun", "xcodebuild", "devicectl")
_ENGINE = "Neural Engine"
_T = TypeVar("_T")
_DROPPED: list[Any] = []  # models that nobody here needs any more and that still lie in the device's memory


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where Core ML plans to run the operations of a model.

    Attributes:
        share: of the predicted time that is spent on the Neural Engine, 0 to 1.
        operations: processor -> how many operations.
        products_elsewhere: matrix products and convolutions off the Neural Engine -> how many.
    """

    share: float
    operations: Mapping[str, int]
    products_elsewhere: Mapping[str, int]

    def __str__(self) -> str:
        counts = ", ".join(f"{count} on {name}" for name, count in sorted(self.operations.items()))
        return f"{self.share:.0%} of the predicted time; operations: {counts}"


def unavailable() -> str | None:
    """Why no device can be measured from here, or None."""
    if sys.platform != "darwin":
        return f"it needs macOS with Xcode and a connected iPhone or iPad; this is {sys.platform}"
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if absent:
        return f"Xcode's {' and '.join(absent)} is not on the PATH"
    return missing(["coremltools"])


def load(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Mapping[str, Any] | None = None
) -> Loaded:
    """Converts `module`, loads it on the connected device once and asks where its operations run.

    Raises:
        UsageError: an option is not known or has a wrong value, or the target asks for another precision or threads.
        NasError: no device fits or several do, the device is not the target's, the module cannot be converted, the
            device cannot load it, or a product runs off the Neural Engine and `require_neural_engine` is set.
    """
    chosen = _checked(options)
    _require(target, inputs)
    phone = _session(chosen)
    model = _checked_model(phone, target)
    _release(phone)
    units = chosen.get("compute_units", "CPU_AND_NE")
    with tempfile.TemporaryDirectory(prefix="nas-coreml-") as folder:
        path = Path(folder) / "module.mlpackage"
        exporter.export(module, inputs, path, precision=target.precision, weights=chosen.get("weights"))
        held = exporter.contents(path)
        # The benchmarker reads the package again whenever the model is loaded, so it is loaded while it is there.
        benchmarker = _benchmarker(exporter.open_package(path, units), phone)
        load_ms = _on(phone, "load", benchmarker.benchmark_load(iterations=1)).samples[0]
    weakref.finalize(benchmarker, _DROPPED.append, benchmarker._loaded_model).atexit = False
    arguments = exporter.arrays(held, inputs)
    placement = _placement(_on(phone, "plan", benchmarker.benchmark_operation_execution(arguments, iterations=1)))
    if chosen.get("require_neural_engine") and placement.products_elsewhere:
        raise NasError(f"not all of the network runs on the Neural Engine: {_listed(placement.products_elsewhere)}")

    def run() -> np.ndarray:
        # The benchmarker keeps the loaded model and throws outputs away.
        outputs = _on(phone, "predict", benchmarker._loaded_model.predict(arguments))
        return np.asarray(outputs[exporter.OUTPUT], dtype=np.float32)

    def device_ms(calls: int) -> float:
        measured = _on(phone, "predict", benchmarker.benchmark_predict(arguments, iterations=calls))
        return float(np.mean(measured.samples))

    return Loaded(
        run=run,
        device_ms=device_ms,
        description={
            "runtime": NAME,
            "provider": units,
            "precision": {"float16": "fp16", "float32": "fp32"}[next(iter(held.outputs.values()))[1]],
            "threads": 1,
            "device": model,
            "os": f"{phone.os_version} ({phone.os_build_number})",
            "neural_engine": str(placement),
            "load_ms": round(load_ms),
            "weights": chosen.get("weights", target.precision),
            "coremltools": _version(),
        },
    )


def _checked(options: Mapping[str, Any] | None) -> dict[str, Any]:
    chosen = check_options(options, _OPTIONS, runtime=NAME)
    for name, value in chosen.items():
        if type(value) is not _OPTIONS[name]:
            kind = "true or false" if _OPTIONS[name] is bool else "a text"
            raise UsageError(f"option {name!r} of backend {NAME} must be {kind}, got {value!r}")
    for name, known in (("compute_units", COMPUTE_UNITS), ("weights", exporter.WEIGHTS)):
        if name in chosen and chosen[name] not in known:
            raise unknown(name, chosen[name], known, where=f"[options] of a device sheet for backend {NAME}")
    return chosen


def _require(target: Target, inputs: Mapping[str, Tensor]) -> None:
    """Refuses a target that a Core ML device would not honour exactly."""
    for field, got, allowed in (
        ("runtime", target.runtime, (NAME,)),
        ("precision", target.precision, exporter.PRECISIONS),
        ("threads", target.threads, (1,)),  # Core ML decides on them itself
    ):
        if got not in allowed:
            raise UsageError(
                f"backend {NAME} cannot run target {target.slug}: {field} is {got!r}, allowed:"
                f" {', '.join(str(a) for a in allowed)}"
            )
    for name, tensor in inputs.items():
        if tensor.shape[:1] != (target.batch,):
            raise NasError(
                f"input {name!r} has shape {tuple(tensor.shape)}, target {target.slug} has batch {target.batch}"
            )


# The device


def pick(devices: Sequence[Any], *, udid: str | None = None, name: str | None = None, kind: str = "device") -> Any:
    """The one of the connected devices that fits.

    Raises:
        NasError: none fits, or several do.
    """
    fitting = [d for d in devices if udid in (None, d.udid) and name in (None, d.name)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{d.name!r} (udid {d.udid})" for d in fitting or devices) or "none"
    if fitting:
        raise NasError(f"several connected devices fit: {listed}", hint="set udid in [options] of the device sheet")
    asked = " and ".join(f"{key} {value!r}" for key, value in (("udid", udid), ("name", name)) if value) or "any name"
    raise NasError(f"no connected {kind} with {asked}; connected: {listed}", hint="xcrun devicectl list devices")


def _session(options: Mapping[str, Any]) -> Any:
    """The device with the runner app on it; built and installed once per process, again if the app has ended."""
    kinds = {kind.name.lower(): kind for kind in _remote().DeviceType}
    kind = options.get("device_type", "iphone")
    if kind not in kinds:
        raise unknown("device_type", kind, kinds, where=f"[options] of a device sheet for backend {NAME}")
    with _said("the devices cannot be listed"):
        devices = _remote().Device.get_connected_devices(kinds[kind])
    found = pick(devices, udid=options.get("udid"), name=options.get("name"), kind=kind)
    signing = tuple(options.get(key) for key in _SIGNING)
    phone = _prepared(found, signing)
    if not phone.session.is_alive():
        _prepared.cache_clear()
        phone = _prepared(found, signing)
    return phone


@functools.cache
def _prepared(device: Any, signing: tuple[str | None, ...]) -> Any:
    credentials = _remote().AppSigningCredentials(**{k: v for k, v in zip(_SIGNING, signing, strict=True) if v})
    folder = tempfile.TemporaryDirectory(prefix="nas-coreml-app-")
    atexit.register(folder.cleanup)
    started = device.prepare_for_model_debugging(credentials=credentials, working_directory=Path(folder.name))
    phone = _on(device, "start the runner app", started)
    atexit.register(phone.session.stop)
    return phone


def _checked_model(phone: Any, target: Target) -> str:
    """The model's name as Apple sells it, which must be the target's device."""
    with tempfile.TemporaryDirectory() as folder, _said("the devices cannot be listed"):
        answer = Path(folder) / "devices.json"
        command = ["xcrun", "devicectl", "list", "devices", "--json-output", str(answer)]
        subprocess.run(command, check=True, capture_output=True)
        listed = json.loads(answer.read_text())["result"]["devices"]
    (hardware,) = (d["hardwareProperties"] for d in listed if d["identifier"] == phone.identifier)
    model = str(hardware.get("marketingName") or hardware.get("productType") or "")
    if model.lower().replace(" ", "-") != target.device:
        raise NasError(
            f"the connected device is an {model or 'unknown model'}, target {target.slug} is {target.device}"
        )
    return model


# Where operations run


def _placement(operations: Sequence[Any]) -> Placement:
    """Sums up what the compute plan says of each operation; constants have no place in it.

    Raises:
        NasError: the plan tells nothing.
    """
    placed = [(o, _processor(o)) for o in operations if o.compute_device_usage is not None]
    if not placed:
        raise NasError("Core ML does not tell which processor runs this network, so its time cannot be described")
    times: dict[str, float] = defaultdict(float)
    for operation, processor in placed:
        known = operation.measurement.statistics
        times[processor] += float(known.median) if known is not None else 0.0
    off = (o.spec.type for o, processor in placed if processor != _ENGINE and o.spec.type in exporter.MULTIPLYING)
    return Placement(
        share=times[_ENGINE] / (sum(times.values()) or 1.0),
        operations=Counter(processor for _, processor in placed),
        products_elsewhere=Counter(off),
    )


def _processor(operation: Any) -> str:
    kind = type(operation.compute_device_usage.preferred_compute_device).__name__
    names = {"MLNeuralEngineComputeDevice": _ENGINE, "MLGPUComputeDevice": "GPU", "MLCPUComputeDevice": "CPU"}
    return names.get(kind, kind)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items())) + " elsewhere"


# coremltools


@functools.cache
def _remote() -> types.ModuleType:
    """The module of coremltools that talks to devices, without its progress bars."""
    with exporter.calm():
        from coremltools.models.ml_program.experimental import remote_device
    # A model that is dropped calls this to be unloaded, and its coroutine is never awaited: see `_release`.
    remote_device._DeviceCtlRemoteService.fire_and_forget = lambda self, name, params, resource=None: None
    remote_device._tqdm = types.SimpleNamespace(tqdm=functools.partial(remote_device._tqdm.tqdm, disable=True))
    return remote_device


def _release(phone: Any) -> None:
    """Unloads the models that are no longer used: a device holds only a few networks at a time."""
    while _DROPPED:
        _on(phone, "unload", _DROPPED.pop().unload())


def _benchmarker(model: Any, phone: Any) -> Any:
    with exporter.calm():
        from coremltools.models.ml_program.experimental.perf_utils import MLModelBenchmarker
    return MLModelBenchmarker(model=model, device=phone)


def _version() -> str:
    with exporter.calm() as coremltools:
        return str(coremltools.__version__)


@functools.cache
def _runner() -> asyncio.Runner:
    """The one event loop: coremltools' sessions are bound to the loop that they were made in."""
    runner = asyncio.Runner()
    atexit.register(runner.close)
    return runner


def _on(device: Any, what: str, coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Waits for what coremltools does with the device."""
    with _said(f"{device.name!r} failed to {what}"):
        return _runner().run(coroutine)


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Turns what coremltools and devicectl raise into one sentence."""
    remote = _remote()
    kinds = (ValueError, TypeError, KeyError, RuntimeError, OSError, subprocess.CalledProcessError)
    try:
        yield
    except (*kinds, remote._DeviceCtlError, remote._JSONRPCError, remote._AppBuilder.Error) as error:
        raise NasError(f"{what}: {_reason(error)}", hint="xcrun devicectl list devices") from error


def _reason(error: BaseException) -> str:
    """The first line of what an error says; devicectl's comes as bytes."""
    said = getattr(error, "stderr", None) or getattr(error, "message", None) or str(error)
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
