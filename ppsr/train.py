"""Training from an options file, through BasicSR's data loaders, models, losses and loggers.

``ppsr train -opt options/pp_atd_light_x4.yml`` is the same as ``python ppsr/train.py -opt …`` (BasicSR's habit) and as
``torchrun --nproc_per_node=8 ppsr/train.py -opt … --launcher pytorch``.
"""

import sys
from pathlib import Path

if __name__ == '__main__':
    # as a script: the folder that holds the package belongs on the path, the package's inside does not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import datetime
import logging
import time

import torch

__all__ = ['train_pipeline']


def load_resume_state(opt: dict) -> dict | None:
    """Training state to go on from, or None; sets where the weights that belong to it are read.

    Raises:
        UserError: the state named in the options cannot be read.
    """
    from basicsr.utils import check_resume

    from ppsr.errors import UserError

    path = opt['path'].get('resume_state')
    if opt['auto_resume']:
        states = Path(opt['path']['training_states']).glob('*.state')
        newest = max(states, key=lambda state: int(state.stem), default=None)
        path = opt['path']['resume_state'] = None if newest is None else str(newest)
    if path is None:
        return None
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:
        raise UserError(f'training state {path} cannot be read: {str(e).splitlines()[0]}') from e
    check_resume(opt, state['iter'])
    return state


def train_pipeline(opt: dict, opt_path: str) -> None:
    """Train, validate and save as the options say. `opt` is from :func:`ppsr.options.load_options`."""
    from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher
    from basicsr.models import build_model
    from basicsr.train import create_train_val_dataloader, init_tb_loggers
    from basicsr.utils import (
        AvgTimer,
        MessageLogger,
        get_env_info,
        get_root_logger,
        get_time_str,
        make_exp_dirs,
        mkdir_and_rename,
        set_random_seed,
    )
    from basicsr.utils.options import copy_opt_file, dict2str

    set_random_seed(opt['manual_seed'] + opt['rank'])
    torch.backends.cudnn.benchmark = True
    resume_state = load_resume_state(opt)
    if resume_state is None:
        make_exp_dirs(opt)
        if opt['logger']['use_tb_logger'] and 'debug' not in opt['name'] and opt['rank'] == 0:
            mkdir_and_rename(str(Path(opt['root_path'], 'tb_logger', opt['name'])))
    copy_opt_file(opt_path, opt['path']['experiments_root'])

    log_file = Path(opt['path']['log'], f'train_{opt["name"]}_{get_time_str()}.log')
    logger = get_root_logger(log_level=logging.INFO, log_file=str(log_file))
    logger.info(get_env_info())
    logger.info(dict2str(opt))
    tb_logger = init_tb_loggers(opt)
    train_loader, train_sampler, val_loaders, total_epochs, total_iters = create_train_val_dataloader(opt, logger)

    model = build_model(opt)
    start_epoch = current_iter = 0
    if resume_state is not None:
        model.resume_training(resume_state)
        start_epoch, current_iter = resume_state['epoch'], resume_state['iter']
        logger.info(f'Resuming training from epoch: {start_epoch}, iter: {current_iter}.')

    message_logger = MessageLogger(opt, current_iter, tb_logger)
    on_gpu = opt['datasets']['train'].get('prefetch_mode') == 'cuda'
    prefetcher = CUDAPrefetcher(train_loader, opt) if on_gpu else CPUPrefetcher(train_loader)
    data_timer, iter_timer = AvgTimer(), AvgTimer()
    start_time = time.time()

    def validate():
        for val_loader in val_loaders:
            model.validation(val_loader, current_iter, tb_logger, opt['val']['save_img'])

    validated_at = None
    for epoch in range(start_epoch, total_epochs + 1):
        train_sampler.set_epoch(epoch)
        prefetcher.reset()
        while current_iter < total_iters and (train_data := prefetcher.next()) is not None:
            data_timer.record()
            current_iter += 1
            model.update_learning_rate(current_iter, warmup_iter=opt['train'].get('warmup_iter', -1))
            model.feed_data(train_data)
            model.optimize_parameters(current_iter)
            iter_timer.record()
            if current_iter == 1:
                message_logger.reset_start_time()
            if current_iter % opt['logger']['print_freq'] == 0:
                log_vars = {'epoch': epoch, 'iter': current_iter, 'lrs': model.get_current_learning_rate()}
                log_vars.update(time=iter_timer.get_avg_time(), data_time=data_timer.get_avg_time())
                message_logger(log_vars | model.get_current_log())
            if current_iter % opt['logger']['save_checkpoint_freq'] == 0:
                logger.info('Saving models and training states.')
                model.save(epoch, current_iter)
            if opt['val'] is not None and current_iter % opt['val']['val_freq'] == 0:
                validate()
                validated_at = current_iter
            data_timer.start()
            iter_timer.start()

    logger.info(f'End of training. Time consumed: {datetime.timedelta(seconds=int(time.time() - start_time))}')
    logger.info('Save the latest model.')
    model.save(epoch=-1, current_iter=-1)  # -1 stands for the latest
    if opt['val'] is not None and validated_at != current_iter:
        validate()
    if tb_logger:
        tb_logger.close()


if __name__ == '__main__':
    from ppsr.cli import main

    sys.exit(main(['train', *sys.argv[1:]]))
