"""A network's ONNX graph from the graphs of its blocks, wired as `nas.build.Network.forward` wires them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nas.build import Network
from nas.exporters.onnx.graphs import OPSET, OUTPUT, block_graph, output_names
from nas.network import BlockSpec

SEPARATOR = "::"


def compose(network: Network, inputs: Mapping[str, Tensor]) -> Any:
    """The network as an onnx.ModelProto whose weights are initializers with names and shapes but no data.

    Args:
        network: names of its parameters become names of initializers.
        inputs: by the names of forward, batch first.
    """
    import onnx

    spec, sample = network.spec, inputs["sample"]
    nodes: list[Any] = []
    weights: list[Any] = []
    given = {"x" if name == "sample" else name: name for name in inputs}
    kept: dict[str, str] = {}
    shape: list[int] = []
    for block in spec.blocks:
        if block.skip is not None:
            given["skip"] = kept[block.skip]
        graph = onnx.load_from_string(block_graph(_anonymous(block), len(sample), sample.dtype)).graph
        outputs = _add(graph, block, given, nodes, weights)
        given.update(zip(block.writes, outputs, strict=True))
        kept[block.name] = outputs[0]
        if "x" in block.writes:
            shape = [d.dim_value for d in graph.output[block.writes.index("x")].type.tensor_type.shape.dim]
    nodes.append(onnx.helper.make_node("Identity", [given["x"]], [OUTPUT], name=OUTPUT))
    element = onnx.helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=sample.dtype).numpy().dtype)
    values = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        spec.name,
        [values(name, element, list(tensor.shape)) for name, tensor in inputs.items()],
        [values(OUTPUT, element, shape)],
        weights,
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=onnx.IR_VERSION_2023_5_5 - 1)


def _anonymous(block: BlockSpec) -> BlockSpec:
    """The block without its place in the network, so that equal blocks share one graph."""
    return BlockSpec(
        name=block.kind, kind=block.kind, settings=block.settings, inputs=block.inputs, writes=block.writes
    )


def _add(graph: Any, block: BlockSpec, given: Mapping[str, str], nodes: list[Any], weights: list[Any]) -> list[str]:
    """Appends a block's nodes and weights under its name; returns the names of its outputs."""
    renamed = {i.name: given[i.name] for i in graph.input} | {"": ""}
    for tensor in graph.initializer:
        between = SEPARATOR if tensor.HasField("raw_data") else "."  # a constant of the block, or a parameter
        renamed[tensor.name] = tensor.name = f"{block.name}{between}{tensor.name}"
        weights.append(tensor)

    def name(inner: str) -> str:
        return renamed.get(inner, f"{block.name}{SEPARATOR}{inner}")

    for node in graph.node:
        node.name = f"{block.name}{SEPARATOR}{node.name}"
        node.input[:] = [name(i) for i in node.input]
        node.output[:] = [name(o) for o in node.output]
        nodes.append(node)
    return [name(output) for output in output_names(len(block.writes))]
