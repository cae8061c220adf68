"""A traced graph as an ONNX file: tensors keep the model's names, metadata is what the runtime reads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from asrkit.export.graphs import Graph
from asrkit.export.integers import CONSTANT, MICROSOFT, OPSET, write_layers
from asrkit.models.sizes import part_of
from asrkit.nn.compression import CompressedLinear

PREFIX = re.compile(r"^(step\.)?model\.")  # where the model is in the traced modules
GRAPH = "graph"  # the part that constants of the computation belong to


def write_onnx(graph: Graph, path: Path, layers: Mapping[str, CompressedLinear]) -> dict[str, int]:
    """Trace ``graph`` and write it to ``path``, checked against the ONNX standard; returns the bytes of its tensors by part.

    Args:
        layers: by path, the layers to write masked or as integers; in ``graph`` they are float.

    Raises:
        UserError: the runtime's operators cannot express a layer.
    """
    import onnx

    _trace(graph, path)
    model = onnx.load(path)
    _name_tensors(model.graph)
    _fold_transposes(model.graph)
    write_layers(model.graph, layers)
    _fix_shapes(model.graph, graph)
    _shorten_names(model.graph)
    if any(node.domain == MICROSOFT for node in model.graph.node):
        model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    onnx.helper.set_model_props(model, graph.metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    counted: dict[str, int] = {}
    for tensor in model.graph.initializer:
        part = GRAPH if tensor.name.startswith(CONSTANT) else part_of(tensor.name)
        counted[part] = counted.get(part, 0) + len(tensor.raw_data)
    return counted


def _trace(graph: Graph, path: Path) -> None:
    # Both torches write the same through the exporter that traces; torch 2 wants to be told.
    options: dict[str, Any] = {} if torch.__version__.startswith("1.") else {"dynamo": False}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of shapes that are constants on purpose; the parity check tries others
        torch.onnx.export(
            graph.module.eval(),
            graph.example,
            str(path),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_axes=graph.dynamic,
            opset_version=OPSET,
            do_constant_folding=False,  # it would rename the weights
            **options,
        )


def _name_tensors(graph: Any) -> None:
    """``step.model.encoder.x`` to ``encoder.x``: what model.safetensors calls it."""
    new = {tensor.name: PREFIX.sub("", tensor.name) for tensor in graph.initializer}
    for tensor in graph.initializer:
        tensor.name = new[tensor.name]
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]


def _fold_transposes(graph: Any) -> None:
    """PosteriorCache a linear layer's weight as its product takes it, (in, out), under its own name."""
    from onnx import numpy_helper

    tensors = {tensor.name: tensor for tensor in graph.initializer}
    uses: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    folded = {}
    for node in list(graph.node):
        name = node.input[0] if node.input else ""
        if node.op_type == "Transpose" and name in tensors and uses[name] == 1:
            (order,) = (list(attribute.ints) for attribute in node.attribute if attribute.name == "perm")
            weight = numpy_helper.to_array(tensors[name]).transpose(order)
            tensors[name].CopyFrom(numpy_helper.from_array(weight.copy(), name))
            folded[node.output[0]] = name
            graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [folded.get(name, name) for name in node.input]


def _shorten_names(graph: Any) -> None:
    """Numbers for the names of what flows between nodes, which in a small model take a good part of the file."""
    keep = {info.name for info in (*graph.input, *graph.output, *graph.initializer)}
    short: dict[str, str] = {name: name for name in keep}
    for node in graph.node:
        node.ClearField("name")
        node.ClearField("doc_string")
        for names in (node.input, node.output):
            names[:] = [short.setdefault(name, f"{len(short)}") if name else "" for name in names]


def _fix_shapes(onnx_graph: Any, graph: Graph) -> None:
    """Write down the axes of the outputs that do not vary; the exporter loses some."""
    with torch.no_grad():
        outputs = graph.module(*graph.example)
    for info, value in zip(onnx_graph.output, [outputs] if torch.is_tensor(outputs) else outputs, strict=True):
        for axis, (dim, size) in enumerate(zip(info.type.tensor_type.shape.dim, value.shape, strict=True)):
            if axis not in graph.dynamic.get(info.name, {}):
                dim.dim_value = size
