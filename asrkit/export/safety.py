"""What a model file may hold before a runtime opens it: exports come from strangers, and loading one must only load it.

ONNX can name files outside the directory to read tensors from, and operators of libraries. TorchScript is a program: code in
``__setstate__`` runs while it is loaded, and operators such as ``aten::save`` write files. asrkit writes none of these.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from asrkit.errors import UserError
from asrkit.export.integers import MICROSOFT
from asrkit.extras import require

MOST_CODE = 1 << 26  # bytes; torch compresses code, not tensors
DOMAINS = ("", "ai.onnx", MICROSOFT)
# What the exported graphs are made of, in torch 1.13 and 2.13.
OPERATORS = """
    aten::Bool aten::Int aten::IntImplicit aten::ScalarImplicit aten::__and__ aten::__getitem__ aten::__or__ aten::_convolution
    aten::add aten::append aten::arange aten::bitwise_not aten::cat aten::chunk aten::clamp aten::contiguous aten::cos aten::detach
    aten::div aten::embedding aten::eq aten::expand aten::flatten aten::floor_divide aten::format aten::full aten::ge aten::glu
    aten::gt aten::index aten::layer_norm aten::le aten::linear aten::log_softmax aten::lt aten::masked_fill aten::matmul aten::mul
    aten::ne aten::neg aten::new_zeros aten::ones aten::pad aten::permute aten::pow aten::relu aten::remainder aten::reshape
    aten::rsub aten::scaled_dot_product_attention aten::select aten::sigmoid aten::silu aten::sin aten::size aten::slice aten::softmax
    aten::split aten::squeeze aten::sub aten::sum aten::tanh aten::to aten::transpose aten::type_as aten::unsqueeze aten::view
    aten::where aten::zeros
    prim::Constant prim::GetAttr prim::ListConstruct prim::ListUnpack prim::NumToTensor prim::TupleConstruct
    prim::TupleUnpack
    """  # a text reads better here than a list of 70 lines


def check_onnx(path: Path) -> None:
    """Refuse an ONNX file that reaches out of itself.

    Raises:
        UserError: it is no ONNX file, keeps tensors in other files, or has operators of other domains.
    """
    onnx = require("onnx", for_="an exported model")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's error is not the same class in all its versions
        raise UserError(f"{path}: onnx {onnx.__version__} cannot load it; restore it or export again") from error
    for message in _messages(model):
        if isinstance(message, onnx.TensorProto) and (
            message.data_location == onnx.TensorProto.EXTERNAL or message.external_data
        ):
            raise UserError(
                f"{path}: keeps {message.name or 'a tensor'} in another file, which no export of asrkit does"
            )
        if isinstance(message, onnx.NodeProto) and message.domain not in DOMAINS:
            raise UserError(
                f"{path}: has the operator {message.domain}.{message.op_type}, which no export of asrkit has"
            )


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all within it."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(item)


def checked_script(path: Path) -> io.BytesIO:
    """A TorchScript file that runs no code while it is loaded, as the archive to load.

    It is written anew from the entries that were looked at. torch reads archives by other rules than Python, so of the file itself it
    might load what nobody looked at: names are alike to it that differ by case, and of two entries of one name it may take either.

    Raises:
        UserError: it is no TorchScript archive, or has such code.
    """
    cannot = f"{path}: torch {torch.__version__} cannot load it; it is no TorchScript archive: export again"
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as checked:
            entries = archive.infolist()
            if len({entry.filename.casefold() for entry in entries}) < len(entries):
                raise UserError(f"{path}: has two entries of one name, which no export of asrkit has")
            if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
                raise UserError(f"{path}: is packed in a way that torch does not read; export again")
            if sum(entry.file_size for entry in entries) > path.stat().st_size + MOST_CODE:
                raise UserError(f"{path}: unpacks to far more than its size, which no export of asrkit does")
            for entry in entries:
                content = archive.read(entry)
                if re.search(rb"__[sg]etstate__", content):
                    raise UserError(f"{path}: runs code while it is loaded, which no export of asrkit does")
                checked.writestr(entry.filename, content)
    except (zipfile.BadZipFile, OSError, RuntimeError, EOFError, ValueError, zlib.error) as error:
        raise UserError(cannot) from error
    copy.seek(0)
    return copy


def check_operators(path: Path, script: Any) -> None:
    """Refuse a loaded program with operators that no export has.

    Raises:
        UserError: naming them.
    """
    graph = script.inlined_graph
    other = sorted({node.kind() for node in _nodes(graph)} - set(OPERATORS.split()))
    if other:
        raise UserError(f"{path}: has the operators {', '.join(other)}, which no export of asrkit has")


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)
