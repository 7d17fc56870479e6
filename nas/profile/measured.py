"""A network timed on this machine: the whole, its distinct blocks alone, and where onnxruntime spends its call."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from nas import measure as measuring
from nas import registry
from nas.backends import Loaded
from nas.backends._onnx_nodes import NodeProfile, profile_nodes
from nas.build import build, example_inputs
from nas.device import DeviceSheet
from nas.errors import NasError, UsageError
from nas.measure.subjects import Subject, block_subject, network_subject
from nas.measure.timing import Clocks, statistic_for, time_group
from nas.network import NetworkSpec
from nas.provenance import processor
from nas.trace import block_trace

Progress = Callable[[str, int, int, str], None]
Available = Callable[[], int]
_WHOLE = "the whole network"
_NODES_OF = "onnxruntime"  # the runtime whose profile of a call is read node by node
# Weights are held several times at once: by torch, in the exported file, by the runtime, and packed for its kernels.
# Measured with onnxruntime on bk-sdm-tiny: 4.4 times the weights at most, blocks beside it included.
_COPIES = 5
_TRACED = 4


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was timed.

    Attributes:
        whole_ms: one call, by the sheet's statistic.
        samples_ms: wall time of every sample of it; cpu_samples_ms: CPU time, empty for a device of its own.
        blocks_ms: each block alone, by its name; equal blocks are timed once.
        distinct: how many blocks were timed.
        statistic, protocol: what stands for the samples, and how they were taken.
        contention: median of wall over CPU time of the whole; 1 on a quiet machine with one thread.
        environment: what really ran.
        chip: of this machine.
        other_chip: of the device that the prediction is for, where that is another; else empty.
        nodes: onnxruntime's own profile; None for other runtimes.
    """

    whole_ms: float
    samples_ms: tuple[float, ...]
    cpu_samples_ms: tuple[float, ...]
    blocks_ms: Mapping[str, float]
    distinct: int
    statistic: str
    protocol: str
    contention: float
    environment: Mapping[str, str | int]
    chip: str
    other_chip: str = ""
    nodes: NodeProfile | None = None

    @property
    def block_sum_ms(self) -> float:
        """The blocks alone, added up."""
        return sum(self.blocks_ms.values())

    @property
    def block_sum_over_whole(self) -> float:
        """Below 1 where blocks run faster alone than inside the network."""
        return self.block_sum_ms / self.whole_ms

    @property
    def in_network_ms(self) -> dict[str, float]:
        """Each block inside the network: the whole's time, divided as its kernels divide theirs; empty without nodes.

        What is unmapped is in none, so the values add up to `mapped_share` of the whole.
        """
        if self.nodes is None:
            return {}
        scale = self.whole_ms / self.nodes.kernel_ms
        return {name: scale * ms for name, ms in self.nodes.by_block().items()}

    @property
    def best_ms(self) -> dict[str, float]:
        """Each block inside the network where that is known, else alone."""
        return self.in_network_ms or dict(self.blocks_ms)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with every node of the profile."""
        return {
            "whole_ms": self.whole_ms,
            "samples_ms": list(self.samples_ms),
            "cpu_samples_ms": list(self.cpu_samples_ms),
            "block_sum_ms": self.block_sum_ms,
            "block_sum_over_whole": self.block_sum_over_whole,
            "distinct_blocks": self.distinct,
            "blocks_ms": dict(self.blocks_ms),
            "statistic": self.statistic,
            "protocol": self.protocol,
            "contention": self.contention,
            "environment": dict(self.environment),
            "chip": self.chip,
            "other_chip": self.other_chip or None,
            "nodes": None if self.nodes is None else self._nodes(self.nodes),
        }

    def _nodes(self, found: NodeProfile) -> dict[str, Any]:
        return {
            "call_ms": found.call_ms,
            "kernel_ms": found.kernel_ms,
            "calls": found.calls,
            "mapped_share": found.mapped_share,
            "unmapped": [{"name": n.name, "operator": n.operator, "ms": n.ms} for n in found.unmapped],
            "kernel_ms_by_block": found.by_block(),
            "kernel_ms_by_operator": found.by_operator(),
            "in_network_ms": self.in_network_ms,
            "nodes": [vars(node) for node in found.nodes],
        }


def measure(
    spec: NetworkSpec,
    sheet: DeviceSheet,
    progress: Progress | None = None,
    *,
    least_repeats: int = 7,
    clocks: Clocks | None = None,
    available: Available | None = None,
) -> Measured:
    """Times a network and its distinct blocks alone, interleaved, with the protocol of `nas measure`.

    Args:
        spec: the network; its weights are random.
        sheet: a device that can be measured from here.
        progress: called with (stage, done, total, note).
        least_repeats: rounds, if the sheet's protocol asks for fewer.
        clocks: where time comes from; None: this machine's.
        available: bytes of memory that are free; None: asks the system.

    Raises:
        UsageError: the sheet names no backend.
        NasError: the backend cannot run here, the memory does not suffice, or a block or the network fails on it.
    """
    say = progress or (lambda stage, done, total, note: None)
    backend = backend_of(sheet)
    check_memory(spec, sheet, (available or available_bytes)())
    batch, target = sheet.target.batch, sheet.target
    distinct = {block.key: block for block in spec.blocks}
    subjects = [network_subject(spec, "", None, batch)]
    subjects += [replace(block_subject(block, "", None, batch), name=block.name) for block in distinct.values()]
    keys = [_WHOLE, *distinct]
    loaded: dict[str, Loaded] = {}
    for i, (key, subject) in enumerate(zip(keys, subjects, strict=True)):
        say("load", i, len(keys), key if key == _WHOLE else subject.name)
        loaded[key] = _load(backend, subject, sheet)
    say("time", 0, 1, f"{len(keys)} subjects, interleaved, {least_repeats} rounds or more")
    protocol, _ = measuring.settings(sheet)
    protocol = replace(protocol, repeats=max(least_repeats, protocol.repeats))
    samples = time_group(loaded, protocol=protocol, seed=0, clocks=clocks or Clocks())
    environment = loaded[_WHOLE].describe()
    loaded.clear()  # makes room for the profiled session
    nodes = None
    if target.runtime == _NODES_OF:
        say("nodes", 0, 1, "onnxruntime's own profile")
        nodes = _nodes(spec, sheet, protocol.repeats)
    say("nodes", 1, 1, "measured")
    statistic, whole = statistic_for(sheet), samples[_WHOLE]
    alone = {key: samples[key].latency(statistic) for key in distinct}
    return Measured(
        whole_ms=whole.latency(statistic),
        samples_ms=whole.wall_ms,
        cpu_samples_ms=whole.cpu_ms,
        blocks_ms={block.name: alone[block.key] for block in spec.blocks},
        distinct=len(distinct),
        statistic=statistic,
        protocol=f"{statistic} of >= {protocol.repeats} interleaved repeats after a stable warm-up",
        contention=statistics.median([samples[key].contention for key in keys]),
        environment=environment,
        chip=processor(),
        other_chip=sheet.chip if sheet.chip and sheet.chip != processor() else "",
        nodes=nodes,
    )


def backend_of(sheet: DeviceSheet) -> ModuleType:
    """What runs a device's networks from here.

    Raises:
        UsageError: the sheet names no backend.
        NasError: it cannot run on this machine; the reason is told.
    """
    if sheet.backend is None:
        raise UsageError(
            f"{sheet.alias} cannot be measured from here: its sheet names no backend, its rows are published",
            hint="leave out --measure, or name a device of this machine (nas devices)",
        )
    backend = registry.load("nas.backends", sheet.backend)
    if reason := backend.unavailable():
        raise NasError(f"{sheet.alias} cannot be measured here: {reason}")
    return backend


def check_memory(spec: NetworkSpec, sheet: DeviceSheet, free_bytes: int) -> None:
    """Refuses a network that would not fit in the memory beside its blocks.

    Raises:
        NasError: it needs more than is free.
    """
    traces = {block.name: block_trace(block) for block in spec.blocks}
    whole = sum(traces[block.name].params for block in spec.blocks)
    peak = max(trace.peak_bytes for trace in traces.values()) * sheet.target.batch
    needed = _TRACED * _COPIES * whole + 2 * peak
    if needed > free_bytes:
        raise NasError(
            f"measuring {spec.name} on {sheet.alias} needs about {needed / 1e9:.1f} GB of memory"
            f" ({_COPIES} times its {_TRACED * whole / 1e9:.1f} GB of weights, and activations);"
            f" {free_bytes / 1e9:.1f} GB are free",
            hint="leave out --measure, or profile a smaller network",
        )


def available_bytes() -> int:
    """Memory that processes may still take; a container's limit is not known here.

    Raises:
        NasError: the system does not say.
    """
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise NasError("this system does not say how much memory is free (/proc/meminfo), so nothing is measured on it")


def _load(backend: ModuleType, subject: Subject, sheet: DeviceSheet) -> Loaded:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, inputs = subject.build(sheet.target.batch)
    try:
        loaded: Loaded = backend.load(module, inputs, sheet.target, sheet.options)
        output = loaded()
    except NasError as error:
        raise NasError(f"{subject.name}: {error.message}", hint=error.hint) from error
    if not np.isfinite(output).all():
        raise NasError(f"{subject.name} returns numbers that are not finite; its time means little")
    return loaded


def _nodes(spec: NetworkSpec, sheet: DeviceSheet, calls: int) -> NodeProfile:
    network = build(spec, seed=0).eval()
    inputs = example_inputs(spec, sheet.target.batch)
    return profile_nodes(network, inputs, sheet.target, [block.name for block in spec.blocks], calls)
