"""A training step on the CPU (forward, L1 loss, backward, AdamW): every backend against the reference.

python benchmarks/train_step.py [--batch 4] [--patch 48] [--runs 5] [--backends native torch reference]
"""

import argparse

import torch
from common import alternate, machine, median, on, photograph, ratio, table

from ppsr.archs import ATDLight, PPATDLight
from ppsr.ops import dispatch


def patches(batch: int, size: int) -> torch.Tensor:
    """(batch, 3, size, size) cut from photographs."""
    image = photograph('astronaut', 4 * size, 4 * size)[0]
    cells = [image[:, y : y + size, x : x + size] for y in range(0, 4 * size, size) for x in range(0, 4 * size, size)]
    return torch.stack([cells[(5 * i) % 16] for i in range(batch)])


def step(net, lq: torch.Tensor, gt: torch.Tensor):
    """A function that makes one step."""
    optimizer = torch.optim.AdamW(net.parameters(), 2e-4, betas=(0.9, 0.9))

    def run():
        optimizer.zero_grad()
        torch.nn.functional.l1_loss(net(lq), gt).backward()
        optimizer.step()

    return run


def report(batch: int, size: int, runs: int, backends: list[str]) -> str:
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    lq = patches(batch, size)
    gt = torch.rand(batch, 3, 4 * size, 4 * size)
    dense, pp = step(ATDLight(), lq, gt), step(PPATDLight(), lq, gt)
    cases = {f'ATDLight, {name}': on(name, dense) for name in backends}
    cases |= {f'PPATDLight, {backends[0]}': on(backends[0], pp)}
    seconds = alternate(cases, runs)
    last = seconds[f'ATDLight, {backends[-1]}']
    rows = [[name, f'{median(s):.2f} s', f'{1 / ratio(s, last):.1f}×'] for name, s in seconds.items()]
    return '\n'.join(
        [f'## Training step, {batch} × {size}×{size}', '', table(['', 'median', f'against {backends[-1]}'], rows), '']
    )


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--patch', type=int, default=48)
    parser.add_argument('--runs', type=int, default=5)
    usable = [name for name in ('native', 'torch', 'reference') if dispatch.available(name) is None]
    parser.add_argument('--backends', nargs='+', default=usable, choices=usable)
    args = parser.parse_args()
    print(machine(), '\n')
    print(report(args.batch, args.patch, args.runs, args.backends))
