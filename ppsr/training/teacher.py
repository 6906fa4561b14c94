"""Distillation: a finished network of the same scale says what it would make of the training images.

``train → teacher`` adds the distance to the teacher's answers to the loss of any training (``l_teacher`` in the log).
The teacher is a weight file of this package, or one of any network that spandrel knows (`pip install 'ppsr[teacher]'`).
It answers to the patch of each step; with ``cache`` it answers once to every whole training image, and the answers are
cropped and turned as the images are.

With ``features`` each group of layers also learns to do what the teacher's does, alone (``l_features``): it is given
the map that the teacher's group was given, and is to find the map that the teacher's found.
"""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ppsr.archs.atd_layers import ATDNetwork
from ppsr.atomic import PREFIX, atomic_path
from ppsr.errors import DataError, UserError
from ppsr.images import decode_rgb, to_tensor
from ppsr.pictures.memory import is_out_of_memory
from ppsr.tiling import DEFAULT_OVERLAP, tiled_forward
from ppsr.training.distributed import barrier, from_first, raise_in_all
from ppsr.weights import load_model, read_checkpoint, resolve

__all__ = ['Answers', 'Teacher', 'features_loss', 'fill_cache', 'groups_of']

MIN_TILE = 64  # LR pixels: where memory does not suffice for this, it does not suffice
LARGE = 1 << 30
ABANDONED = 3600  # seconds after which nobody is writing a temporary file any more
Maps = list[tuple[Tensor, Tensor]]


class Teacher:
    """A network that answers, in eval mode and without gradients.

    Args:
        options: ``weights``, a file or the name of shipped weights; ``tile``, the side in LR pixels from which it works
            in tiles (0: never).
        scale: of the training.
        device: where it runs.

    Raises:
        UserError: the file is missing, holds no weights or more than weights, is of a network that nobody knows, or
            that network has another scale or other channels than RGB.
    """

    def __init__(self, options: Mapping, scale: int, device: str | torch.device = 'cpu'):
        self.path, self.scale, self.tile = resolve(options['weights']), scale, options['tile']
        self.net, own_scale = _read(self.path)
        if own_scale != scale:
            raise UserError(
                f'train → teacher → weights: {self.path} enlarges ×{own_scale} and this training ×{scale}; name a '
                'teacher of that scale.'
            )
        self.net.to(device).eval().requires_grad_(False)

    def __call__(self, lq: Tensor) -> Tensor:
        """(B, 3, h, w) RGB in [0, 1] -> (B, 3, s·h, s·w) float32; in smaller tiles where memory does not suffice."""
        while True:
            try:
                with torch.no_grad():
                    answer, _ = tiled_forward(self.net, lq, self.tile, DEFAULT_OVERLAP, scale=self.scale)
                    return answer.to(lq.device, torch.float32)
            except Exception as e:
                if not is_out_of_memory(e):
                    raise
                tile = min(self.tile or LARGE, max(lq.shape[-2:])) // 2
                if tile < MIN_TILE:
                    raise UserError(
                        f'train → teacher: memory does not suffice for {self.path} on {MIN_TILE}×{MIN_TILE} pixels; '
                        'make the batch smaller, or take a smaller teacher.'
                    ) from e
            self.tile = tile  # outside of the handler: what the failed call held is free by now

    def with_maps(self, lq: Tensor) -> tuple[Tensor, Maps]:
        """Its answer, and what each of its groups was given and found, (B, H, W, C) each."""
        maps: Maps = []
        with torch.no_grad(), _hooks(groups_of(self.net), lambda i, given: None, lambda *pair: maps.append(pair)):
            return self.net(lq).float(), maps

    def check_features(self, student: nn.Module) -> None:
        """Refuse (UserError) a student whose groups are not made like the teacher's."""
        ours, theirs = _shape(student), _shape(self.net)
        if ours is None or ours != theirs:
            raise UserError(
                f'train → teacher → features: {self.path} has {_words(theirs)} and network_g {_words(ours)}; they have '
                'to be the same, or set features: false.'
            )


def groups_of(net: nn.Module) -> list[nn.Module]:
    """The groups of a network of the ATD-light family, each of which maps (B, H, W, C) to the same; none of others."""
    return list(net.layers) if isinstance(net, ATDNetwork) else []


def features_loss(student: nn.Module, lq: Tensor, maps: Maps) -> Tensor:
    """How far the groups of the student, each given what the teacher's was given, are from what the teacher's found.

    Args:
        student: has groups like the teacher's; its mask is that of `lq`, as always.
        lq: (B, 3, h, w), what the teacher answered to.
        maps: of :meth:`Teacher.with_maps`.

    Returns:
        A scalar: the squared error over that of leaving the map as it is, mean over the groups. 1: nothing is learned.
    """
    found: list[Tensor] = []
    with _hooks(groups_of(student), lambda i, given: maps[i][0], lambda given, output: found.append(output)):
        student(lq)
    errors = [
        (output.float() - target).square().mean() / (target - given).square().mean().clamp_min(1e-12)
        for output, (given, target) in zip(found, maps, strict=True)
    ]
    return sum(errors) / len(errors)


@contextlib.contextmanager
def _hooks(groups: list[nn.Module], replace: Callable, note: Callable) -> Iterator[None]:
    """Inside, group i gets ``replace(i, map)`` in place of its map, unless that is None, and ``note(map, found)`` hears
    what it was given and what it found."""

    def before(i: int) -> Callable:
        def hook(group, args):
            other = replace(i, args[0])
            return None if other is None else (other, *args[1:])

        return hook

    def after(group, args, output):
        note(args[0], output[0] if isinstance(output, tuple) else output)

    handles = []
    try:
        for i, group in enumerate(groups):
            handles += [group.register_forward_pre_hook(before(i)), group.register_forward_hook(after)]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shape(net: nn.Module) -> tuple[int, int, int] | None:
    """Number of groups, their channels, and what maps are padded to."""
    groups = groups_of(net)
    return (len(groups), net.conv_first.out_channels, net.multiple) if groups else None


def _words(shape: tuple[int, int, int] | None) -> str:
    return 'no groups of ATD-light' if shape is None else '{} groups of {} channels and windows of {}'.format(*shape)


# ---------------------------------------------------------------------------------------------------------- its weights


def _read(path: Path) -> tuple[nn.Module, int]:
    """The network of a weight file, dense where it is ours, and its scale."""
    checkpoint = read_checkpoint(path)
    try:
        net = load_model(path, pure_pass=False)
        return net, net.upscale
    except UserError:
        if checkpoint.config is not None:  # it says that it is ours
            raise
    try:
        import spandrel
    except ImportError as e:
        raise UserError(
            f"train → teacher → weights: {path} is of none of our networks; pip install 'ppsr[teacher]' brings "
            'spandrel, which knows many others.'
        ) from e
    where = f'train → teacher → weights: {path}'
    try:
        found = spandrel.ModelLoader().load_from_state_dict(dict(checkpoint.state_dict))
    except spandrel.UnsupportedModelError as e:
        raise UserError(f'{where} is of a network that neither ppsr nor spandrel {spandrel.__version__} knows.') from e
    except Exception as e:  # weights that look like those of a network and are not
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200].rstrip('.')
        raise UserError(f'{where} cannot be loaded by spandrel {spandrel.__version__} ({reason}).') from e
    if not isinstance(found, spandrel.ImageModelDescriptor):
        raise UserError(f'{where}: {found.architecture.name} takes more than an image; name another teacher.')
    if (found.input_channels, found.output_channels) != (3, 3):
        raise UserError(
            f'{where}: its network takes {found.input_channels} channels and gives {found.output_channels}; a teacher '
            'takes and gives RGB.'
        )
    return _Spandrel(found), found.scale


class _Spandrel(nn.Module):
    """A network of spandrel as a module of ours: any size of image, a tensor that a loss may use."""

    def __init__(self, descriptor):
        super().__init__()
        self.model, self.descriptor = descriptor.model, descriptor

    def forward(self, lq: Tensor) -> Tensor:
        return self.descriptor(lq).clone()  # it runs in inference mode, whose tensors no loss may save


# ---------------------------------------------------------------------------------------------------------- its answers


class Answers:
    """A teacher's answers to whole training images, one file each: float16 (H, W, 3), mapped and not read.

    Args:
        folder: where they lie; those of each teacher in a folder of their own.
        teacher: whose they are.

    A file is named by the content of the LR image: answers to an image that was changed are not found.
    """

    def __init__(self, folder: str | Path, teacher: Teacher):
        digest = hashlib.sha256(teacher.path.read_bytes())
        digest.update(f'{teacher.tile} {DEFAULT_OVERLAP}'.encode())
        self.folder = Path(folder, f'{teacher.path.stem[:80]}_{digest.hexdigest()[:12]}')

    def path(self, lq_bytes: bytes) -> Path:
        """The file of the answer to an encoded LR image."""
        return self.folder / f'{hashlib.sha256(lq_bytes).hexdigest()[:32]}.npy'

    def read(self, lq_bytes: bytes, shape: tuple[int, int]) -> np.ndarray | None:
        """The answer of this height and width; None where there is none that is whole."""
        try:
            answer = np.load(self.path(lq_bytes), mmap_mode='r', allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return answer if answer.shape == (*shape, 3) and answer.dtype == np.float16 else None

    def write(self, lq_bytes: bytes, answer: Tensor) -> None:
        """(1, 3, H, W), whole or not at all; OSError as the file system says."""
        with atomic_path(self.path(lq_bytes)) as temporary:
            np.save(temporary, answer[0].permute(1, 2, 0).cpu().numpy().astype(np.float16))

    def crop(self, lq_bytes: bytes, shape: tuple[int, int], lq_path: str) -> np.ndarray:
        """:meth:`read` for a training that has been started: what is not there is an error.

        Raises:
            DataError: it is gone.
        """
        answer = self.read(lq_bytes, shape)
        if answer is None:
            raise DataError(
                f"train → teacher → cache: the teacher's answer to {lq_path} is no longer in {self.folder}, or not "
                'whole; start again with --auto_resume, and it is made anew.'
            )
        return answer


def fill_cache(answers: Answers, teacher: Teacher, dataset: Dataset, opt: Mapping, logger) -> None:
    """Make the answers that are not there yet; every process its share. The disk use is said before.

    Args:
        dataset: a :class:`ppsr.data.PairedSRDataset`; its items have the answers from here on, as ``teacher``.
        opt: ``rank`` and ``world_size`` of the training.

    Raises:
        UserError: the data set is another one, or the folder cannot be written or has not enough room; what has been
            written stays and is used the next time.
    """
    if not hasattr(dataset, 'answers'):
        raise UserError(
            f'train → teacher → cache works with data sets of type PairedSRDataset, not {type(dataset).__name__}; '
            'leave it out, and the teacher answers to each patch.'
        )
    where = f'train → teacher → cache: {answers.folder}'
    todo = from_first(lambda: _plan(answers, teacher, dataset, where, logger))
    error = None
    mine = todo[opt['rank'] :: opt['world_size']]
    try:
        for index in tqdm(mine, desc='teacher', unit='image', leave=False, disable=None if opt['rank'] == 0 else True):
            lq_path, _ = dataset.pairs.paths(index)
            lq_bytes, _ = dataset.pairs.read(index)
            lq = to_tensor(decode_rgb(lq_bytes, lq_path)).to(next(teacher.net.parameters()).device)
            answers.write(lq_bytes, teacher(lq))
    except OSError as e:
        error = UserError(f'{where} cannot be written ({e.strerror or e}); what is there is used the next time.')
    except Exception as e:
        error = e
    raise_in_all(error, next(teacher.net.parameters()).device)
    barrier()
    dataset.answers = answers


def _plan(answers: Answers, teacher: Teacher, dataset: Dataset, where: str, logger) -> list[int]:
    """Indices of the images without an answer, after it has been said what they will take."""
    todo, size, total = [], 0, 0
    for index in range(len(dataset)):
        (h, w), _ = dataset.pairs.sizes(index)
        shape = h * teacher.scale, w * teacher.scale
        bytes_of_one = 6 * shape[0] * shape[1] + 128
        total += bytes_of_one
        if answers.read(dataset.pairs.read(index)[0], shape) is None:
            todo.append(index)
            size += bytes_of_one
    try:
        answers.folder.mkdir(parents=True, exist_ok=True)
        for path in answers.folder.glob(f'{PREFIX}*'):  # of a run that was killed while it wrote; others may be writing
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink(missing_ok=True)
        free = shutil.disk_usage(answers.folder).free
    except OSError as e:
        raise UserError(f'{where} cannot be made ({e.strerror or e}).') from e
    logger.info(
        f"The teacher's answers to {len(dataset)} images take {total / 1e6:,.1f} MB in {answers.folder}; "
        f'{len(dataset) - len(todo)} are there, {len(todo)} are made now ({size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB '
        'are free).'
    )
    if size > free:
        raise UserError(
            f'{where} would grow by {size / 1e6:,.1f} MB and {free / 1e6:,.1f} MB are free there; name a folder on '
            'another disk, or leave cache out.'
        )
    return todo
