"""What further terms of the loss cost in a training step on the CPU: processor time, as a ratio to a step without them.

OMP_NUM_THREADS=1 python benchmarks/train_terms.py [--batch 1] [--patch 64] [--runs 4] [--document FILE]
"""

import argparse
import time

import torch
from common import add_document, document, ratio, table
from train_step import patches

from ppsr.archs import PPATDLight
from ppsr.runtime import tune_process
from ppsr.schema import check
from ppsr.training.schema import Train

WEIGHTS = 'PPATDLight_x4'
TERMS = {
    'L1 alone': {},
    'with `flat_opt: {}`': {'flat_opt': {}},
    f'with `teacher: {{weights: {WEIGHTS}}}`': {'teacher': {'weights': WEIGHTS}},
    'the same with `features: true`': {'teacher': {'weights': WEIGHTS, 'features': True}},
}


def model_with(terms: dict):
    """The model of a training of PPATDLight ×4 with Muon."""
    from basicsr.models import build_model  # after ppsr, which mends what basicsr imports

    train = {
        'total_iter': 1000,
        'optim_g': {'type': 'Muon', 'lr': 5e-4},
        'scheduler': {'type': 'MultiStepLR', 'milestones': [1000]},
        'pixel_opt': {'type': 'L1Loss'},
    }
    torch.manual_seed(0)
    return build_model(
        {
            'name': 'terms',
            'model_type': 'PurePassSRModel',
            'scale': 4,
            'num_gpu': 0,
            'manual_seed': 1,
            'is_train': True,
            'dist': False,
            'rank': 0,
            'world_size': 1,
            'network_g': {'type': PPATDLight.__name__, 'upscale': 4},
            'path': {},
            'train': check(Train, train | terms, 'train'),
            'val': None,
            'logger': {},
        }
    )


def report(batch: int, size: int, runs: int) -> str:
    lq = patches(batch, size)
    data = {'lq': lq, 'gt': lq.repeat_interleave(4, -1).repeat_interleave(4, -2)}
    models = {name: model_with(terms) for name, terms in TERMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for iteration in range(1, runs + 2):
        for name, model in models.items():
            model.feed_data(data)
            start = time.process_time()
            model.optimize_parameters(iteration)
            seconds[name].append(time.process_time() - start)
    seconds = {name: s[1:] for name, s in seconds.items()}  # the first step builds the optimizer's state
    alone = seconds['L1 alone']
    rows = [[name, f'{ratio(s, alone):.2f}'] for name, s in seconds.items()]
    return table([f'step of {batch} patch{"es" * (batch > 1)} of {size}×{size} LR pixels', 'time'], rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--patch', type=int, default=64)
    parser.add_argument('--runs', type=int, default=4)
    add_document(parser)
    args = parser.parse_args()
    tune_process()
    with document(args):
        print(report(args.batch, args.patch, args.runs))
