"""Masked and integer layers in an ONNX graph: the very codes, scales and masks that were trained, and operators that compute
with them what training did.

A file holds a compressed layer in the bytes that ``asrkit info`` counts: codes packed at their bits, a scale for each output
or block, a bit for each weight or block of a mask, and of masked weights only those that are kept. Operators on these
constants unfold them, which onnxruntime does once, when it loads the file. It keeps every result of theirs, of all layers,
until the last layer is unfolded, so they are few and of narrow types. What multiplies then:

- weights of 4 and 2 bits alone: ``com.microsoft.MatMulNBits``, in float32;
- weights of 8 bits alone, and masked float weights: a product of float32 matrices, of codes with the scales after it
  (MatMulNBits of 8 bits is newer, and was two to three times slower on chunks);
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
from asrkit.nn.compression import Codes, CompressedLinear
from asrkit.nn.compression_config import ActivationQuantization

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
        self.shared: dict[str, Any] = {}  # nodes that all layers have alike, by what they make
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
        return self.table(f"{array.dtype} {array.tolist()}", array)

    def table(self, name: str, array: np.ndarray) -> str:
        """A constant of the computation by a name that says what it holds."""
        self.tensors[CONSTANT + name] = array
        return CONSTANT + name

    def filled(self, value: np.generic, *shape: int) -> str:
        """A tensor of one value, made once for all layers that want it."""
        from onnx import helper, numpy_helper

        name = f"{CONSTANT}filled {value.dtype} {value} {shape}"
        content = numpy_helper.from_array(np.array([value]))
        self.shared[name] = helper.make_node("ConstantOfShape", [self.number(np.int64, *shape)], [name], value=content)
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
    shared: dict[str, Any] = {}
    for path, layer in layers.items():
        weight = f"{path}.weight"
        if weight not in there:  # it is in another file
            continue
        (index,) = (number for number, node in enumerate(graph.node) if weight in node.input)
        node, nodes = graph.node[index], Nodes(path)
        y = product(nodes, layer, node.input[0])
        if node.op_type == "Gemm":  # a product of matrices with the bias in it
            nodes("Add", y, node.input[2])
        nodes.nodes[-1].output[0] = node.output[0]
        around = [*graph.node[:index], *nodes.nodes, *graph.node[index + 1 :]]
        del graph.node[:]
        graph.node.extend(around)
        graph.initializer.remove(next(tensor for tensor in graph.initializer if tensor.name == weight))
        there.remove(weight)
        new = {name: array for name, array in nodes.tensors.items() if name not in there}
        graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in new.items())
        there |= set(new)
        shared |= nodes.shared
    around = [*shared.values(), *graph.node]
    del graph.node[:]
    graph.node.extend(around)


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
        [*nodes.shared.values(), *nodes.nodes],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, layer.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None, layer.out_features])],
        [numpy_helper.from_array(array, name) for name, array in nodes.tensors.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    content: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return content


def product(nodes: Nodes, layer: CompressedLinear, x: str) -> str:
    """The layer's output for input ``x``, before its bias.

    Raises:
        UserError: MatMulNBits cannot express the layer's blocks.
    """
    how = layer.how
    if how.weights is None:
        weights = _unfolded(nodes, layer, layer.weight.detach().numpy(), np.float32(0), "weight", 32)
        return _float_product(nodes, x, weights)
    codes = layer.codes()
    if how.activations is not None:
        if layer.multiplies_integers:
            return _integer_product(nodes, layer, codes, x, how.weights.bits, how.activations)
        values, scale = _input_codes(nodes, x, how.activations)
        x = nodes("Mul", values, scale)
    if how.weights.bits == 8:
        return _eight_bits_product(nodes, layer, codes, x)
    return _n_bits_product(nodes, layer, codes, x, how.weights.bits)


def _float_product(nodes: Nodes, x: str, weights: str) -> str:
    """x (..., I) times weights (O, I), which ``MatMul`` would want transposed: one more copy."""
    return nodes("FusedMatMul", x, weights, domain=MICROSOFT, transB=1)


def _eight_bits_product(nodes: Nodes, layer: CompressedLinear, codes: Codes, x: str) -> str:
    """Codes as float numbers, and scales after the product where there is one for each output."""
    outputs, inputs = codes.codes.shape
    trained = codes.scale.shape[1]
    signed = codes.codes.detach().numpy().astype(np.int8)
    if trained == 1:
        numbers = nodes.cast(_unfolded(nodes, layer, signed, np.int8(0), "codes", 8), np.float32)
        return nodes("Mul", _float_product(nodes, x, numbers), nodes.tensor("scale", codes.scale.view(-1)))
    blocks = (outputs, trained, inputs // trained)
    numbers = nodes.cast(_unfolded(nodes, layer, signed, np.int8(0), "codes", 8, blocks), np.float32)
    scaled = nodes("Mul", numbers, nodes.tensor("scale", codes.scale.unsqueeze(-1)))
    return _float_product(nodes, x, nodes.reshape(scaled, outputs, inputs))


def _n_bits_product(nodes: Nodes, layer: CompressedLinear, codes: Codes, x: str, bits: int) -> str:
    """Weights scaled back block by block: MatMulNBits, whose codes are unsigned."""
    outputs, inputs = codes.codes.shape
    trained = codes.scale.shape[1]
    fitting = [block for block in BLOCKS if (inputs // trained) % block == 0]
    if not fitting and trained > 1:
        raise UserError(
            f"{nodes.path}: has a scale for each {inputs // trained} inputs, and the runtime's are for multiples of "
            f"{BLOCKS[-1]}; train with weights.block_size={BLOCKS[-1]}, or, where inputs are float, export with --dequantize"
        )
    block = fitting[0] if fitting else BLOCKS[-1]
    count = -(-inputs // block)
    middle, per_byte = 2 ** (bits - 1), 8 // bits
    unsigned = (codes.codes.detach().numpy() + middle).astype(np.uint8)
    if layer.how.mask is None:
        whole = np.pad(unsigned, ((0, 0), (0, count * block - inputs)))
        packed = nodes.tensor("codes", _pack(whole, bits).reshape(outputs, count, block // per_byte))
    else:
        packed = _packed(nodes, layer, unsigned, bits)
        if missing := (count * block - inputs) // per_byte:
            packed = nodes.reshape(packed, outputs, -1)
            packed = nodes("Concat", packed, nodes.expand(nodes.number(np.uint8, 0), outputs, missing), axis=1)
        packed = nodes.reshape(packed, outputs, count, block // per_byte)

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


def _packed(nodes: Nodes, layer: CompressedLinear, unsigned: np.ndarray, bits: int) -> str:
    """The bytes of masked codes (O, I) of 4 or 2 bits, with a zero for each that is not kept; rows end with a byte."""
    assert layer.how.mask is not None
    (outputs, inputs), per_byte, middle = unsigned.shape, 8 // bits, 2 ** (bits - 1)
    mask_bits = layer.mask.numpy()
    keep = int(mask_bits.reshape(-1)[:4].sum())
    if keep * bits not in (2, 4, 8) or not _has_groups(layer, 4):
        missing = -inputs % per_byte
        shape = (outputs, inputs) if missing else (outputs * inputs // per_byte, per_byte)
        dense = _unfolded(nodes, layer, unsigned, np.uint8(middle), "codes", bits, shape)
        if missing:
            dense = nodes("Concat", dense, nodes.expand(nodes.number(np.uint8, 0), outputs, missing), axis=1)
            dense = nodes.reshape(dense, -1, per_byte)
        one, none = nodes.scalar(np.float32, 1), nodes.scalar(np.uint8, 0)
        places = nodes.table(f"places of {bits} bits", _powers(bits, per_byte).astype(np.uint8)[:, None])
        return nodes("QLinearMatMul", dense, one, none, places, one, none, one, none)
    # A mask's four bits and the codes of what it keeps are together the line of a table where the four weights stand.
    flags = (mask_bits.reshape(-1, 4) * _powers(1, 4)).sum(1)
    numbers = (unsigned[mask_bits].reshape(-1, keep) * _powers(bits, keep)).sum(1).astype(np.uint8)
    columns = (len(flags), 1)
    pairs = nodes(
        "Concat",
        _unpacked(nodes, "mask", flags, 4, columns),
        _unpacked(nodes, "codes", numbers, keep * bits, columns),
        axis=1,
    )
    lines = nodes("MatMulInteger", pairs, nodes.table("places of groups", np.array([[1], [16]], dtype=np.uint8)))
    return nodes("Gather", nodes.table(f"{keep} of 4, {bits} bits", _group_table(keep, bits)), lines)


def _group_table(keep: int, bits: int) -> np.ndarray:
    """(2^(4 + keep b), b / 2): the bytes of four codes of which a mask, the lowest bits of the line's number, keeps some."""
    number = np.arange(2 ** (4 + keep * bits))
    flags = (number[:, None] >> np.arange(4)) & 1
    rank = np.minimum(flags.cumsum(1) - flags, keep - 1)  # of a kept weight among those kept
    codes = (number[:, None] >> (4 + bits * rank)) & (2**bits - 1)
    return _pack(np.where(flags == 1, codes, 2 ** (bits - 1)), bits).reshape(len(number), -1)


def _has_groups(layer: CompressedLinear, size: int) -> bool:
    """Whether the mask falls into ``size`` weights in a row that keep as many each, as N:M masks do."""
    if layer.how.mask is None or layer.how.mask.keep is None or layer.mask.numel() % size:
        return False
    counts = layer.mask.view(-1, size).sum(1)
    return bool((counts == counts[0]).all())


def _integer_product(
    nodes: Nodes, layer: CompressedLinear, codes: Codes, x: str, bits: int, how: ActivationQuantization
) -> str:
    """(q_x q_w) s_x s_w, as ``_NativeProduct`` has it."""
    middle = 2 ** (bits - 1)
    unsigned = (codes.codes.detach().numpy() + middle).astype(np.uint8)
    weights = nodes("Transpose", _unfolded(nodes, layer, unsigned, np.uint8(middle), "codes", bits), perm=[1, 0])
    if how.scale == "onnx":
        quantized, scale, zero_point = nodes.add("DynamicQuantizeLinear", x, outputs=3)
    else:
        values, scale = _input_codes(nodes, x, how)
        quantized = nodes.cast(nodes("Add", values, nodes.number(np.float32, 128)), np.uint8)
        zero_point = nodes.scalar(np.uint8, 128)
    sums = nodes("MatMulInteger", quantized, weights, zero_point, nodes.scalar(np.uint8, middle))
    y = nodes("Mul", nodes.cast(sums, np.float32), scale)
    return nodes("Mul", y, nodes.tensor("scale", codes.scale.view(-1)))


def _input_codes(nodes: Nodes, x: str, how: ActivationQuantization) -> tuple[str, str]:
    """Whole numbers in float32, and scales, as ``input_codes`` finds them; those of ``onnx`` less their zero point."""
    if how.scale == "onnx":
        quantized, scale, zero_point = nodes.add("DynamicQuantizeLinear", x, outputs=3)
        return nodes("Sub", nodes.cast(quantized, np.float32), nodes.cast(zero_point, np.float32)), scale
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


def _unfolded(
    nodes: Nodes,
    layer: CompressedLinear,
    values: np.ndarray,
    zero: np.generic,
    name: str,
    bits: int,
    shape: tuple[int, ...] | None = None,
) -> str:
    """``values`` (O, I) stored at their bits and unfolded to ``shape``; of masked ones what is kept, ``zero`` elsewhere."""
    mask, shape = layer.how.mask, shape or values.shape
    if mask is None:
        return _unpacked(nodes, name, values, bits, shape)
    mask_bits = layer.mask.numpy()
    if _has_groups(layer, 8):  # each byte of the mask says where its weights go, of which there are as many for all
        lines, count = mask_bits.size // 8, int(mask_bits.reshape(-1)[:8].sum())
        first = np.argsort((~np.arange(256)[:, None] >> np.arange(8)) & 1, axis=1, kind="stable")[:, :count]
        flags = nodes.cast(nodes.tensor("mask", _pack(mask_bits, 1)), np.int32)
        places = nodes("Gather", nodes.table(f"places of {count} of 8", first.astype(np.int32)), flags)
        stored = _unpacked(nodes, name, values[mask_bits], bits, (lines, count))
        return nodes.reshape(nodes("ScatterElements", nodes.filled(zero, lines, 8), places, stored, axis=1), *shape)
    stored = _unpacked(nodes, name, np.append(zero, values[mask_bits]).astype(values.dtype), bits, (-1,))
    flags = nodes.cast(_flags(nodes, mask_bits, mask.block), np.int32)
    # The k-th kept weight is at index k; all others read index 0. (What has no size before it is computed, such as the
    # places that are not zero, newer runtimes would compute anew in every run.)
    places = nodes("Mul", nodes("CumSum", flags, nodes.scalar(np.int64, 0)), flags)
    return nodes.reshape(nodes("Gather", stored, places), *shape)


def _flags(nodes: Nodes, mask_bits: np.ndarray, block: tuple[int, int]) -> str:
    """A mask (O, I), a bit of it stored for each block, unfolded to uint8 (O I,)."""
    (outputs, inputs), (rows, columns) = mask_bits.shape, block
    if block == (1, 1):
        return _unpacked(nodes, "mask", mask_bits, 1, (mask_bits.size,))
    flags = _unpacked(nodes, "mask", mask_bits[::rows, ::columns], 1, (outputs // rows, 1, inputs // columns, 1))
    return nodes.reshape(nodes.expand(flags, outputs // rows, rows, inputs // columns, columns), mask_bits.size)


def _unpacked(nodes: Nodes, name: str, values: np.ndarray, bits: int, shape: tuple[int, ...]) -> str:
    """``values`` as they are, or whole numbers stored at 1, 2 or 4 bits and unfolded to uint8, in ``shape``."""
    if bits >= 8:
        return nodes.tensor(name, values.reshape(shape))
    per_byte = 8 // bits
    packed = nodes.tensor(name, _pack(values, bits).reshape(-1, 1))
    shifts = nodes.number(np.uint8, *(bits * index for index in range(per_byte)))
    digits = nodes("Mod", nodes("BitShift", packed, shifts, direction="RIGHT"), nodes.number(np.uint8, 2**bits))
    if values.size % per_byte:
        digits = nodes.reshape(digits, -1)
        digits = nodes("Slice", digits, nodes.number(np.int64, 0), nodes.number(np.int64, values.size))
    return nodes.reshape(digits, *shape)


def _powers(bits: int, count: int) -> np.ndarray:
    """What the lowest bit is worth of each of ``count`` numbers of ``bits`` bits that stand together."""
    return 2 ** (bits * np.arange(count))


def _pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Whole numbers of few bits, in order, to bytes, the lowest bits first."""
    per_byte = 8 // bits
    padded = np.pad(values.reshape(-1), (0, -values.size % per_byte)).reshape(-1, per_byte)
    return (padded * _powers(bits, per_byte)).sum(1).astype(np.uint8)
