"""Does a file compute what the network computes? It is run on pictures of sizes that its making has not seen."""

import contextlib
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppsr.archs.atd_layers import DictionaryAttention
from ppsr.archs.masked import MaskedNetwork
from ppsr.errors import UserError
from ppsr.export.files import first_line, rounded_to_half
from ppsr.extras import need

__all__ = [
    'SIZES',
    'TOLERANCE',
    'Comparison',
    'as_stored',
    'check',
    'onnx_runtime',
    'openvino',
    'picture',
    'runtimes',
    'settings_of',
]

TOLERANCE = 1e-4
SIZES = ((1, 1, 1), (2, 29, 37), (1, 1, 100), (1, 45, 5))  # pictures, height, width
# A token's category is the entry of the dictionary that resembles it most. Where two do so equally, up to this much of
# a similarity from 0 to 1, rounding decides, and the network is run with the category that the file has chosen.
TIE = 1e-5
UNKNOWN_CATEGORIES = 5e-3  # root mean square that is tolerated where the file's choices are not to be had


@dataclass(frozen=True)
class Comparison:
    """A file against the network on one batch.

    Attributes:
        runtime: name and version.
        shape: of the batch.
        error: largest absolute difference, of images in [0, 1].
        rms: root mean square of the differences.
        pure: share of the tokens that were exempt.
        flips: categories that the file chose otherwise, in all layers; None: not known.
        margin: by how much the network would have preferred its own, at most.
    """

    runtime: str
    shape: tuple[int, ...]
    error: float
    rms: float
    pure: float
    flips: int | None
    margin: float = 0.0

    @property
    def good(self) -> bool:
        if self.flips is None:
            return self.error <= TOLERANCE or self.rms <= UNKNOWN_CATEGORIES
        return self.error <= TOLERANCE and self.margin <= TIE

    def __str__(self) -> str:
        images, _, height, width = self.shape
        said = f'{self.runtime}: {images} × {width}×{height}, {self.pure:.0%} pure: largest difference {self.error:.1e}'
        if self.flips is None and self.error > TOLERANCE:
            said += f', root mean square {self.rms:.1e} (with category ties)'
        if self.flips:
            said += f', {self.flips} category ties decided otherwise (by {self.margin:.0e} at most)'
        return said + ('' if self.good else ', TOO MUCH')


Runner = Callable[[np.ndarray], list[np.ndarray]]


def onnx_runtime(path: str | Path) -> tuple[str, Runner]:
    """Name of the runtime, and a function that runs the file in it, on the CPU, and gives all its outputs."""
    (ort,) = need('export', 'ONNX Runtime', 'onnxruntime')
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return f'ONNX Runtime {ort.__version__}', lambda lq: session.run(None, {'lq': lq})


def openvino(path: str | Path) -> tuple[str, Runner]:
    """As :func:`onnx_runtime`, in OpenVINO, told to compute in float32."""
    (ov,) = need('export', 'OpenVINO', 'openvino')
    settings = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    model = ov.Core().compile_model(str(path), 'CPU', settings)

    def run(lq: np.ndarray) -> list[np.ndarray]:
        found = model(lq)
        return [found[i] for i in range(len(model.outputs))]

    return f'OpenVINO {ov.__version__.split("-")[0]}', run


def runtimes() -> list[Callable]:
    """ONNX Runtime, and OpenVINO where it is installed."""
    return [onnx_runtime] + ([openvino] if importlib.util.find_spec('openvino') else [])


def picture(images: int, height: int, width: int, seed: int = 0) -> Tensor:
    """(images, 3, height, width) of 8 bit in [0, 1]: texture, in which a third of the columns has one colour."""
    generator = torch.Generator().manual_seed(seed)
    lq = torch.randint(256, (images, 3, height, width), generator=generator)
    lq[..., width // 3 : 2 * width // 3] = torch.randint(256, (images, 3, 1, 1), generator=generator)
    return lq / 255


def with_categories(path: str | Path, folder: str | Path, count: int) -> tuple[Path, bool]:
    """An ONNX file with the categories of its tokens, layer by layer, as further outputs.

    Args:
        path: of the file.
        folder: for the other one.
        count: of the layers that have categories.

    Returns:
        The file to run, and whether it has those outputs.
    """
    (onnx,) = need('export', 'Checking an ONNX file', 'onnx')
    model = load_onnx(path)
    chosen = [
        node.output[0]
        for node in model.graph.node
        # the mask's own, over its centres, keeps the dimension
        if node.op_type == 'ArgMax' and not next((a.i for a in node.attribute if a.name == 'keepdims'), 1)
    ]
    if not count or len(chosen) != count:
        return Path(path), count == 0
    for name in chosen:
        value = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ['batch', None])
        model.graph.output.append(value)
    onnx.save(model, str(Path(folder) / 'with_categories.onnx'))
    return Path(folder) / 'with_categories.onnx', True


def choosers(net: nn.Module) -> list[nn.Module]:
    """The modules that choose categories, in order."""
    return [module for module in net.modules() if isinstance(module, DictionaryAttention)]


@contextlib.contextmanager
def _choosing(net: nn.Module, categories: Sequence[np.ndarray]) -> Iterator[list[tuple[int, float]]]:
    """The network with these categories in place of its own; a list that collects, for each layer, how many differ and
    by how much its own resembles a token more."""
    found, given = [], iter(categories)

    def choose(module, args, output):
        out, own, similarity = output
        category = torch.from_numpy(np.asarray(next(given))).to(own).view(own.shape)
        matrix = F.normalize(similarity.q, dim=-1) @ similarity.k.transpose(-2, -1)
        difference = [matrix.softmax(-1).gather(-1, c.long()[..., None]) for c in (own, category)]
        found.append((int((own != category).sum()), (difference[0] - difference[1]).max().item()))
        return out, category, similarity

    hooks = [module.register_forward_hook(choose) for module in (choosers(net) if categories else [])]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check(
    path: str | Path,
    net: MaskedNetwork,
    sizes: Sequence[tuple[int, int, int]] = SIZES,
    load: Sequence[Callable] | None = None,
) -> Iterator[Comparison]:
    """Run a file and compare it with the network it was made from.

    Args:
        net: on the CPU, in float32; of a file with float16 weights, with its parameters rounded likewise
            (:func:`as_stored`).
        sizes: (pictures, height, width) of the batches.
        load: functions like :func:`onnx_runtime`; None: an ONNX file, in :func:`runtimes`.

    Raises:
        UserError: a runtime does not take the file.
    """
    layers = len(choosers(net))
    with tempfile.TemporaryDirectory() as folder:
        if load is None:
            path_to_run, known = with_categories(path, folder, layers)
        else:
            path_to_run, known = path, layers == 0
        loaded = [_trying(path, one.__name__, one, path_to_run) for one in (runtimes() if load is None else load)]
        for seed, size in enumerate(sizes):
            lq = picture(*size, seed=seed)
            for name, run in loaded:
                sr, *categories = _trying(path, name, run, lq.numpy())
                with torch.inference_mode(), _choosing(net, categories) as choices:
                    expected, mask = net(lq, return_mask=True)
                difference = (sr - expected.numpy()).astype(np.float64)
                yield Comparison(
                    name,
                    tuple(lq.shape),
                    error=float(np.abs(difference).max()),
                    rms=float(np.sqrt((difference**2).mean())),
                    pure=0.0 if mask is None else mask.float().mean().item(),
                    flips=sum(flips for flips, _ in choices) if known else None,
                    margin=max((margin for _, margin in choices), default=0.0),
                )


def _trying(path: str | Path, runtime: str, work: Callable, *args):
    try:
        return work(*args)
    except UserError:
        raise
    except Exception as error:  # each runtime has errors of its own
        raise UserError(f'{path}: {runtime} does not run it ({first_line(error)}).') from error


def load_onnx(path: str | Path):
    """An ONNX file as onnx.ModelProto; UserError where it is none or cannot be read."""
    (onnx,) = need('export', 'Reading an ONNX file', 'onnx')
    try:
        return onnx.load(str(path))
    except Exception as error:  # protobuf has errors of its own
        raise UserError(f'{path}: cannot be read as an ONNX file ({first_line(error)}).') from error


def settings_of(path: str | Path) -> dict:
    """The configuration that an ONNX file of ours carries; {} where it carries none."""
    found = {entry.key: entry.value for entry in load_onnx(path).metadata_props}
    return json.loads(found.get('ppsr.config', '{}'))


def as_stored(path: str | Path, net: MaskedNetwork) -> MaskedNetwork:
    """The network that an ONNX file has to equal: `net`, its weights rounded where those of the file are float16.

    Raises:
        UserError: the file is of a network with other settings.
    """
    found, expected = settings_of(path), json.loads(json.dumps(net.configuration))
    if found != expected:
        if not found:
            raise UserError(f'{path}: was not made by ppsr export; choose another name, or --overwrite it.')
        other = next(key for key in {**expected, **found} if found.get(key) != expected.get(key))
        raise UserError(
            f'{path}: is of a network with other settings ({other} is {found.get(other)!r} there, and '
            f'{expected.get(other)!r} in the weights named); name those it was made from, or --overwrite it.'
        )
    (onnx,) = need('export', 'Checking an ONNX file', 'onnx')
    half = any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in load_onnx(path).graph.initializer)
    return rounded_to_half(net) if half else net
