"""Training from an options file, through BasicSR's data sets, models, losses and loggers.

``ppsr train -opt options/pp_atd_light_x4.yml`` is the same as ``python ppsr/train.py -opt …`` (BasicSR's habit) and as
``torchrun --nproc_per_node=8 ppsr/train.py -opt … --launcher pytorch``.

What a training survives, and the test behind each promise, is in docs/reliability.md.
"""

import datetime
import logging
import signal
import time
from pathlib import Path

import torch

__all__ = ['train_pipeline']


def train_pipeline(opt: dict, opt_path: str) -> signal.Signals | None:
    """Train, validate and save as the options say. `opt` is from :func:`ppsr.training.options.load_options`.

    Returns:
        None when the training went to its end; SIGTERM or SIGINT when that ended it early, with a checkpoint saved.

    Raises:
        UserError: a broken image, a full disk, too many losses that are not finite, a state that cannot be resumed.
    """
    from basicsr.models import build_model
    from basicsr.train import init_tb_loggers
    from basicsr.utils import set_random_seed
    from basicsr.utils.options import copy_opt_file

    from ppsr.errors import UserError

    set_random_seed(opt['manual_seed'] + opt['rank'])
    torch.backends.cudnn.benchmark = True
    resume_state, notes = _find_resume_state(opt)
    try:
        _make_folders(opt, resume_state is not None)
        if opt['rank'] == 0:
            copy_opt_file(opt_path, opt['path']['experiments_root'])
        logger = _start_log(opt, notes)
    except OSError as e:
        raise UserError(f'{opt["path"]["experiments_root"]} cannot be written ({e.strerror or e}).') from e
    tb_logger = init_tb_loggers(opt)
    batches, val_loaders = _build_data(opt, logger)
    model = build_model(opt)
    run = _Run(opt, model, batches, val_loaders, tb_logger, logger)
    if resume_state is not None:
        model.resume_training(resume_state)
        run.resume(resume_state)

    start_time = time.time()
    stopped_by = run.train()
    logger.info(f'End of training. Time consumed: {datetime.timedelta(seconds=int(time.time() - start_time))}')
    if tb_logger:
        tb_logger.close()
    return stopped_by


def _find_resume_state(opt: dict) -> tuple[dict | None, list[str]]:
    """The state to go on from, and what is to be said about it; sets where the weights that belong to it are read."""
    from ppsr.training.checkpoints import find_state, model_of
    from ppsr.training.distributed import from_first

    paths = opt['path']
    ignored = paths.get('ignore_resume_networks') or ()
    labels = [key.removeprefix('network_') for key in opt if key.startswith('network_') and key not in ignored]
    found = from_first(
        lambda: find_state(paths['training_states'], opt['auto_resume'], paths.get('resume_state'), labels)
    )
    if found is None:
        return None, ['No training state to resume from: starting anew.'] if opt['auto_resume'] else []
    path, state, passed_over = found
    paths['resume_state'] = str(path)
    for label in labels:
        paths[f'pretrain_network_{label}'] = str(model_of(path, label, state['iter']))
        paths[f'param_key_{label}'] = 'params'
        paths[f'strict_load_{label}'] = True
    notes = [f'Passed over: {sentence}' for sentence in passed_over]
    return state, [*notes, f'Resuming from {path}: epoch {state["epoch"]}, iteration {state["iter"]}.']


def _make_folders(opt: dict, resuming: bool) -> None:
    """A fresh run puts away an older one of its name, as BasicSR does; a resumed one goes on in its folders."""
    from basicsr.utils import make_exp_dirs, mkdir_and_rename

    from ppsr.training.checkpoints import remove_leftovers
    from ppsr.training.distributed import barrier

    paths = opt['path']
    if opt['rank'] == 0:
        folders = [paths[key] for key in ('models', 'training_states', 'visualization')]
        if resuming:
            for folder in folders:
                Path(folder).mkdir(parents=True, exist_ok=True)
            remove_leftovers(*folders)
        else:
            make_exp_dirs(opt)
            if opt['logger']['use_tb_logger'] and 'debug' not in opt['name']:
                mkdir_and_rename(str(Path(opt['root_path'], 'tb_logger', opt['name'])))
    barrier()


def _start_log(opt: dict, notes: list[str]) -> logging.Logger:
    from basicsr.utils import get_env_info, get_root_logger, get_time_str
    from basicsr.utils.options import dict2str

    logging.raiseExceptions = False  # on a full disk the checkpoint says so, not every log line with a traceback
    log_file = Path(opt['path']['log'], f'train_{opt["name"]}_{get_time_str()}.log')
    logger = get_root_logger(log_level=logging.INFO, log_file=str(log_file))
    logger.info(get_env_info())
    logger.info(dict2str(opt))
    for note in notes:
        logger.log(logging.WARNING if note.startswith('Passed over') else logging.INFO, note)
    return logger


def _build_data(opt: dict, logger: logging.Logger) -> tuple:
    """Training batches, and the loader of each validation set."""
    from basicsr.data import build_dataloader, build_dataset

    from ppsr.training.loader import TrainBatches

    batches, val_loaders = None, []
    for phase, dataset_opt in opt['datasets'].items():
        dataset = build_dataset(dataset_opt)
        if phase == 'train':
            batches = TrainBatches(dataset, dataset_opt, opt)
            logger.info(
                f'{len(dataset)} training images, {batches.global_batch} in a batch of all {opt["world_size"]} '
                f'processes, {len(batches)} iterations in an epoch, {opt["train"]["total_iter"]} in all.'
            )
        else:
            val_loaders.append(build_dataloader(dataset, dataset_opt, num_gpu=opt['num_gpu'], dist=opt['dist']))
            logger.info(f'{len(dataset)} validation images in {dataset_opt["name"]}.')
    return batches, val_loaders


class _Run:
    """The loop: iterations, log lines, checkpoints, validations, and where it stands."""

    def __init__(self, opt, model, batches, val_loaders, tb_logger, logger):
        self.opt, self.model, self.batches, self.val_loaders = opt, model, batches, val_loaders
        self.tb_logger, self.logger = tb_logger, logger
        self.total = opt['train']['total_iter']
        self.iteration = self.epoch = self.batch = 0  # `batch` of the epoch is the next one
        self.saved_at = self.validated_at = None

    def resume(self, state: dict) -> None:
        self.iteration = self.saved_at = state['iter']
        self.epoch = state['epoch']
        position = state.get('position')
        if position is None:  # a state that BasicSR wrote
            self.logger.warning('The state does not say where in its epoch it was saved: the epoch begins again.')
            return
        self.validated_at = position['validated_at']
        # with another number of processes an epoch has another number of batches, of as many samples in all
        self.batch = position['batch'] * position['global_batch'] // self.batches.global_batch

    def train(self) -> signal.Signals | None:
        """Go on to the end, or until a signal asks to stop (returned)."""
        from ppsr.training.stopping import StopSignals

        with StopSignals(several_processes=self.opt['world_size'] > 1) as signals:
            self.model.stop_requested = lambda: signals.received is not None
            finished = self._validate_if_due() and self._iterate()
            if self.saved_at != self.iteration:
                self._save()
            if finished:
                self.logger.info('Save the latest model.')
                self.model.save(epoch=-1, current_iter=-1)  # -1 stands for the latest
                if self.opt['val'] is None or self.validated_at == self.iteration or self._validate():
                    return None
            received = signals.received or signal.SIGTERM  # or another process received it
            self.logger.info(f'Stopped by {received.name} after iteration {self.iteration}; the checkpoint is saved.')
            return received

    def _iterate(self) -> bool:
        """All iterations that are left; False when asked to stop on the way."""
        from basicsr.utils import AvgTimer, MessageLogger

        message_logger = MessageLogger(self.opt, self.iteration, self.tb_logger)
        data_timer, iter_timer = AvgTimer(), AvgTimer()
        while self.iteration < self.total:
            for data in self.batches.epoch(self.epoch, self.batch):
                data_timer.record()
                self.iteration += 1
                self.batch += 1
                self.model.update_learning_rate(self.iteration, warmup_iter=self.opt['train'].get('warmup_iter', -1))
                self.model.feed_data(data)
                self.model.optimize_parameters(self.iteration)
                iter_timer.record()
                if self.iteration == 1:
                    message_logger.reset_start_time()
                if self.iteration % self.opt['logger']['print_freq'] == 0:
                    log_vars = {'epoch': self.epoch, 'iter': self.iteration}
                    log_vars['lrs'] = self.model.get_current_learning_rate()
                    log_vars.update(time=iter_timer.get_avg_time(), data_time=data_timer.get_avg_time())
                    message_logger(log_vars | self.model.get_current_log())
                if not self._after_iteration():
                    return False
                if self.iteration >= self.total:
                    return True
                data_timer.start()
                iter_timer.start()
            self.epoch, self.batch = self.epoch + 1, 0
        return True

    def _after_iteration(self) -> bool:
        """Save and validate where it is time; False when asked to stop."""
        from ppsr.training.distributed import any_process

        if self.iteration % self.opt['logger']['save_checkpoint_freq'] == 0:
            self.logger.info('Saving models and training states.')
            self._save()
        # every process stops after the same iteration
        if any_process(self.model.stop_requested(), self.model.device):
            return False
        return self._validate_if_due()

    def _save(self) -> None:
        self.model.position = {
            'batch': self.batch,
            'global_batch': self.batches.global_batch,
            'validated_at': self.validated_at,
        }
        self.model.save(self.epoch, self.iteration)
        self.saved_at = self.iteration

    def _validate_if_due(self) -> bool:
        val = self.opt['val']
        due = val is not None and self.iteration > 0 and self.iteration % val['val_freq'] == 0
        return not due or self.validated_at == self.iteration or self._validate()

    def _validate(self) -> bool:
        """Validate on every set; False when asked to stop on the way."""
        from ppsr.training.distributed import any_process

        for val_loader in self.val_loaders:
            self.model.validation(val_loader, self.iteration, self.tb_logger, self.opt['val']['save_img'])
            if any_process(self.model.stop_requested(), self.model.device):
                return False
        self.validated_at = self.iteration
        return True
