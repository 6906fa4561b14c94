"""Testing from an options file, through BasicSR's data sets, models and metrics.

``ppsr test -opt options/test/pp_atd_light_x4.yml`` is the same as ``python ppsr/test.py -opt …`` (BasicSR's habit).
"""

import math
from pathlib import Path

from basicsr.data import build_dataloader, build_dataset
from basicsr.models import build_model
from basicsr.utils import get_env_info, get_time_str, set_random_seed
from basicsr.utils.options import dict2str

from ppsr.errors import UserError
from ppsr.runtime import forbid_unpickling
from ppsr.training.distributed import from_first
from ppsr.training.folders import RunLog, locked, make_fresh

__all__ = ['test_pipeline']


@forbid_unpickling()
def test_pipeline(opt: dict) -> dict[str, dict[str, float]]:
    """Test a network as the options say. `opt` is from :func:`ppsr.training.options.load_options`.

    Returns:
        data set name -> metric or statistic -> mean over its images; NaN where the network's output for an image was
        not finite, which the log says.

    Raises:
        UserError: another test is in the folder, or data, weights or options that do not fit; an older test of the
            name is where it was.
    """
    root = Path(opt['path']['results_root'])
    with locked(root, 'the folder of results'), RunLog(opt['rank']) as log:
        logger = log.logger
        set_random_seed(opt['manual_seed'] + opt['rank'])
        logger.info(get_env_info())
        logger.info(dict2str(opt))
        loaders = []
        for _, dataset_opt in sorted(opt['datasets'].items()):
            dataset = build_dataset(dataset_opt)
            loaders.append(build_dataloader(dataset, dataset_opt, num_gpu=opt['num_gpu'], dist=opt['dist']))
            logger.info(f'Number of test images in {dataset_opt["name"]}: {len(dataset)}')
        model = build_model(opt)

        def make_folder() -> None:
            try:
                archived = make_fresh(root, ['visualization'])
                log.open(root / f'test_{opt["name"]}_{get_time_str()}.log')
            except OSError as e:
                raise UserError(f'{root} cannot be written ({e.strerror or e}).') from e
            if archived:
                logger.info(f'There were older results of this name: they are {archived} now.')

        from_first(make_folder)
        results = {}
        for loader in loaders:
            name = loader.dataset.opt['name']
            logger.info(f'Testing {name}...')
            model.validation(loader, current_iter=opt['name'], tb_logger=None, save_img=opt['val']['save_img'])
            results[name] = dict(model.metric_results)
        return results


def without_score(results: dict[str, dict[str, float]]) -> list[str]:
    """The data sets of :func:`test_pipeline`'s results in which a value is not a number."""
    return [name for name, values in results.items() if any(map(math.isnan, values.values()))]
