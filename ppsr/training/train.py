"""Training from an options file, through BasicSR's data sets, models, losses and loggers.

``ppsr train -opt options/pp_atd_light_x4.yml`` is the same as ``python ppsr/train.py -opt …`` (BasicSR's habit) and as
``torchrun --nproc_per_node=8 ppsr/train.py -opt … --launcher pytorch``.

What a training survives, and the test behind each promise, is in docs/reliability.md.
"""

import datetime
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.models import build_model
from basicsr.utils import (
    AvgTimer,
    MessageLogger,
    get_env_info,
    get_time_str,
    init_tb_logger,
    init_wandb_logger,
    set_random_seed,
)
from basicsr.utils.options import dict2str

from ppsr.errors import UserError
from ppsr.runtime import forbid_unpickling
from ppsr.training.checkpoints import find_state, model_of, remove_leftovers
from ppsr.training.distributed import any_process, from_first, raise_in_all
from ppsr.training.folders import RunLog, archive, keep_options, locked, make_fresh, read_text
from ppsr.training.loader import TrainBatches
from ppsr.training.stopping import StopSignals

__all__ = ['train_pipeline']


@forbid_unpickling()
def train_pipeline(opt: dict, opt_path: str | Path, opt_text: str | None = None) -> signal.Signals | None:
    """Train, validate and save as the options say.

    Everything that can fail is done before a folder is made or an older one archived: options, data, weights, network,
    the state to resume from, the loggers.

    Args:
        opt: from :func:`ppsr.training.options.load_options`.
        opt_path: their file; a copy is kept with the experiment.
        opt_text: what it holds, where it cannot be read again (a pipe).

    Returns:
        None when the training went to its end; SIGTERM, SIGHUP or SIGINT when that ended it early, with a checkpoint
        saved.

    Raises:
        UserError: another run is in the folder, a broken image, a full disk, too many losses that are not finite,
            weights that are no longer finite, a validation whose values were not numbers, a state that cannot be
            resumed.
    """
    text = read_text(opt_path) if opt_text is None else opt_text
    with locked(opt['path']['experiments_root'], 'experiment'), RunLog(opt['rank']) as log:
        logger = log.logger
        set_random_seed(opt['manual_seed'] + opt['rank'])
        torch.backends.cudnn.benchmark = True
        resume_state, notes = _find_resume_state(opt)
        logger.info(get_env_info())
        logger.info(dict2str(opt))
        for note in notes:
            logger.log(logging.WARNING if note.startswith('Passed over') else logging.INFO, note)
        batches, val_loaders = _build_data(opt, logger)
        model = build_model(opt)
        run = _Run(opt, model, batches, val_loaders, logger)
        if resume_state is not None:
            model.resume_training(resume_state)
            run.resume(resume_state)
        if hasattr(model, 'prepare_data'):  # other packages' models have nothing to prepare
            model.prepare_data(batches.dataset)
        _start_wandb(opt)
        _make_folders(opt, resume_state is not None, opt_path, text, log)
        run.tb_logger = _tensorboard(opt)

        start_time = time.time()
        try:
            stopped_by = run.train()
        finally:
            if run.tb_logger:
                run.tb_logger.close()
        logger.info(f'End of training. Time consumed: {datetime.timedelta(seconds=int(time.time() - start_time))}')
        return stopped_by


def _find_resume_state(opt: dict) -> tuple[dict | None, list[str]]:
    """The state to go on from, and what is to be said about it; sets where the weights that belong to it are read."""
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


def _make_folders(opt: dict, resuming: bool, opt_path: str | Path, opt_text: str, log) -> None:
    """A fresh run puts away an older one of its name, as BasicSR does; a resumed one goes on in its folders.

    Raises:
        UserError: the disk refuses; an older run is where it was.
    """
    root = Path(opt['path']['experiments_root'])
    subfolders = ['models', 'training_states', 'visualization']

    def make() -> None:
        archived = []
        try:
            if resuming:
                for name in subfolders:
                    (root / name).mkdir(parents=True, exist_ok=True)
                remove_leftovers(*(root / name for name in subfolders))
                keep_options(opt_path, opt_text, root)
            else:
                archived = [make_fresh(root, subfolders, lambda folder: keep_options(opt_path, opt_text, folder))]
                if _uses_tensorboard(opt):
                    archived.append(archive(_tensorboard_folder(opt)))
            log.open(root / f'train_{opt["name"]}_{get_time_str()}.log')
        except OSError as e:
            raise UserError(f'{root} cannot be written ({e.strerror or e}).') from e
        for folder in filter(None, archived):
            log.logger.info(f'There was an older run of this name: it is {folder} now.')

    from_first(make)


def _uses_tensorboard(opt: dict) -> bool:
    return bool(opt['logger'].get('use_tb_logger')) and 'debug' not in opt['name']


def _tensorboard_folder(opt: dict) -> Path:
    return Path(opt['root_path'], 'tb_logger', opt['name'])


def _wandb_options(opt: dict) -> dict | None:
    """What is to be sent to wandb; None for nothing."""
    wandb = opt['logger'].get('wandb')
    return wandb if isinstance(wandb, dict) and wandb.get('project') and 'debug' not in opt['name'] else None


def _start_wandb(opt: dict) -> None:
    """Before TensorBoard's writer is made, whose records it copies.

    Raises:
        UserError: wandb does not start (not logged in, no network).
    """

    def start() -> None:
        try:
            init_wandb_logger(opt)
        except Exception as e:  # wandb has errors of many kinds
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip('.')
            raise UserError(
                f'logger → wandb: it does not start ({reason}); run "wandb login", set WANDB_MODE=offline, or remove '
                'the option.'
            ) from e

    if _wandb_options(opt) is not None:
        from_first(start)


def _tensorboard(opt: dict):
    """The writer of the first process, or None."""
    if not _uses_tensorboard(opt) or opt['rank'] != 0:
        return None

    return init_tb_logger(log_dir=str(_tensorboard_folder(opt)))


def _build_data(opt: dict, logger: logging.Logger) -> tuple:
    """Training batches, and the loader of each validation set."""
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

    def __init__(self, opt, model, batches, val_loaders, logger):
        self.opt, self.model, self.batches, self.val_loaders = opt, model, batches, val_loaders
        self.tb_logger, self.logger = None, logger
        self.total = opt['train']['total_iter']
        self.iteration = self.epoch = self.batch = 0  # `batch` of the epoch is the next one
        self.saved_at = self.validated_at = None
        self.whole = True  # between two iterations: the weights and where it stands belong together

    def resume(self, state: dict) -> None:
        self.iteration = self.saved_at = state['iter']
        self.epoch = state['epoch']
        position = state.get('position')
        if not position:  # a state that BasicSR wrote
            self.logger.warning('The state does not say where in its epoch it was saved: the epoch begins again.')
            return
        self.validated_at = position['validated_at']
        # with another number of processes an epoch has another number of batches, of as many samples in all
        self.batch = position['batch'] * position['global_batch'] // self.batches.global_batch

    def train(self) -> signal.Signals | None:
        """Go on to the end, or until a signal asks to stop (returned).

        Whatever fails between two iterations (a broken image, a killed loader worker, a metric), in whichever process,
        ends all of them; a checkpoint is saved first.
        """
        with StopSignals(several_processes=self.opt['world_size'] > 1) as signals:
            self.model.stop_requested = lambda: signals.received is not None
            try:
                finished = self._validate_if_due() and self._iterate()
                if self.saved_at != self.iteration:
                    self._save()
                if finished:
                    self.logger.info('Save the latest model.')
                    self.model.save(epoch=-1, current_iter=-1)  # -1 stands for the latest
                    if self.opt['val'] is None or self.validated_at == self.iteration or self._validate():
                        self._refuse_unscored()
                        return None
            except Exception:
                self._save_what_is_whole()
                raise
            received = signals.received or signal.SIGTERM  # or another process received it
            self.logger.info(f'Stopped by {received.name} after iteration {self.iteration}; the checkpoint is saved.')
            return received

    def _iterate(self) -> bool:
        """All iterations that are left; False when asked to stop on the way."""
        message_logger = MessageLogger(self.opt, self.iteration, self.tb_logger)
        message_logger.max_iters += 1  # or the time left is that for one iteration less: in the last one -1 day
        data_timer, iter_timer = AvgTimer(), AvgTimer()
        while self.iteration < self.total:
            for data in self._batches():
                data_timer.record()
                self.whole = False
                self.iteration += 1
                self.batch += 1
                self.model.update_learning_rate(self.iteration, warmup_iter=self.opt['train'].get('warmup_iter', -1))
                self.model.feed_data(data)
                self.model.optimize_parameters(self.iteration)
                self.whole = True
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

    def _batches(self) -> Iterator[dict]:
        """What is left of the epoch; what goes wrong with a batch in one process is raised in all."""
        batches = self.batches.epoch(self.epoch, self.batch)
        while True:
            data = error = None
            try:
                data = next(batches, None)
            except Exception as e:
                error = e
            raise_in_all(error, self.model.device)
            if data is None:
                return
            yield data

    def _after_iteration(self) -> bool:
        """Save and validate where it is time; False when asked to stop."""
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
        self.whole = False  # when this fails there is no use in trying it again
        self.model.save(self.epoch, self.iteration)
        self.whole = True
        self.saved_at = self.iteration

    def _save_what_is_whole(self) -> None:
        """After a failure, which is what will be told; that of a checkpoint is told beside it."""
        if not self.whole or self.iteration in (0, self.saved_at):
            return
        try:
            self._save()
        except UserError as e:
            self.logger.error(str(e))
        else:
            self.logger.info(f'A checkpoint of iteration {self.iteration} is saved; go on with --auto_resume.')

    def _validate_if_due(self) -> bool:
        val = self.opt['val']
        due = val is not None and self.iteration > 0 and self.iteration % val['val_freq'] == 0
        return not due or self.validated_at == self.iteration or self._validate()

    def _validate(self) -> bool:
        """Validate on every set; False when asked to stop on the way."""
        for val_loader in self.val_loaders:
            self.model.validation(val_loader, self.iteration, self.tb_logger, self.opt['val']['save_img'])
            if any_process(self.model.stop_requested(), self.model.device):
                return False
        self.validated_at = self.iteration
        return True

    def _refuse_unscored(self) -> None:
        """At the end: a run with a validation that gave no number has not gone well.

        Raises:
            UserError: naming the first image.
        """
        unscored = getattr(self.model, 'unscored', [])  # other packages' models do not look
        if unscored:
            raise UserError(
                f'the training went to its end and its weights are saved, but {len(unscored)} validation images have '
                f'no score: {unscored[0]}'
            )
