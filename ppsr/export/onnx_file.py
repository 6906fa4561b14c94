"""A network as an ONNX file: any height, width and batch, the mask inside, its settings in the metadata.

torch.onnx translates what the network does with padded images (:meth:`MaskedNetwork.restore`), whose sides it knows to
be multiples; padding before it and cropping behind it are a few operators of their own.
"""

import copy
import json
from pathlib import Path

import numpy as np
import onnx
import onnx.compose
import onnx.parser
import onnx_ir.passes.common
import onnxscript.optimizer
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import Dim

from ppsr.archs.masked import MaskedNetwork, mirror_pad, reflect_pad
from ppsr.errors import UserError
from ppsr.export.files import first_line, quietly, rounded_to_half, write
from ppsr.export.operators import OPSET, TRANSLATIONS, exportable_mask
from ppsr.version import __version__

__all__ = ['export_onnx', 'onnx_model']

IR_VERSION = 10
FOLDED = 1024  # elements: larger constants are left to the runtime to compute, which keeps the file small
HALF_FROM = 64  # elements: smaller weights stay float32

# mirrored at the bottom and right, as often as it takes, the edge pixel repeated (mirror_pad) or not (reflect_pad)
PAD = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
pad (float[batch, 3, height, width] lq) => (float[batch, 3, padded_height, padded_width] padded, int64[2] ends) {{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    multiple = Constant <value_int = {multiple}> ()
    scale = Constant <value_int = {scale}> ()
    sides = Shape <start = 2> (lq)
    ends = Mul (sides, scale)
    most = Sub (multiple, one)
    up = Add (sides, most)
    counts = Div (up, multiple)
    whole = Mul (counts, multiple)
    {rows}
    {columns}
    tall = Gather <axis = 2> (lq, h_index)
    padded = Gather <axis = 3> (tall, w_index)
}}
"""
INDEX = """
    {0}_which = Constant <value_int = {1}> ()
    {0}_side = Gather (sides, {0}_which)
    {0}_end = Gather (whole, {0}_which)
    {0}_range = Range (zero, {0}_end, one)
    {0}_twice = Mul ({0}_side, two)
    {0}_less = Constant <value_int = {2}> ()
    {0}_there_and_back = Sub ({0}_twice, {0}_less)
    {0}_period = Max ({0}_there_and_back, one)
    {0}_turn = Mod ({0}_range, {0}_period)
    {0}_edge = Constant <value_int = {3}> ()
    {0}_last = Sub ({0}_period, {0}_edge)
    {0}_back = Sub ({0}_last, {0}_turn)
    {0}_inside = Less ({0}_turn, {0}_side)
    {0}_index = Where ({0}_inside, {0}_turn, {0}_back)
"""
CROP = """
<ir_version: {ir}, opset_import: ["" : {opset}]>
crop (float[batch, 3, p, q] whole_sr, int64[2] crop_ends) => (float[batch, 3, sr_height, sr_width] sr) {{
    starts = Constant <value_ints = [0, 0]> ()
    axes = Constant <value_ints = [2, 3]> ()
    sr = Slice (whole_sr, starts, crop_ends, axes)
}}
"""


class _Padded(nn.Module):
    """What is translated: a network from padded images on."""

    def __init__(self, net: MaskedNetwork):
        super().__init__()
        self.net = copy.deepcopy(net).cpu().float().eval()
        self.net.pure_pass = exportable_mask(net.pure_pass)

    def forward(self, padded: Tensor) -> Tensor:
        return self.net.restore(padded, self.net.pure_mask(padded))


def onnx_model(net: MaskedNetwork, half: bool = False) -> onnx.ModelProto:
    """A network as an ONNX model: lq (batch, 3, height, width) float32 -> sr.

    Args:
        net: any of ours whose parts have translations: all but CAMixer-ATD-light.
        half: store the weights as float16 (rounded); the file computes in float32 all the same.

    Raises:
        UserError: a network or a mask that cannot be exported.
    """
    padded = _Padded(rounded_to_half(net) if half else net)
    m = net.multiple
    example = torch.rand(2, 3, 2 * m, 3 * m)
    height, width = (Dim(name) if m == 1 else m * Dim(name) for name in ('rows', 'columns'))
    try:
        translated = quietly(_translate, padded, example, {0: Dim.DYNAMIC, 2: height, 3: width})
    except Exception as error:  # torch.onnx has no error of its own for "I do not know this operator"
        raise UserError(f'{type(net).__name__} cannot be exported: torch.onnx says "{first_line(error)}".') from error
    model = onnx_ir.to_proto(translated)
    model.ir_version = IR_VERSION
    if half:
        _store_half(model.graph)
    return _framed(model, net)


def _translate(padded: nn.Module, example: Tensor, dynamic: dict):
    with torch.no_grad():
        exported = torch.export.export(padded, (example,), dynamic_shapes=(dynamic,))
    program = torch.onnx.export(
        exported,
        dynamo=True,
        custom_translation_table=TRANSLATIONS,
        opset_version=OPSET,
        input_names=['x'],
        output_names=['y'],
        optimize=False,
    )
    model = program.model
    onnx_ir.passes.common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, input_size_limit=FOLDED, output_size_limit=FOLDED)
    for tidy in (
        onnx_ir.passes.common.CommonSubexpressionEliminationPass(),
        onnx_ir.passes.common.RemoveUnusedNodesPass(),
        onnx_ir.passes.common.RemoveUnusedFunctionsPass(),
        onnx_ir.passes.common.RemoveUnusedOpsetsPass(),
        # where the code lies that was traced is nobody's business
        onnx_ir.passes.common.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)
    return model


def _framed(model: onnx.ModelProto, net: MaskedNetwork) -> onnx.ModelProto:
    """With padding before it and cropping behind it, and the metadata."""
    about = dict(ir=IR_VERSION, opset=OPSET)
    mirror = (0, 1) if _repeats_edge(net) else (2, 0)
    index = {'rows': INDEX.format('h', 0, *mirror), 'columns': INDEX.format('w', 1, *mirror)}
    pad = onnx.parser.parse_model(PAD.format(**about, **index, multiple=net.multiple, scale=net.upscale))
    crop = onnx.parser.parse_model(CROP.format(**about))
    for part in (pad, crop):
        del part.opset_import[:]
        part.opset_import.extend(model.opset_import)
    del model.graph.value_info[:]  # names of sides that would contradict those of the frame
    model = onnx.compose.merge_models(pad, model, [('padded', 'x')], prefix1='pad_', prefix2='')
    model = onnx.compose.merge_models(model, crop, [('y', 'whole_sr'), ('pad_ends', 'crop_ends')])
    _rename(model.graph, {'pad_lq': 'lq'})
    _name_sides(model.graph.input[0], ['batch', 3, 'height', 'width'])
    _name_sides(model.graph.output[0], ['batch', 3, 'sr_height', 'sr_width'])
    model.producer_name, model.producer_version = 'ppsr', __version__
    model.graph.name = type(net).__name__
    helper.set_model_props(
        model,
        {
            'ppsr.config': json.dumps(net.configuration),
            'ppsr.scale': str(net.upscale),
            'ppsr.multiple': str(net.multiple),
            'ppsr.mask': repr(net.pure_pass),
        },
    )
    onnx.checker.check_model(model)
    return model


def _repeats_edge(net: MaskedNetwork) -> bool:
    """Which of the two ways of padding is the network's, told from what it does."""
    m = net.multiple
    probes = [torch.rand(1, 3, side, 1) for side in (1, 2, m // 2 + 1, m + 1, 2 * m - 1)]
    for pad, repeats in ((mirror_pad, True), (reflect_pad, False)):
        if all(torch.equal(net.pad(probe), pad(probe, m)) for probe in probes):
            return repeats
    raise UserError(f'{type(net).__name__} cannot be exported: it pads images in a way of its own.')


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for value in graph.input:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _name_sides(value: onnx.ValueInfoProto, sides: list[str | int]) -> None:
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, sides))


def _store_half(graph: onnx.GraphProto) -> None:
    """Keep as float16 what loses nothing by it: the weights, which have been rounded before."""
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        name, value = tensor.name, numpy_helper.to_array(tensor)
        with np.errstate(over='ignore'):
            small = value.astype(np.float16)
        if value.size >= HALF_FROM and np.array_equal(small.astype(np.float32), value):
            tensor.CopyFrom(numpy_helper.from_array(small, f'{name}.half'))
            casts.append(helper.make_node('Cast', [f'{name}.half'], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def export_onnx(net: MaskedNetwork, path: str | Path, half: bool = False) -> None:
    """Write a network as an ONNX file (:func:`onnx_model`), whole or not at all.

    Raises:
        UserError: it cannot be exported, or the file cannot be written.
    """
    write(Path(path), lambda: onnx_model(net, half).SerializeToString())
