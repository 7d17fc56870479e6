"""Computing once what a graph computes from constants only.

A traced block is mostly that: shapes read off tensors of fixed shape, and arithmetic on them. A runtime folds it too,
but each time that it loads a network, and for every copy of the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# A larger constant (an expanded tensor of zeros) would only make the file large; the runtime computes it as well.
_MOST_BYTES = 1 << 20


def fold(model: Any) -> None:
    """Replaces the nodes of an onnx.ModelProto that depend on constants only by initializers, in place.

    Initializers without data are weights to be given later: what depends on them stays.
    """
    rounds = 0
    while _fold_once(model) and rounds < len(model.graph.node):  # a folded shape lets further shapes be inferred
        rounds += 1


def _fold_once(model: Any) -> bool:
    """Whether anything but plain constants was folded, so that another round may find more."""
    import onnx

    graph = model.graph
    shapes = _static_shapes(model)
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.HasField("raw_data")}
    kept, found = [], False
    for node in graph.node:
        results = _evaluated(node, values, shapes, model.opset_import)
        if results is None:
            kept.append(node)
        else:
            values.update(results)
            found |= node.op_type != "Constant"
    read = {name for node in kept for name in node.input} | {output.name for output in graph.output}
    weights = [t for t in graph.initializer if not t.HasField("raw_data")]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in values.items() if name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend([*weights, *constants])
    return found


def _static_shapes(model: Any) -> dict[str, list[int]]:
    """The shapes of all tensors whose every axis is known."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(axis.HasField("dim_value") for axis in kind.shape.dim):
            found[value.name] = [axis.dim_value for axis in kind.shape.dim]
    return found


def _evaluated(
    node: Any, values: Mapping[str, np.ndarray], shapes: Mapping[str, list[int]], opsets: Any
) -> dict[str, np.ndarray] | None:
    """A node's outputs where they are constant and small, else None."""
    from onnx.reference import ReferenceEvaluator

    if node.op_type == "Shape" and not node.attribute and node.input[0] in shapes:
        return {node.output[0]: np.array(shapes[node.input[0]], dtype=np.int64)}
    if node.op_type != "Constant" and not (node.input and all(not name or name in values for name in node.input)):
        return None
    evaluator = ReferenceEvaluator(node, opsets={entry.domain: entry.version for entry in opsets})
    results = evaluator.run(None, {name: values[name] for name in node.input if name})
    arrays = [np.asarray(result) for result in results]
    if sum(array.nbytes for array in arrays) > _MOST_BYTES:
        return None
    return dict(zip(node.output, arrays, strict=True))
