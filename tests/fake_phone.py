"""A fake phone below coremltools' own code: it answers `devicectl` and times predictions."""

from __future__ import annotations

import inspect
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.exporters import coreml as exporter

with exporter.calm():
    from coremltools.models import compute_device, compute_plan
    from coremltools.models.ml_program.experimental import remote_device


class Gate(nn.Module):
    """Two inputs whose roles differ, a convolution, and an output for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return torch.softmax(self.conv(x) * gate, dim=1)


def listed(name: str, udid: str, model: str, state: str = "connected") -> dict[str, Any]:
    """A device as `devicectl list devices` tells it."""
    return {
        "identifier": f"id-{udid}",
        "deviceProperties": {
            "name": name,
            "osVersionNumber": "18.1",
            "osBuildUpdate": "22B83",
            "developerModeStatus": "enabled",
        },
        "hardwareProperties": {"deviceType": "iPhone", "udid": udid, "marketingName": model},
        "connectionProperties": {"tunnelState": state},
    }


@dataclass
class Phone:
    """Answers what the runner app answers; files lie in memory by their place in the app's folder."""

    module: nn.Module
    devices: list[dict[str, Any]]
    files: dict[str, bytes] = field(default_factory=dict)
    loads: int = 0
    predictions: int = 0
    alive: bool = True
    starts: int = 0

    def command(self, command: str) -> dict[str, Any]:
        """What `devicectl` answers."""
        words = shlex.split(command)
        if words[1:4] == ["devicectl", "list", "devices"]:
            return {"result": {"devices": self.devices}}
        if "install" in words:
            return {"result": {"installedApplications": [{"bundleID": "app", "databaseUUID": "1"}]}}
        if not self.alive:
            raise remote_device._DeviceCtlError(error_code=1, message=b"The device went away.\nMore of it.")
        source, destination = (words[words.index(flag) + 1] for flag in ("--source", "--destination"))
        if "to" in words:
            self.put(Path(source), destination)
        elif source in self.files:
            Path(destination).write_bytes(self.files[source])
        else:
            raise remote_device._DeviceCtlError(error_code=2, message=f"no file {source}")
        return {"result": {"source": source, "destination": destination}}

    def put(self, source: Path, destination: str) -> None:
        if source.is_dir():  # a compiled model
            assert list(source.rglob("weight.bin"))
            return
        self.files[destination] = source.read_bytes()
        if destination.endswith("message.json"):
            self.answer(json.loads(source.read_text()), PurePosixPath(destination).parents[3])

    def answer(self, message: dict[str, Any], home: PurePosixPath) -> None:
        calls = {"Load": self.load, "Prediction": self.predict, "Unload": self.unload}
        call = calls[message["method"].removeprefix("MLModelService.")]
        resource = f"{home}/requests/resources/{message['id']}/{message.get('resource')}"
        result, data = call(message["params"], self.files.get(resource, b""))
        answer = {"id": message["id"], "result": {"modelID": message["params"]["modelID"], **result}}
        if data:
            answer["resource"] = "out.bin"
            self.files[f"{home}/responses/{message['id']}/out.bin"] = data
        self.files[f"{home}/responses/{message['id']}/message.json"] = json.dumps(answer).encode()

    def load(self, params: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        self.loads += 1
        self.units = params["computeUnits"]
        return {"duration": 812_000_000}, b""

    def unload(self, params: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        self.loads -= 1
        return {}, b""

    def predict(self, params: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        given = {}
        for name, told in params["inputs"].items():
            place = told["storage"]
            raw = np.frombuffer(data[place["offset"] : place["offset"] + place["size"]], told["dataType"].lower())
            given[name] = torch.from_numpy(raw.reshape(told["shape"]).astype(np.float32))
        with torch.no_grad():
            output = self.module(**given).numpy().astype(np.float16)
        self.predictions += 1
        strides = [s // output.itemsize for s in output.strides]
        told = {"shape": list(output.shape), "strides": strides, "dataType": "Float16"}
        outputs = {"out": {**told, "storage": {"offset": 0, "size": output.nbytes}}}
        # 2, 3, 4, ... ms by the clock of the phone.
        return {"duration": (1 + self.predictions) * 1_000_000, "outputs": outputs}, output.tobytes()


def like(real: Any, fake: Any) -> Any:
    """`fake`, after checking that it takes what coremltools' own takes."""
    wanted = list(inspect.signature(real).parameters.values())
    assert [(p.name, p.kind) for p in inspect.signature(fake).parameters.values()] == [(p.name, p.kind) for p in wanted]
    return fake


class Plan:
    """A compute plan that sends operators where `engine` says."""

    def __init__(self, spec: Any, engine: dict[str, str]) -> None:
        self.engine = engine
        (block,) = spec.mlProgram.functions["main"].block_specializations.values()
        operations = [
            compute_plan.MLModelStructureProgramOperation(
                inputs={},
                operator_name=op.type,
                outputs=[
                    compute_plan.MLModelStructureProgramNamedValueType(name=o.name, type=None) for o in op.outputs
                ],
                blocks=[],
                __proxy__=None,
            )
            for op in block.operations
        ]
        body = compute_plan.MLModelStructureProgramBlock(inputs=[], operations=operations, output_names=[])
        main = compute_plan.MLModelStructureProgramFunction(inputs=[], block=body)
        self.model_structure = compute_plan.MLModelStructure(
            neuralnetwork=None,
            program=compute_plan.MLModelStructureProgram(functions={"main": main}),
            pipeline=None,
        )

    def get_compute_device_usage_for_mlprogram_operation(self, operation: Any) -> Any:
        if operation.operator_name == "const":
            return None
        name = self.engine.get(operation.operator_name, "MLNeuralEngineComputeDevice")
        device = object.__new__(getattr(compute_device, name))
        return compute_plan.MLComputePlanDeviceUsage(
            preferred_compute_device=device, supported_compute_devices=[device]
        )

    def get_estimated_cost_for_mlprogram_operation(self, operation: Any) -> Any:
        weight = {"const": None, "conv": 0.7, "mul": 0.2, "softmax": 0.1}[operation.operator_name]
        return None if weight is None else compute_plan.MLComputePlanCost(weight=weight)
