"""Does a file compute what the network computes? It is run on pictures of sizes that its making has not seen."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppsr.archs.masked import MaskedNetwork
from ppsr.errors import UserError
from ppsr.export.files import first_line
from ppsr.extras import need
from ppsr.ops.dictionary import Similarity

__all__ = ['SIZES', 'TOLERANCE', 'Comparison', 'check', 'onnx_runtime', 'openvino', 'picture', 'runtimes']

TOLERANCE = 1e-4
SIZES = ((1, 1, 1), (2, 29, 37), (1, 1, 100), (1, 45, 5))  # pictures, height, width
# Two entries of the dictionary that resemble a token this much alike: which one is its category is a matter of rounding
TIE = 1e-6
TIED_TOLERANCE = 1e-3  # root mean square, where a category may differ


@dataclass(frozen=True)
class Comparison:
    """A file against the network on one batch.

    Attributes:
        runtime: name and version.
        shape: of the batch.
        error: largest absolute difference, of images in [0, 1].
        rms: root mean square of the differences.
        ties: tokens and layers in which a rounding decides the category.
        pure: share of the tokens that were exempt.
    """

    runtime: str
    shape: tuple[int, ...]
    error: float
    rms: float
    ties: int
    pure: float

    @property
    def good(self) -> bool:
        return self.error <= TOLERANCE or (self.ties > 0 and self.rms <= TIED_TOLERANCE)

    def __str__(self) -> str:
        images, _, height, width = self.shape
        said = f'{self.runtime}: {images} × {width}×{height}, {self.pure:.0%} pure: largest difference {self.error:.1e}'
        if self.error > TOLERANCE and self.ties:
            said += f', root mean square {self.rms:.1e} ({self.ties} category ties)'
        return said + ('' if self.good else ', TOO MUCH')


def onnx_runtime(path: str | Path) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """Name of the runtime, and a function that runs the file in it, on the CPU."""
    (ort,) = need('export', 'ONNX Runtime', 'onnxruntime')
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return f'ONNX Runtime {ort.__version__}', lambda lq: session.run(None, {'lq': lq})[0]


def openvino(path: str | Path) -> tuple[str, Callable[[np.ndarray], np.ndarray]]:
    """As :func:`onnx_runtime`, in OpenVINO, told to compute in float32."""
    (ov,) = need('export', 'OpenVINO', 'openvino')
    settings = {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    model = ov.Core().compile_model(str(path), 'CPU', settings)
    return f'OpenVINO {ov.__version__.split("-")[0]}', lambda lq: model(lq)[0]


def runtimes() -> list[Callable]:
    """ONNX Runtime, and OpenVINO where it is installed."""
    return [onnx_runtime] + ([openvino] if importlib.util.find_spec('openvino') else [])


def picture(images: int, height: int, width: int, seed: int = 0) -> Tensor:
    """(images, 3, height, width) of 8 bit in [0, 1]: texture, in which a third of the columns has one colour."""
    generator = torch.Generator().manual_seed(seed)
    lq = torch.randint(256, (images, 3, height, width), generator=generator)
    lq[..., width // 3 : 2 * width // 3] = torch.randint(256, (images, 3, 1, 1), generator=generator)
    return lq / 255


@contextlib.contextmanager
def _counting_ties(net: nn.Module) -> Iterator[list[int]]:
    """A list that collects, for each layer that runs, the tokens whose category hangs on a rounding."""
    found = []

    def look(module, args, output):
        for part in output if isinstance(output, tuple) else ():
            if isinstance(part, Similarity):
                matrix = F.normalize(part.q.double(), dim=-1) @ part.k.double().transpose(-2, -1)
                best = matrix.softmax(-1).topk(min(2, matrix.shape[-1]), dim=-1).values
                found.append(int((best[..., 0] - best[..., -1] < TIE).sum()) if best.shape[-1] == 2 else 0)

    hooks = [module.register_forward_hook(look) for module in net.modules() if module is not net]
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
            (:func:`ppsr.export.onnx_file.rounded_to_half`).
        sizes: (pictures, height, width) of the batches.
        load: functions like :func:`onnx_runtime`; None: :func:`runtimes`.

    Raises:
        UserError: a runtime does not take the file.
    """
    loaded = [_trying(path, one.__name__, one, path) for one in (runtimes() if load is None else load)]
    for seed, size in enumerate(sizes):
        lq = picture(*size, seed=seed)
        with torch.inference_mode(), _counting_ties(net) as ties:
            expected, mask = net(lq, return_mask=True)
        pure = 0.0 if mask is None else mask.float().mean().item()
        for name, run in loaded:
            difference = _trying(path, name, run, lq.numpy()) - expected.numpy()
            rms = float(np.sqrt((difference.astype(np.float64) ** 2).mean()))
            yield Comparison(name, tuple(lq.shape), float(np.abs(difference).max()), rms, sum(ties), pure)


def _trying(path: str | Path, runtime: str, work: Callable, *args):
    try:
        return work(*args)
    except UserError:
        raise
    except Exception as error:  # each runtime has errors of its own
        raise UserError(f'{path}: {runtime} does not run it ({first_line(error)}).') from error


def settings_of(path: str | Path) -> dict:
    """The configuration that an ONNX file of ours carries; {} where it carries none."""
    (onnx,) = need('export', 'Reading an ONNX file', 'onnx')
    model = onnx.load(str(path), load_external_data=False)
    found = {entry.key: entry.value for entry in model.metadata_props}
    return json.loads(found.get('ppsr.config', '{}'))
