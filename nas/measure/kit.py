"""A measuring kit: networks as files of a runtime, an empty table for their times, and how to fill it.

For a device on another machine, where `nas` need not be installed. `nas measure --import` reads the table back;
kit.json beside it keeps what each network is.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch

from nas import registry, tables
from nas.device import DeviceSheet
from nas.errors import NasError, unknown
from nas.measure.subjects import Subject, table_subject
from nas.network import NetworkSpec
from nas.paths import atomic_write, package_data, writable_dir
from nas.tables import FEATURES_VERSION

# Columns of a kit's rows.csv, in order: what it says of each network, then what is to be filled in.
TEMPLATE = (
    "subject",
    "name",
    "file",
    "inputs",
    "batch",
    "precision",
    "device",
    "chip",
    "session",
    "latency_ms",
    "samples_ms",
    "environment",
    "measured_at",
    "notes",
)
_EXPORTERS = {"onnxruntime": "onnx", "coreml": "coreml", "executorch": "executorch", "tvm": "tvm", "tvm-untuned": "tvm"}
# Exporter -> what its script is called in a kit; both are the same file, which goes by the networks' endings.
_SCRIPTS = {"onnx": "measure_onnx.py", "coreml": "measure_coreml.py"}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What was written: the folder, its networks' files, the script that times them (None: there is none)."""

    folder: Path
    files: tuple[Path, ...]
    script: Path | None

    @property
    def rows(self) -> Path:
        """The table to fill."""
        return self.folder / "rows.csv"


def exporter_of(sheet: DeviceSheet, file_format: str | None = None) -> tuple[str, ModuleType]:
    """The exporter for a target's runtime, or of another format that is asked for.

    Raises:
        NasError: there is none for the runtime, it cannot be used here, or it does not write the target's precision.
    """
    name = file_format or _EXPORTERS.get(sheet.target.runtime)
    if name is None:
        raise unknown(
            "runtime of a kit",
            sheet.target.runtime,
            _EXPORTERS,
            where=str(sheet.path),
            hint="--format onnx writes the networks as ONNX files, to be converted there; --plan only lists them",
        )
    exporter = registry.load("nas.exporters", name)
    reason = exporter.unavailable()
    if reason is not None:
        raise NasError(f"a kit for {sheet.alias} cannot be written here: {reason}")
    return name, exporter


def write_kit(
    subjects: Sequence[Subject],
    sheet: DeviceSheet,
    folder: Path,
    *,
    file_format: str | None = None,
    progress: Progress | None = None,
) -> Kit:
    """Writes the kit of these subjects, one network in memory at a time.

    Raises:
        NasError: see `exporter_of`; the folder cannot be written to or has times in its rows.csv; or a network cannot
            be exported.
    """
    name, exporter = exporter_of(sheet, file_format)
    _refuse_filled(folder)
    writable_dir(folder)
    # A format that can hold several precisions is told which; the others are of float32, and convert on the device.
    asks = "precision" in inspect.signature(exporter.export).parameters
    options = {"precision": sheet.target.precision} if asks else {}
    files = []
    for number, subject in enumerate(subjects):
        if progress is not None:
            progress(f"exporting {subject.name}", number, len(subjects))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, inputs = subject.build(sheet.target.batch)
        path = folder / "networks" / f"{subject.key}{exporter.SUFFIX}"
        try:
            files.append(exporter.export(module.eval(), inputs, path, **options))
        except NasError as error:
            raise NasError(f"subject {subject.name} ({subject.key}): {error.message}", hint=error.hint) from error
    atomic_write(folder / "kit.json", json.dumps(_record(subjects, sheet), indent=1) + "\n")
    atomic_write(folder / "rows.csv", _template(subjects, files, sheet))
    script = _write_script(folder, name, sheet)
    atomic_write(folder / "README.txt", _readme(sheet, script, len(subjects)))
    return Kit(folder=folder, files=tuple(files), script=script)


def read_kit(folder: Path) -> dict[str, tables.Subject]:
    """The subjects of a kit by key; none where there is no kit.json.

    Raises:
        NasError: the file is damaged, or its features are of another version than this code's.
    """
    path = folder / "kit.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
        if data["features_version"] != FEATURES_VERSION:
            raise NasError(f"features are of version {data['features_version']}, this code reads {FEATURES_VERSION}")
        return {key: tables.Subject(key=key, **record) for key, record in data["subjects"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, NasError) as error:
        raise NasError(f"{path}: not a kit's record: {error}", hint="write the kit again: nas measure --kit") from error


def inputs_text(subject: Subject, batch: int) -> str:
    """A subject's inputs with their shapes: "sample 1x4x32x32; timestep 1"."""
    spec = subject.spec or {}
    if "blocks" in spec:
        shapes: Mapping[str, Sequence[int]] = NetworkSpec.from_json(spec).inputs
    else:
        shapes = spec.get("inputs", {})
    named = {"sample" if name == "x" and "blocks" in spec else name: shape for name, shape in shapes.items()}
    return "; ".join(f"{name} {'x'.join(map(str, (batch, *shape)))}" for name, shape in named.items())


def _record(subjects: Sequence[Subject], sheet: DeviceSheet) -> dict[str, object]:
    records = {s.key: asdict(table_subject(s)) for s in subjects}
    for record in records.values():
        del record["key"]
    return {"target": sheet.slug, "features_version": FEATURES_VERSION, "subjects": records}


def _template(subjects: Sequence[Subject], files: Sequence[Path], sheet: DeviceSheet) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, TEMPLATE, restval="", lineterminator="\n")
    writer.writeheader()
    for subject, path in zip(subjects, files, strict=True):
        writer.writerow(
            {
                "subject": subject.key,
                "name": subject.name,
                "file": f"networks/{path.name}",
                "inputs": inputs_text(subject, sheet.target.batch),
                "batch": sheet.target.batch,
                "precision": sheet.target.precision,
                "device": sheet.target.device,
                "chip": sheet.chip,
            }
        )
    return stream.getvalue()


def _refuse_filled(folder: Path) -> None:
    rows = folder / "rows.csv"
    if not rows.is_file():
        return
    with rows.open(newline="") as stream:
        if any(row.get("latency_ms") for row in csv.DictReader(stream)):
            raise NasError(f"{rows} has times already, and a new kit would take its place", hint="--kit ANOTHER_FOLDER")


def _write_script(folder: Path, exporter: str, sheet: DeviceSheet) -> Path | None:
    if exporter not in _SCRIPTS:
        return None
    name = _SCRIPTS[exporter]
    text = package_data("kit", "measure_kit.py").read_text()
    text = text.replace("THREADS = 1\n", f"THREADS = {sheet.target.threads}\n").replace("measure_kit.py", name)
    return atomic_write(folder / name, text)


def _readme(sheet: DeviceSheet, script: Path | None, count: int) -> str:
    target = sheet.target
    paragraphs = [
        f"Measuring kit for {sheet.slug}: {count} networks with random weights. Runtime {target.runtime}, precision"
        f" {target.precision}, {target.threads} thread(s), batch {target.batch}.",
    ]
    if script is not None:
        needs = "onnxruntime" if script.name == _SCRIPTS["onnx"] else "coremltools, on a Mac"
        paragraphs += [
            f"    python {script.name}",
            f"times the networks on the machine it runs on and fills rows.csv. It needs numpy and {needs}. Or by hand:",
        ]
    paragraphs.append(
        "Time each file of networks/ on the device with the runtime's own benchmark tool: warm up first, take at least"
        " 7 runs, and write their times, in milliseconds per call, into rows.csv: all of them into samples_ms"
        " (separated by spaces), or their median into latency_ms. For a second session copy the rows and give each"
        " session a name of its own in the column session."
    )
    if target.runtime == "coreml":
        paragraphs.append(
            "A phone or tablet: open each .mlpackage in Xcode, make a performance report on the connected device, and"
            " write the median prediction time into latency_ms."
        )
    paragraphs += [
        "Leave the columns before session as they are. Nothing else may load the device meanwhile; let it cool between"
        " sessions. Then, where nas is installed, with the whole folder:",
        f"    nas measure --target {sheet.alias} --import rows.csv",
    ]
    wrapped = [p if p.startswith("    ") else textwrap.fill(p, 100) for p in paragraphs]
    return "\n\n".join(wrapped) + "\n"
