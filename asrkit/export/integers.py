"""Masked and integer layers in an ONNX graph: the very codes, scales and masks that were trained, and operators that compute
with them what training did.

A file holds a compressed layer in the bytes that ``asrkit info`` counts: codes packed at their bits, a scale for each output
or block, a bit for each weight or block of a mask, and of masked weights only those that are kept. Operators on these
constants unfold them, which onnxruntime does once, when it loads the file. What multiplies then:

- weights of 4 and 2 bits alone: ``com.microsoft.MatMulNBits``, in float32;
- weights of 8 bits alone, and masked float weights: ``MatMul`` of what was unfolded (MatMulNBits of 8 bits is newer, and was
  two to three times slower on chunks);
- integer weights and inputs: ``MatMulInteger``, with int32 sums, of unsigned numbers with zero points (products of signed
  weights would overflow the 16-bit sums of processors without VNNI), and scales in training's order.

Shapes: I inputs and O outputs of a layer, n blocks of an output's inputs as trained, m as the runtime has them, b bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from asrkit.errors import UserError
from asrkit.nn.compression import ActivationQuantisation, Codes, CompressedLinear

OPSET = 17  # the newest that torch 1.13 writes; LayerNormalization is an operator from here on
IR_VERSION = 8  # of that opset's time
CONSTANT = "constant "  # how the names of constants begin that are no part of the model
MICROSOFT = "com.microsoft"  # the domain of MatMulNBits
BLOCKS = (256, 128, 64, 32, 16)  # inputs that share a scale in MatMulNBits


class Nodes:
    """The nodes of one layer and the constants they read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nodes: list[Any] = []
        self.tensors: dict[str, np.ndarray] = {}

    def tensor(self, name: str, values: Tensor | np.ndarray) -> str:
        """A constant of the model, as ``path.name``."""
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
        self.tensors[f"{self.path}.{name}"] = np.ascontiguousarray(array)
        return f"{self.path}.{name}"

    def number(self, dtype: Any, *values: float) -> str:
        """A constant of the computation, shared by all layers that read the same."""
        return self._constant(np.array(values, dtype=dtype))

    def scalar(self, dtype: Any, value: float) -> str:
        """The same without an axis."""
        return self._constant(np.array(value, dtype=dtype))

    def _constant(self, array: np.ndarray) -> str:
        name = f"{CONSTANT}{array.dtype} {array.tolist()}"
        self.tensors[name] = array
        return name

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """A node, and the names of its outputs."""
        from onnx import helper

        names = [f"{self.path}/{operator}_{len(self.nodes)}{'abc'[k]}" for k in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, name=names[0], **attributes))
        return names

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output, and its name."""
        return self.add(operator, *inputs, **attributes)[0]

    def reshape(self, x: str, *shape: int) -> str:
        return self("Reshape", x, self.number(np.int64, *shape))

    def expand(self, x: str, *shape: int) -> str:
        return self("Expand", x, self.number(np.int64, *shape))

    def cast(self, x: str, dtype: Any) -> str:
        from onnx import helper

        return self("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def write_layers(graph: Any, layers: Mapping[str, CompressedLinear]) -> None:
    """Put compressed layers into a traced graph (an onnx GraphProto), in place of the float layers of the same paths.

    Raises:
        UserError: MatMulNBits cannot express a layer's blocks.
    """
    from onnx import numpy_helper

    there = {tensor.name for tensor in graph.initializer}
    for path, layer in layers.items():
        weight = f"{path}.weight"
        if weight not in there:  # it is in another file
            continue
        (place,) = (number for number, node in enumerate(graph.node) if weight in node.input)
        node, nodes = graph.node[place], Nodes(path)
        y = product(nodes, layer, node.input[0])
        if node.op_type == "Gemm":  # a product of matrices with the bias in it
            nodes("Add", y, node.input[2])
        nodes.nodes[-1].output[0] = node.output[0]
        around = [*graph.node[:place], *nodes.nodes, *graph.node[place + 1 :]]
        del graph.node[:]
        graph.node.extend(around)
        graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == weight))
        there.remove(weight)
        new = {name: array for name, array in nodes.tensors.items() if name not in there}
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in new.items())
        there |= set(new)


def layer_constants(path: str, layer: CompressedLinear) -> dict[str, np.ndarray]:
    """What a file must hold of a layer, by name.

    Raises:
        UserError: MatMulNBits cannot express the layer's blocks.
    """
    nodes = Nodes(path)
    product(nodes, layer, "x")
    return {name: array for name, array in nodes.tensors.items() if not name.startswith(CONSTANT)}


def layer_alone(path: str, layer: CompressedLinear) -> bytes:
    """An ONNX model of one layer, from x (..., ..., I) to (..., ..., O).

    Raises:
        UserError: MatMulNBits cannot express the layer's blocks.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes = Nodes(path)
    y = product(nodes, layer, "x")
    if layer.bias is not None:
        nodes("Add", y, nodes.tensor("bias", layer.bias))
    nodes.nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        nodes.nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, layer.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None, layer.out_features])],
        [numpy_helper.from_array(array, name) for name, array in nodes.tensors.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    found: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return found


def product(nodes: Nodes, layer: CompressedLinear, x: str) -> str:
    """The layer's output for input ``x``, before its bias.

    Raises:
        UserError: MatMulNBits cannot express the layer's blocks.
    """
    how = layer.how
    if how.weights is None:
        kept = _kept(nodes, layer, layer.weight.detach().numpy(), np.float32(0), "weight", 32)
        return nodes("MatMul", x, nodes("Transpose", nodes.reshape(kept, *layer.weight.shape), perm=[1, 0]))
    codes = layer.codes()
    if how.activations is not None:
        if layer.multiplies_integers:
            return _integer_product(nodes, layer, codes, x, how.weights.bits, how.activations)
        values, scale = _input_codes(nodes, x, how.activations)
        x = nodes("Mul", values, scale)
    if how.weights.bits == 8:
        return nodes("MatMul", x, nodes("Transpose", _scaled_back(nodes, layer, codes), perm=[1, 0]))
    return _n_bits_product(nodes, layer, codes, x, how.weights.bits)


def _scaled_back(nodes: Nodes, layer: CompressedLinear, codes: Codes) -> str:
    """Float weights (O, I) of codes of 8 bits."""
    outputs, inputs = codes.codes.shape
    trained = codes.scale.shape[1]
    unsigned = (codes.codes.detach().numpy() + 128).astype(np.uint8)
    flat = nodes.cast(_kept(nodes, layer, unsigned, np.uint8(128), "codes", 8), np.float32)
    blocks = nodes.reshape(nodes("Sub", flat, nodes.number(np.float32, 128)), outputs, trained, inputs // trained)
    scale = nodes.reshape(nodes.tensor("scale", codes.scale), -1, trained, 1)
    return nodes.reshape(nodes("Mul", blocks, scale), outputs, inputs)


def _n_bits_product(nodes: Nodes, layer: CompressedLinear, codes: Codes, x: str, bits: int) -> str:
    """Weights scaled back block by block: MatMulNBits, whose codes are unsigned."""
    outputs, inputs = codes.codes.shape
    trained = codes.scale.shape[1]
    fitting = [block for block in BLOCKS if (inputs // trained) % block == 0]
    if not fitting and trained > 1:
        raise UserError(
            f"{nodes.path}: has a scale for each {inputs // trained} inputs, and the runtime's are for multiples of "
            f"{BLOCKS[-1]}; train with weights.block_size={BLOCKS[-1]}, or, where inputs are float, export with --dequantise"
        )
    block = fitting[0] if fitting else BLOCKS[-1]
    count = -(-inputs // block)
    middle, per_byte = 2 ** (bits - 1), 8 // bits
    unsigned = (codes.codes.detach().numpy() + middle).astype(np.uint8)
    if layer.how.mask is None:
        whole = np.pad(unsigned, ((0, 0), (0, count * block - inputs)))
        packed = nodes.tensor("codes", _pack(whole, bits).reshape(outputs, count, block // per_byte))
    else:
        packed = nodes.reshape(_kept(nodes, layer, unsigned, np.uint8(middle), "codes", bits), outputs, inputs)
        if missing := count * block - inputs:
            packed = nodes("Concat", packed, nodes.expand(nodes.number(np.uint8, 0), outputs, missing), axis=1)
        digits = nodes.reshape(nodes.cast(packed, np.int32), outputs, count, block // per_byte, per_byte)
        places = nodes.number(np.int32, *(2 ** (bits * place) for place in range(per_byte)))
        total = nodes("ReduceSum", nodes("Mul", digits, places), nodes.number(np.int64, 3), keepdims=0)
        packed = nodes.cast(total, np.uint8)

    def per_block(value: str) -> str:
        if (outputs, count) == codes.scale.shape:
            return value
        wide = nodes.expand(nodes.reshape(value, -1, trained, 1), outputs, trained, count // trained)
        return nodes.reshape(wide, outputs, count)

    scale = nodes.tensor("scale", codes.scale)
    operands = [x, packed, per_block(scale)]
    if codes.offset is not None:  # scale * code - offset = scale * (code - offset / scale)
        zero = nodes("Div", nodes.tensor("offset", codes.offset), scale)
        operands.append(per_block(nodes("Add", zero, nodes.number(np.float32, middle))))
    return nodes("MatMulNBits", *operands, domain=MICROSOFT, K=inputs, N=outputs, bits=bits, block_size=block)


def _integer_product(
    nodes: Nodes, layer: CompressedLinear, codes: Codes, x: str, bits: int, how: ActivationQuantisation
) -> str:
    """(q_x q_w) s_x s_w, as ``_NativeProduct`` has it."""
    outputs, inputs = codes.codes.shape
    middle = 2 ** (bits - 1)
    unsigned = (codes.codes.detach().numpy() + middle).astype(np.uint8)
    flat = _kept(nodes, layer, unsigned, np.uint8(middle), "codes", bits)
    weights = nodes("Transpose", nodes.reshape(flat, outputs, inputs), perm=[1, 0])
    if how.scale == "onnx":
        quantised, scale, zero_point = nodes.add("DynamicQuantizeLinear", x, outputs=3)
    else:
        values, scale = _input_codes(nodes, x, how)
        quantised = nodes.cast(nodes("Add", values, nodes.number(np.float32, 128)), np.uint8)
        zero_point = nodes.scalar(np.uint8, 128)
    sums = nodes("MatMulInteger", quantised, weights, zero_point, nodes.scalar(np.uint8, middle))
    y = nodes("Mul", nodes.cast(sums, np.float32), scale)
    return nodes("Mul", y, nodes.tensor("scale", codes.scale.view(-1)))


def _input_codes(nodes: Nodes, x: str, how: ActivationQuantisation) -> tuple[str, str]:
    """Whole numbers in float32, and scales, as ``input_codes`` finds them; those of ``onnx`` less their zero point."""
    if how.scale == "onnx":
        quantised, scale, zero_point = nodes.add("DynamicQuantizeLinear", x, outputs=3)
        return nodes("Sub", nodes.cast(quantised, np.float32), nodes.cast(zero_point, np.float32)), scale
    largest = 2 ** (how.bits - 1) - 1
    over = {"axes": [-1]} if how.scale == "token" else {}
    peak = nodes("ReduceMax", nodes("Abs", x), keepdims=int(how.scale == "token"), **over)
    scale = nodes("Div", peak, nodes.number(np.float32, largest))
    zero = nodes("Equal", scale, nodes.number(np.float32, 0))
    scale = nodes("Where", zero, nodes.number(np.float32, 1), scale)
    ratio = nodes("Div", x, scale)
    if how.rounding == "half_up":
        rounded = nodes("Floor", nodes("Add", ratio, nodes.number(np.float32, 0.5)))
    else:
        rounded = nodes("Round", ratio)
    return nodes("Clip", rounded, nodes.scalar(np.float32, -largest), nodes.scalar(np.float32, largest)), scale


def _kept(nodes: Nodes, layer: CompressedLinear, values: np.ndarray, zero: Any, name: str, bits: int) -> str:
    """``values`` (O, I) stored at their bits and unfolded to (O I,); of masked ones what is kept, ``zero`` elsewhere."""
    mask = layer.how.mask
    if mask is None:
        return _unpacked(nodes, name, values.reshape(-1), bits)
    kept = layer.mask.numpy()
    (outputs, inputs), (rows, columns) = kept.shape, mask.block
    stored = _unpacked(nodes, name, np.concatenate([[zero], values[kept]]).astype(values.dtype), bits)
    flags = _unpacked(nodes, "mask", kept[::rows, ::columns].reshape(-1).astype(np.uint8), 1)
    if mask.block != (1, 1):
        shape = (outputs // rows, rows, inputs // columns, columns)
        flags = nodes.expand(nodes.reshape(flags, shape[0], 1, shape[2], 1), *shape)
    flags = nodes.cast(nodes.reshape(flags, -1), np.int32)
    # The k-th kept weight stands at place k; all others read place 0.
    places = nodes("Mul", nodes("CumSum", flags, nodes.scalar(np.int64, 0)), flags)
    return nodes("Gather", stored, places)


def _unpacked(nodes: Nodes, name: str, values: np.ndarray, bits: int) -> str:
    """``values`` (count,) as they are, or whole numbers stored at 1, 2 or 4 bits, unfolded to uint8."""
    if bits >= 8:
        return nodes.tensor(name, values)
    per_byte = 8 // bits
    packed = nodes.tensor(name, _pack(values, bits).reshape(-1, 1))
    shifts = nodes.number(np.uint8, *(bits * place for place in range(per_byte)))
    digits = nodes("Mod", nodes("BitShift", packed, shifts, direction="RIGHT"), nodes.number(np.uint8, 2**bits))
    flat = nodes.reshape(digits, -1)
    if len(values) % per_byte == 0:
        return flat
    return nodes("Slice", flat, nodes.number(np.int64, 0), nodes.number(np.int64, len(values)))


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """uint8 numbers of few bits, in order, to bytes, the lowest bits first."""
    per_byte = 8 // bits
    padded = np.pad(values.reshape(-1), (0, -values.size % per_byte)).reshape(-1, per_byte)
    return (padded.astype(np.uint16) << (bits * np.arange(per_byte, dtype=np.uint16))).sum(1).astype(np.uint8)
