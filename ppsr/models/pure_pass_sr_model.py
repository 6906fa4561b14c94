"""The BasicSR model around PP-ATD-light: an SRModel that counts what Pure-Pass saves and loads weights safely."""

import contextlib
import copy
import json
import math
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed
from basicsr.metrics import calculate_metric
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import default_collate
from tqdm import tqdm

from ppsr.archs.masked import HasAuxiliaryLosses, as_masked
from ppsr.errors import UserError
from ppsr.images import to_image, write_png
from ppsr.registry import register
from ppsr.tiling import DEFAULT_OVERLAP, tiled_forward
from ppsr.training import checkpoints, resume
from ppsr.training.distributed import any_process, from_all, from_first, raise_in_all
from ppsr.training.exemptions import Exemptions
from ppsr.training.flat import flat_loss, flat_pictures
from ppsr.training.optimizers import muon_for
from ppsr.training.teacher import Answers, Teacher, features_loss, fill_cache
from ppsr.weights import load_into, read_checkpoint, resolve

__all__ = ['PurePassSRModel']

AMP = {'bf16': torch.bfloat16, 'fp16': torch.float16}  # train.amp
MAX_NONFINITE = 10  # losses that are not finite, unless train.max_nonfinite says otherwise
OPTIMIZERS = ('Adam', 'AdamW', 'SGD', 'RMSprop', 'RAdam', 'NAdam')
# what Pure-Pass did to a data set, reported beside PSNR and SSIM; which direction a best-of record prefers
STATISTICS = {'pure_percent': 'higher', 'gmacs': 'lower', 'gmacs_saved_percent': 'higher'}
STATIC_OUTPUT = (720, 1280)  # static multiply-adds are told for this output size, as papers do


@register(MODEL_REGISTRY)
class PurePassSRModel(SRModel):
    """SRModel of basicsr, with:

    - parameters and GMACs at 1280×720 output logged when it is built;
    - per validation set, beside the metrics: mean share of pure pixels, mean GMACs per image and the share saved
      against the dense network, counted from the masks that were really used;
    - named auxiliary losses: a network with ``auxiliary_losses() -> {name: scalar}`` has them added to the training
      loss, each times ``train.auxiliary_weights[name]`` (or the network's own ``auxiliary_weights``), and logged;
    - ``train.teacher``: the answers of a finished network are learned, too, and what its groups do
      (:mod:`ppsr.training.teacher`);
    - ``train.flat_opt``: one-colour pictures beside every batch, which have to stay as they are
      (:mod:`ppsr.training.flat`);
    - ``train.pp_*``: the mask, its threshold and what is exempt are drawn for every batch
      (:mod:`ppsr.training.exemptions`);
    - every optimizer of torch.optim that super-resolution uses (basicsr 1.4.2 knows Adam only);
    - weights read without running code, keys named when they do not fit;
    - ``train.grad_clip_norm``: gradients are scaled down to this norm; ``train.amp``: bf16 or fp16 autocast of the
      network, losses and weights stay float32;
    - a loss or gradient that is not finite skips the step and writes the file names of the batch to nonfinite.jsonl
      beside the log; the ``train.max_nonfinite``-th one (default 10) ends the training; weights that are no longer
      finite after a step end it at once;
    - an output that is not finite is never scored: its image and the weights are named, the metrics are NaN;
    - on resuming the options count: where they ask for other settings than the state was saved with, that is said;
    - checkpoints written atomically, with all that a resumed training needs to go on as if it had not been interrupted
      (:mod:`ppsr.training.checkpoints`); ``logger.keep_last`` of them are kept.

    Networks of other packages work; they have no statistics unless they are a :class:`ppsr.archs.MaskedNetwork`.
    """

    def __init__(self, opt: dict):
        self.position: dict = {}  # where in the epoch the training stands; the training loop's, kept in the state
        self.nonfinite = 0  # steps skipped so far
        self.best_metric_results: dict = {}
        self.unscored: list[str] = []  # images whose output was not finite, with the reason
        self.stop_requested = lambda: False  # the training loop's; a validation ends early when it says so
        with _as_user_error('the model cannot be built from these options'):
            super().__init__(opt)
        net = as_masked(self.get_bare_model(self.net_g))
        if net is not None and opt['rank'] == 0:
            h, w = (side // opt['scale'] for side in STATIC_OUTPUT)
            parameters = sum(p.numel() for p in net.parameters())
            get_root_logger().info(
                f'{type(net).__name__}: {parameters:,} parameters, {sum(net.macs(h, w).values()) / 1e9:.2f} GMACs for '
                f'{STATIC_OUTPUT[1]}×{STATIC_OUTPUT[0]} output ({w}×{h} input) when no pixel is pure.'
            )

    # ------------------------------------------------------------------ building

    def model_to_device(self, net):
        net = net.to(self.device)
        if self.opt['dist']:
            unused = self.opt.get('find_unused_parameters', False)
            # a convolution's gradient may come in another memory layout than its weights: a small copy, no harm done
            warnings.filterwarnings('ignore', message='Grad strides do not match bucket view strides')
            devices = [torch.cuda.current_device()] if self.device.type == 'cuda' else None  # None: CPU with gloo
            return DistributedDataParallel(net, device_ids=devices, find_unused_parameters=unused)
        if self.opt['num_gpu'] > 1:
            if self.is_train:
                raise UserError(
                    f'num_gpu is {self.opt["num_gpu"]}, and a process trains on one GPU: start one process for each '
                    f'(torchrun --nproc_per_node={self.opt["num_gpu"]} ppsr/train.py -opt … --launcher pytorch), or '
                    'set num_gpu: 1.'
                )
            get_root_logger().info('One GPU is used; torchrun starts a process for each (docs/reliability.md).')
        return net

    def print_network(self, net):
        """Nothing here: __init__ logs the line that matters, and 24 layers in full would bury it."""

    def setup_optimizers(self):
        with _as_user_error('train → optim_g'):
            super().setup_optimizers()

    def setup_schedulers(self):
        with _as_user_error('train → scheduler'):
            super().setup_schedulers()

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        if optim_type == 'Muon':  # has to know which parameters are matrices
            return muon_for(self.get_bare_model(self.net_g), lr, **kwargs)
        if optim_type not in OPTIMIZERS:
            raise UserError(f'train → optim_g → type: {optim_type!r} is not one of {", ".join(OPTIMIZERS)}, Muon.')
        return getattr(torch.optim, optim_type)(params, lr, **kwargs)

    def load_network(self, net, load_path, strict=True, param_key='params_ema'):
        checkpoint = read_checkpoint(resolve(load_path), param_key)
        net = self.get_bare_model(net)
        left_out = load_into(net, checkpoint, strict)
        logger = get_root_logger()
        logger.info(f'Loaded {type(net).__name__} from {load_path} ({checkpoint.key or "bare state dict"}).')
        if left_out:
            logger.warning(f'{len(left_out)} parameters were left as they are: {"; ".join(left_out[:6])}')

    # ------------------------------------------------------------------ training

    def init_training_settings(self):
        train = self.opt['train']
        self.asked = {key: copy.deepcopy(train.get(key)) for key in ('optim_g', 'scheduler')}  # basicsr takes it apart
        if name := first_not_finite(self.net_g):
            path = self.opt['path'].get('pretrain_network_g')
            raise UserError(f'{path or "the network"}: its weights are not finite (first {name}); start from others.')
        self.teacher = self.answers = None
        if train.get('teacher'):
            self.teacher = Teacher(train['teacher'], self.opt['scale'], self.device)
            if train['teacher']['features']:
                self.teacher.check_features(self.get_bare_model(self.net_g))
        try:
            super().init_training_settings()
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as e:
            if not train.get('perceptual_opt') or isinstance(e, torch.cuda.OutOfMemoryError):
                raise
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.')
            raise UserError(
                f'train → perceptual_opt: the weights of its network can neither be read nor downloaded ({reason}); '
                f'put them into {torch.hub.get_dir()}/checkpoints, or leave perceptual_opt out.'
            ) from e
        self.flat, self.teaching = train.get('flat_opt'), train.get('teacher')
        self.exemptions = Exemptions(train, self.get_bare_model(self.net_g))
        self.amp_dtype = AMP.get(train.get('amp'))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.grad_clip_norm = train.get('grad_clip_norm')
        self.max_nonfinite = train.get('max_nonfinite') or MAX_NONFINITE

    def prepare_data(self, dataset) -> None:
        """Before the first step: the answers of a teacher to the training images, where they are to be cached.

        Raises:
            UserError: the folder cannot be written, or has not enough room.
        """
        if self.teacher is not None and self.teaching['cache']:
            answers = Answers(self.teaching['cache'], self.teacher)
            fill_cache(answers, self.teacher, dataset, self.opt, get_root_logger())

    def feed_data(self, data):
        self.lq = data['lq'].to(self.device, non_blocking=True)
        if 'gt' in data:
            self.gt = data['gt'].to(self.device, non_blocking=True)
        self.answers = data['teacher'].to(self.device, non_blocking=True) if 'teacher' in data else None
        self.lq_path = data.get('lq_path', [])

    def optimize_parameters(self, current_iter):
        """One step; none where the loss or the gradient is not finite.

        Raises:
            UserError: that happened ``train.max_nonfinite`` times, or the step made weights that are not finite.
        """
        with self.exemptions.draw():
            self._step(current_iter)

    def _step(self, current_iter: int) -> None:
        self.optimizer_g.zero_grad()
        beside = self._backward_beside(current_iter)
        with self._autocast():
            self.output = self.net_g(self.lq)
        self.output = self.output.float()
        losses = self._losses()
        total = sum(losses.values())
        losses.update(beside)
        # all processes take the step or none does: a backward pass waits for every one of them
        finite = not any_process(not torch.isfinite(sum(losses.values())).item(), self.device)
        if finite:
            self.scaler.scale(total).backward()
            self.scaler.unscale_(self.optimizer_g)
            norm = torch.nn.utils.clip_grad_norm_(self.net_g.parameters(), self.grad_clip_norm or float('inf'))
            if self.scaler.is_enabled():  # finds its scale by overflowing now and then: that is no failure
                self.scaler.step(self.optimizer_g)
                self.scaler.update()
            elif finite := torch.isfinite(norm).item():
                self.optimizer_g.step()
            if self.grad_clip_norm:
                losses['grad_norm'] = norm
        self.log_dict = self.reduce_loss_dict({name: loss.detach() for name, loss in losses.items()})
        if not finite:
            self._note_nonfinite(current_iter, losses)
        elif name := first_not_finite(self.net_g):
            self._refuse_weights(current_iter, name)
        elif self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def _autocast(self):
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    def _backward_beside(self, current_iter: int) -> OrderedDict:
        """Terms of the loss that have forward passes of their own, by name, detached: their gradients are added here.

        One after the other, each graph freed before the next is made. DistributedDataParallel is to average once, in
        the backward pass of the batch, and what has gathered until then with it.
        """
        several = isinstance(self.net_g, DistributedDataParallel)
        losses = OrderedDict()
        with self.net_g.no_sync() if several else contextlib.nullcontext():
            for name, loss in self._losses_beside(current_iter):
                self.scaler.scale(loss).backward()
                losses[name] = loss.detach()
        return losses

    def _losses_beside(self, current_iter: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Each such term, computed when it is its turn."""
        if self.teacher is not None and self.teaching['features']:
            answers, maps = self.teacher.with_maps(self.lq)
            self.answers = answers if self.answers is None else self.answers
            with self._autocast():
                loss = features_loss(self.get_bare_model(self.net_g), self.lq, maps)
            yield 'l_features', self.teaching['features_weight'] * loss
        if self.flat is not None:
            pictures = flat_pictures(self.flat, self.opt['manual_seed'], current_iter, self.opt['rank'])
            pictures = pictures.to(self.device)
            with self._autocast():
                output = self.net_g(pictures)
            yield 'l_flat', flat_loss(output, pictures, self.flat)

    def _note_nonfinite(self, current_iter: int, losses: dict) -> None:
        self.nonfinite += 1
        values = {name: str(loss.item()) for name, loss in losses.items()}  # as text: JSON has no NaN
        batches = from_all({'losses': values, 'lq_path': list(self.lq_path)})
        folder, where = self.opt['path'].get('log'), ''
        if folder is not None:  # a study has no log
            notes = Path(folder, 'nonfinite.jsonl')
            from_first(lambda: _append(notes, json.dumps({'iter': current_iter, 'processes': batches})))
            where = f', file names in {notes}'
        get_root_logger().warning(
            f'iteration {current_iter}: the loss or its gradient is not finite ({values}); step skipped '
            f'({self.nonfinite} of {self.max_nonfinite}){where}.'
        )
        if self.nonfinite >= self.max_nonfinite:
            raise UserError(
                f'the loss or its gradient was not finite {self.nonfinite} times, last at iteration {current_iter}'
                f'{where}: lower the learning rate, set train → grad_clip_norm, or raise train → max_nonfinite.'
            )

    def _refuse_weights(self, current_iter: int, name: str) -> None:
        """The step has ruined the weights: they are not saved, and what was set is said."""
        models = self.opt['path'].get('models')
        last = models and checkpoints.newest_model(models)
        rate = ', '.join(f'{rate:g}' for rate in self.get_current_learning_rate())
        raise UserError(
            f'iteration {current_iter}: the step at learning rate {rate} has made weights that are not finite (first '
            f'{name}); set were train → optim_g: {self.asked["optim_g"]}, train → scheduler: {self.asked["scheduler"]}'
            f'; {f"the last finite checkpoint is {last}" if last else "no checkpoint was saved before"}.'
        )

    def _losses(self) -> OrderedDict:
        """Every term of the loss by its name in the log."""
        losses = OrderedDict()
        if self.cri_pix:
            losses['l_pix'] = self.cri_pix(self.output, self.gt)
        if self.cri_perceptual:
            perceptual, style = self.cri_perceptual(self.output, self.gt)
            losses.update({n: v for n, v in (('l_percep', perceptual), ('l_style', style)) if v is not None})
        if self.teacher is not None and self.teaching['loss_weight']:
            answers = self.teacher(self.lq) if self.answers is None else self.answers
            losses['l_teacher'] = self.teaching['loss_weight'] * (self.output - answers).abs().mean()
        net = self.get_bare_model(self.net_g)
        if isinstance(net, HasAuxiliaryLosses):
            contract = as_masked(net)
            own = {} if contract is None else contract.auxiliary_weights
            weights = self.opt['train'].get('auxiliary_weights') or own
            for name, loss in net.auxiliary_losses().items():
                losses[f'l_{name}'] = loss * weights.get(name, 1.0)
        return losses

    # ------------------------------------------------------------------ checkpoints

    def save(self, epoch, current_iter):
        """Write models/net_g_<iter>.pth, then training_states/<iter>.state; -1 writes net_g_latest.pth alone."""
        latest = current_iter == -1
        random_states = None if latest else from_all(checkpoints.random_state())
        # what goes wrong on the disk of the first process ends all of them
        from_first(lambda: self._write_checkpoint(epoch, 'latest' if latest else current_iter, random_states))

    def _write_checkpoint(self, epoch: int, number: int | str, random_states: list | None) -> None:
        content = {'params': self._weights(self.net_g)}
        if hasattr(self, 'net_g_ema'):
            content['params_ema'] = self._weights(self.net_g_ema)
        paths = self.opt['path']
        checkpoints.write(Path(paths['models'], f'net_g_{number}.pth'), content)
        if number == 'latest':
            return
        state = {
            'epoch': epoch,
            'iter': number,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            'optimizer_types': [type(optimizer).__name__ for optimizer in self.optimizers],
            'scheduler_types': [type(scheduler).__name__ for scheduler in self.schedulers],
            'warmup_iter': self.opt['train'].get('warmup_iter', -1),
            'scaler': self.scaler.state_dict(),
            'best_metric_results': self.best_metric_results,
            'nonfinite': self.nonfinite,
            'position': self.position,
            'random_states': random_states,
        }
        checkpoints.write(Path(paths['training_states'], f'{number}.state'), state)
        keep_last = self.opt['logger'].get('keep_last')
        if keep_last:
            metrics = (self.opt['val'] or {}).get('metrics') or {}
            best = {record[m]['iter'] for record in self.best_metric_results.values() for m in metrics if m in record}
            checkpoints.prune(paths['models'], paths['training_states'], keep_last, best)

    def _weights(self, net) -> dict:
        return {name: value.detach().cpu() for name, value in self.get_bare_model(net).state_dict().items()}

    def resume_training(self, resume_state):
        """Put back what :meth:`save` kept beside the weights. BasicSR's own states have only some of it.

        Learning rate, schedule and the optimizer's other settings are those of the options; where the state was saved
        with others a line says so, and the schedule is computed anew up to its iteration.

        Raises:
            UserError: the state is that of another optimizer or network.
        """
        path = self.opt['path'].get('resume_state')
        try:
            for note in self._resume_optimizers(resume_state, path):
                get_root_logger().warning(f'Resuming with {note}; the schedule is computed anew.')
            if self.scaler.is_enabled() and resume_state.get('scaler'):
                self.scaler.load_state_dict(resume_state['scaler'])
            self.best_metric_results = resume_state.get('best_metric_results') or {}
            self.nonfinite = resume_state.get('nonfinite', 0)
            random_states = resume_state.get('random_states') or []
            if self.opt['rank'] < len(random_states):
                checkpoints.restore_random_state(random_states[self.opt['rank']])
        except UserError:
            raise
        except Exception as e:  # torch and numpy take a strange state apart, each in its own way
            raise UserError(
                f'training state {path} does not fit these options: {str(e) or type(e).__name__}; resume with the '
                'network, optimizer and scheduler that it was saved with.'
            ) from e

    def _resume_optimizers(self, state: dict, path) -> list[str]:
        """Load optimizers and schedulers; returns the settings that differ, in words."""
        saved, schedules = state['optimizers'], state['schedulers']
        if len(saved) != len(self.optimizers) or len(schedules) != len(self.schedulers):
            raise ValueError(f'it holds {len(saved)} optimizers and {len(schedules)} schedulers')
        notes = []
        types = state.get('optimizer_types') or [None] * len(saved)
        for optimizer, content, kind in zip(self.optimizers, saved, types):
            current = optimizer.state_dict()
            resume.check_type(content, current, kind, type(optimizer).__name__, path)
            for before, now in zip(resume.saved_groups(content), resume.saved_groups(current)):
                notes += resume.other_settings(before, now, 'train → optim_g')
        kinds = state.get('scheduler_types') or [None] * len(schedules)
        for scheduler, content, kind in zip(self.schedulers, schedules, kinds):
            if kind not in (None, name := type(scheduler).__name__):
                notes.append(f'train → scheduler → type {name} (the state was saved with {kind})')
            notes += resume.other_settings(content, scheduler.state_dict(), 'train → scheduler')
        warmup = self.opt['train'].get('warmup_iter', -1)
        notes += resume.other_settings(state, {'warmup_iter': warmup}, 'train')
        if notes:
            resume.replay(lambda iteration: self.update_learning_rate(iteration, warmup), state['iter'])
        for optimizer, content in zip(self.optimizers, saved):
            resume.load_optimizer(optimizer, content, keep_settings=bool(notes))
        if not notes:
            for scheduler, content in zip(self.schedulers, schedules):
                scheduler.load_state_dict(content)
        return list(dict.fromkeys(notes))  # several groups may say the same

    # ------------------------------------------------------------------ validation

    def test(self):
        """Run the network (its EMA where there is one) on ``self.lq``; sets ``self.output`` and ``self.statistics``."""
        net = self.get_bare_model(getattr(self, 'net_g_ema', self.net_g))
        val = self.opt.get('val') or {}
        tile, overlap = val.get('tile') or 0, val.get('tile_overlap', DEFAULT_OVERLAP)
        training = net.training
        net.eval()
        try:
            with torch.no_grad():
                self.output, done = tiled_forward(net, self.lq, tile, overlap, scale=self.opt['scale'])
        finally:
            net.train(training)  # the mode that it was found in
        self.statistics = {}
        if done.dense_macs:
            self.statistics = {
                'pure_percent': 100 * done.pure_share,
                'gmacs': done.macs / 1e9 / self.lq.shape[0],
                'gmacs_saved_percent': 100 * done.saved_share,
            }

    def dist_validation(self, dataloader, current_iter, tb_logger, save_img):
        self.nondist_validation(dataloader, current_iter, tb_logger, save_img)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        """Metrics and statistics of one data set; several processes take every n-th image each.

        What they find is added up image by image, in the order of the data set: the results are those of one process.
        """
        dataset, val = dataloader.dataset, self.opt['val']
        rank, world_size = self.opt['rank'], self.opt['world_size']
        name = dataset.opt['name']
        metrics = val.get('metrics') or {}
        records: dict[int, dict[str, float]] = {}  # of each image
        mine = range(rank, len(dataset), world_size)
        unscored, error = [], None
        try:
            for i in tqdm(mine, desc=name, unit='image', leave=False, disable=rank != 0 or not val.get('pbar', False)):
                if self.stop_requested():
                    break
                data = default_collate([dataset[i]])
                self.feed_data(data)
                self.test()
                path, record = data['lq_path'][0], dict.fromkeys(metrics, math.nan)
                if self.output.isfinite().all():
                    images = self._as_images()
                    for metric, options in metrics.items():
                        with _as_user_error(f'val → metrics → {metric}, {path}'):
                            value = calculate_metric(images, dict(options))
                        if math.isnan(value):
                            unscored.append((i, f'{path}: {metric} is not a number. It has no score.'))
                        record[metric] = value
                    if save_img:
                        write_png(self._image_path(dataset, path, current_iter), images['img'][..., ::-1])
                else:
                    why = self._why_not_finite()
                    unscored.append((i, f'{path}: the output is not finite{why}. No score, no picture.'))
                records[i] = record | self.statistics
                self._forget_images()
        except Exception as e:
            error = e
        raise_in_all(error, self.device)  # before the others wait for this one's records
        unscored = [
            sentence for _, sentence in sorted(pair for of_process in from_all(unscored) for pair in of_process)
        ]
        for sentence in unscored:
            get_root_logger().error(f'Validation {name}: {sentence}')
        self.unscored += unscored

        records = {i: record for of_process in from_all(records) for i, record in of_process.items()}
        if len(records) < len(dataset):
            get_root_logger().info(f'Validation {name} was stopped on the way.')
            return
        in_order = [record for _, record in sorted(records.items())]
        self.metric_results = {key: float(sum(r[key] for r in in_order)) / len(dataset) for key in in_order[0]}
        self._initialize_best_metric_results(name)
        for key, value in self.metric_results.items():
            self._update_best_metric_result(name, key, value, current_iter)
        if rank == 0:
            self._log_validation_metric_values(current_iter, name, tb_logger)

    def _why_not_finite(self) -> str:
        label = 'net_g_ema' if hasattr(self, 'net_g_ema') else 'net_g'
        name = first_not_finite(getattr(self, label))
        return f', because the weights of {label} are not (first {name})' if name else ', though the weights are'

    def _as_images(self) -> dict:
        """Result and ground truth as uint8 BGR images, under the names that basicsr's metrics take."""
        images = {'img': self.output} | ({'img2': self.gt} if hasattr(self, 'gt') else {})
        return {name: np.ascontiguousarray(to_image(image)[..., ::-1]) for name, image in images.items()}

    def _forget_images(self) -> None:
        for attribute in ('lq', 'gt', 'output'):
            if hasattr(self, attribute):
                delattr(self, attribute)

    def _image_path(self, dataset, lq_path: str, current_iter) -> Path:
        """BasicSR's names. Images in subfolders, and those of several validation sets, get folders of their own."""
        folder, name = Path(self.opt['path']['visualization']), dataset.opt['name']
        image = Path(lq_path)
        root = Path(dataset.opt.get('dataroot_lq') or image.parent)
        inside = image.relative_to(root).parent if image.is_relative_to(root) else Path()
        if not self.opt['is_train']:
            return folder / name / inside / f'{image.stem}_{self.opt["val"].get("suffix") or self.opt["name"]}.png'
        if sum(phase.startswith('val') for phase in self.opt.get('datasets', ())) > 1:
            folder = folder / name
        return folder / inside / image.stem / f'{image.stem}_{current_iter}.png'

    def _initialize_best_metric_results(self, dataset_name):
        record = self.best_metric_results.setdefault(dataset_name, {})
        better = {k: v.get('better', 'higher') for k, v in (self.opt['val'].get('metrics') or {}).items()} | STATISTICS
        for key in self.metric_results:
            start = float('-inf') if better[key] == 'higher' else float('inf')
            record.setdefault(key, {'better': better[key], 'val': start, 'iter': -1})


@contextlib.contextmanager
def _as_user_error(where: str) -> Iterator[None]:
    """What networks, losses, optimizers and metrics say of a value that they do not take, as one sentence."""
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        NotImplementedError,
        TypeError,
        ValueError,
        cv2.error,
        pickle.UnpicklingError,
    ) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.')
        raise UserError(f'{where}: {reason}.') from e


def first_not_finite(net: torch.nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or infinity; None where there is none."""
    named = [(name, p.detach()) for name, p in net.named_parameters() if p.is_floating_point() and p.numel()]
    if not named:
        return None
    largest = torch.stack(torch._foreach_norm([p for _, p in named], math.inf))  # one question for all: it is per step
    if largest.isfinite().all():
        return None
    return next(name.removeprefix('module.') for name, p in named if not p.isfinite().all())


def _append(path: Path, line: str) -> None:
    try:
        with open(path, 'a', encoding='utf-8') as file:
            file.write(line + '\n')
    except OSError as e:
        raise UserError(f'{path} cannot be written ({e.strerror or e}).') from e
