"""Testing from an options file, through BasicSR's data sets, models and metrics.

``ppsr test -opt options/test/pp_atd_light_x4.yml`` is the same as ``python ppsr/test.py -opt …`` (BasicSR's habit).
"""

import logging
from pathlib import Path

__all__ = ['test_pipeline']


def test_pipeline(opt: dict) -> dict[str, dict[str, float]]:
    """Test a network as the options say. `opt` is from :func:`ppsr.training.options.load_options`.

    Returns:
        data set name -> metric or statistic -> mean over its images.
    """
    from basicsr.data import build_dataloader, build_dataset
    from basicsr.models import build_model
    from basicsr.utils import get_env_info, get_root_logger, get_time_str, make_exp_dirs, set_random_seed
    from basicsr.utils.options import dict2str

    from ppsr.errors import UserError
    from ppsr.training.distributed import barrier

    set_random_seed(opt['manual_seed'] + opt['rank'])
    log_file = Path(opt['path']['log'], f'test_{opt["name"]}_{get_time_str()}.log')
    try:
        make_exp_dirs(opt)
        barrier()
        logger = get_root_logger(log_level=logging.INFO, log_file=str(log_file))
    except OSError as e:
        raise UserError(f'{opt["path"]["results_root"]} cannot be written ({e.strerror or e}).') from e
    logger.info(get_env_info())
    logger.info(dict2str(opt))

    loaders = []
    for _, dataset_opt in sorted(opt['datasets'].items()):
        dataset = build_dataset(dataset_opt)
        loaders.append(build_dataloader(dataset, dataset_opt, num_gpu=opt['num_gpu'], dist=opt['dist']))
        logger.info(f'Number of test images in {dataset_opt["name"]}: {len(dataset)}')

    model = build_model(opt)
    results = {}
    for loader in loaders:
        name = loader.dataset.opt['name']
        logger.info(f'Testing {name}...')
        model.validation(loader, current_iter=opt['name'], tb_logger=None, save_img=opt['val']['save_img'])
        results[name] = dict(model.metric_results)
    return results
