"""onnxruntime's own profile of a network, node by node, read back to the blocks that the nodes come from.

The optimiser renames, fuses and adds nodes, so the names of a profile are not those of the exported file. The exporter
begins every name in a network with its block ("down_blocks.0.resnets.1::..."); the optimised graph, saved beside the
profile, says where the others belong (see `owners`). A node that cannot be placed is reported as such.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nas.device import Target
from nas.errors import NasError
from nas.exporters import onnx as onnx_exporter

_KERNEL = "_kernel_time"
_SILENT = 3  # errors only: saving an optimised graph warns that it suits this machine only, which is what we want
_NORMAL = 2


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """A node of the optimised graph."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """One node of one call.

    Attributes:
        operator: onnxruntime's name of what it computes ("Conv", "FusedMatMul").
        ms: wall time of its kernel.
        block: whose it is; None where that is not known.
    """

    name: str
    operator: str
    ms: float
    block: str | None


@dataclass(frozen=True, kw_only=True)
class NodeProfile:
    """The fastest call of several, node by node.

    Attributes:
        call_ms: wall time of the call; above the sum of its kernels by what lies between them.
        calls: how many were profiled.
    """

    nodes: tuple[NodeTime, ...]
    call_ms: float
    calls: int

    @property
    def kernel_ms(self) -> float:
        """All kernels."""
        return sum(node.ms for node in self.nodes)

    @property
    def unmapped(self) -> tuple[NodeTime, ...]:
        """Nodes that belong to no block that is known, slowest first."""
        return tuple(sorted((n for n in self.nodes if n.block is None), key=lambda n: -n.ms))

    @property
    def mapped_share(self) -> float:
        """Share of the kernels' time whose block is known."""
        whole = self.kernel_ms
        return 1 - sum(node.ms for node in self.unmapped) / whole if whole else 0.0

    def by_block(self) -> dict[str, float]:
        """Kernel ms of each block; what is unmapped is in none."""
        return _sums((node.block, node.ms) for node in self.nodes if node.block is not None)

    def by_operator(self) -> dict[str, float]:
        """Kernel ms of each of onnxruntime's operators, slowest first, mapped or not."""
        found = _sums((node.operator, node.ms) for node in self.nodes)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def _sums(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in pairs:
        found[key] = found.get(key, 0.0) + value
    return found


def profile_nodes(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, blocks: Collection[str], calls: int = 7
) -> NodeProfile:
    """Runs `module` with onnxruntime's profiler on, with the settings that `nas.backends.onnxruntime` times it with.

    Args:
        module: a network whose exported names begin with its blocks'.
        inputs: by the names of forward.
        target: how many threads.
        blocks: the names that nodes may belong to.
        calls: how many; the fastest is returned, because on a shared machine others only ever add time.

    Raises:
        NasError: the module cannot be exported, or the profile has no call in it.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="nas-nodes-") as name:
        folder = Path(name)
        exported = onnx_exporter.export(module, inputs, folder / "network.onnx")
        onnxruntime.set_default_logger_severity(_SILENT)
        try:
            session = _session(exported, folder, target)
            arrays = {key: tensor.detach().numpy() for key, tensor in inputs.items()}
            for _ in range(calls):
                session.run(None, arrays)
            events = json.loads(Path(session.end_profiling()).read_text())
        finally:
            onnxruntime.set_default_logger_severity(_NORMAL)
        graph = onnx.load(str(folder / "optimised.onnx"), load_external_data=False).graph
    nodes = [GraphNode(name=n.name, inputs=tuple(n.input), outputs=tuple(n.output)) for n in graph.node]
    return fastest_call(events, owners(nodes, blocks))


def _session(exported: Path, folder: Path, target: Target) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    # Weights go to a file of their own: a graph of more than 2 GB could not be written.
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
    return onnxruntime.InferenceSession(str(exported), sess_options=options, providers=["CPUExecutionProvider"])


def owners(nodes: Sequence[GraphNode], blocks: Collection[str]) -> dict[str, str | None]:
    """The block of each node of an optimised graph, by the node's name; None where nothing tells.

    Asked in this order: the node's own name; the tensors that it writes; the node that wrote what it reads, which
    places a node that the optimiser added between others (a change of layout) or fused and named anew.
    """
    known = frozenset(blocks)
    writers = {output: node for node in nodes for output in node.outputs}
    found: dict[str, str | None] = {}

    def of(node: GraphNode) -> str | None:
        if node.name not in found:
            found[node.name] = None  # a cycle cannot be; a name used twice is asked once
            found[node.name] = _own(node, known) or next(
                (block for i in node.inputs if i in writers and (block := of(writers[i])) is not None), None
            )
        return found[node.name]

    for node in nodes:  # in the order of execution, so that what `of` asks for is mostly there
        of(node)
    return found


def _own(node: GraphNode, known: Collection[str]) -> str | None:
    for name in (node.name, *node.outputs):
        block = name.partition(onnx_exporter.SEPARATOR)[0]
        if block in known:
            return block
    return None


def fastest_call(events: Sequence[Mapping[str, Any]], blocks: Mapping[str, str | None]) -> NodeProfile:
    """The fastest call of a profile.

    Args:
        events: as onnxruntime writes them: "model_run" of the category Session, and kernels of the category Node;
            times in microseconds.
        blocks: of `owners`; a node that is not among them is unmapped.

    Raises:
        NasError: there is no call.
    """
    calls = [e for e in events if e.get("cat") == "Session" and e["name"] == "model_run"]
    if not calls:
        raise NasError("onnxruntime's profile holds no call")
    best = min(calls, key=lambda e: e["dur"])
    start, end = best["ts"], best["ts"] + best["dur"]
    nodes = [
        NodeTime(
            name=name,
            operator=e["args"]["op_name"],
            ms=e["dur"] / 1e3,
            block=blocks.get(name),
        )
        for e in events
        if e.get("cat") == "Node" and e["name"].endswith(_KERNEL) and start <= e["ts"] <= end
        for name in [e["name"].removesuffix(_KERNEL)]
    ]
    return NodeProfile(nodes=tuple(nodes), call_ms=best["dur"] / 1e3, calls=len(calls))
