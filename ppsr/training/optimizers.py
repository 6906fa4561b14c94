"""Muon for a network: orthogonalised momentum for its matrices and convolution kernels, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) is torch's own (:class:`torch.optim.Muon`, since
torch 2.9). That one takes matrices only; here a convolution kernel (out, in, k, k) is the matrix (out, in·k·k), and the
parameters that are no matrices at heart (norms, biases, tables, dictionaries, depthwise kernels) go to AdamW in the
same object: rate schedules, warm-up, gradient scaling and checkpoints see one optimizer.

On a CPU matrices are made orthogonal in float32 and all of a shape at once (:func:`orthogonalised`): torch does that
one by one in bfloat16, which few CPUs can multiply, and a network of many small matrices waits for it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ppsr.errors import UserError

__all__ = ['MuonAdamW', 'muon_for', 'muon_parameters', 'orthogonalised']

ADAMW = {'betas': (0.9, 0.95), 'weight_decay': 0.0}  # unless optim_g → adamw says otherwise

# by what the rate of an out × in matrix is multiplied: torch.optim.Muon's adjust_lr_fn
ADJUSTMENTS = {
    None: lambda out, size: max(1, out / size) ** 0.5,
    'original': lambda out, size: max(1, out / size) ** 0.5,
    'match_rms_adamw': lambda out, size: 0.2 * max(out, size) ** 0.5,
    'spectral_unclamped': lambda out, size: (out / size) ** 0.5,
}


def orthogonalised(matrices: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Matrices with nearly the same singular vectors whose singular values are all near 1: Newton–Schulz iterations.

    Args:
        matrices: (B, out, in), any float dtype, in which it is computed.
        coefficients: a, b, c of X ← a X + (b X Xᵀ + c (X Xᵀ)²) X.
        steps: how often.
        eps: least Frobenius norm to divide by at first.

    Returns:
        (B, out, in).
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _step_in_batches(optimizer: torch.optim.Optimizer) -> None:
    """What ``torch.optim.Muon.step`` does, on all matrices of a shape at once and in their own dtype."""
    for group in optimizer.param_groups:
        by_shape = defaultdict(list)
        for p in group['params']:
            if p.grad is not None:
                state = optimizer.state[p]
                if 'momentum_buffer' not in state:
                    state['momentum_buffer'] = torch.zeros_like(p.grad)
                momentum = state['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
                update = p.grad.lerp(momentum, group['momentum']) if group['nesterov'] else momentum
                by_shape[p.shape].append((p, update))
        for shape, pairs in by_shape.items():
            updates = torch.stack([update for _, update in pairs])
            updates = orthogonalised(updates, group['ns_coefficients'], group['ns_steps'], group['eps'])
            rate = group['lr'] * ADJUSTMENTS[group['adjust_lr_fn']](*shape)
            for (p, _), update in zip(pairs, updates):
                p.mul_(1 - group['lr'] * group['weight_decay']).add_(update, alpha=-rate)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on some parameters, AdamW on the others.

    Args:
        matrices: parameters of two dimensions or more, for Muon; those of more are seen as (first, all others).
        others: parameters for AdamW.
        lr: rate of Muon.
        adamw: arguments of :class:`torch.optim.AdamW`; its ``lr`` is `lr` where it is not given.
        muon: arguments of :class:`torch.optim.Muon`. Without ``adjust_lr_fn`` the steps have the size of AdamW's
            ('match_rms_adamw'), without ``weight_decay`` there is none.

    Attributes:
        param_groups: one group each, with its own rate; schedulers work on these.

    Raises:
        UserError: this torch has no Muon.
    """

    def __init__(self, matrices: Sequence[Tensor], others: Sequence[Tensor], lr: float, adamw: Mapping, **muon):
        if not hasattr(torch.optim, 'Muon'):
            raise UserError(
                f'train → optim_g → type: Muon needs torch 2.9 or newer, this is {torch.__version__}; '
                'use AdamW or install a newer torch.'
            )
        given = {key: value for key, value in adamw.items() if value is not None}
        matrices, others = list(matrices), list(others)
        # flat views of the same memory: a step on them is a step on the parameters
        flat = [p.detach().view(p.shape[0], -1) for p in matrices]
        self.parts = {}
        if matrices:
            muon = {'adjust_lr_fn': 'match_rms_adamw', 'weight_decay': 0.0} | muon
            self.parts['muon'] = torch.optim.Muon(flat, lr=lr, **muon)
        if others:
            self.parts['adamw'] = torch.optim.AdamW(others, **({'lr': lr} | ADAMW | given))
        groups = {'muon': matrices, 'adamw': others}
        super().__init__(
            [{'params': groups[name], 'lr': part.param_groups[0]['lr']} for name, part in self.parts.items()], {}
        )
        self._flat = list(zip(matrices, flat))

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both, with the rates of ``param_groups``; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, flat in self._flat:
            flat.grad = None if parameter.grad is None else parameter.grad.reshape(flat.shape)
        for group, (name, part) in zip(self.param_groups, self.parts.items()):
            part.param_groups[0]['lr'] = group['lr']
            if name == 'muon' and all(p.device.type == 'cpu' for p in group['params']):
                _step_in_batches(part)
            else:
                part.step()
        for _, flat in self._flat:
            flat.grad = None
        return loss

    def state_dict(self) -> dict:
        """Groups with their rates, and the state of each part."""
        return super().state_dict() | {'parts': {name: part.state_dict() for name, part in self.parts.items()}}

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Put back what :meth:`state_dict` gave.

        Raises:
            ValueError: it is the state of another optimizer or of other parameters.
        """
        parts = state_dict.get('parts')
        if not isinstance(parts, Mapping) or parts.keys() != self.parts.keys():
            raise ValueError('the state is not one of Muon with AdamW')
        super().load_state_dict({key: state_dict[key] for key in ('state', 'param_groups')})
        for name, part in self.parts.items():
            part.load_state_dict(parts[name])


def muon_parameters(net: nn.Module) -> set[str]:
    """Names of the parameters that Muon is for: weights of linear layers and of convolutions that mix channels."""
    names = set()
    for prefix, module in net.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
            names.add(f'{prefix}.weight' if prefix else 'weight')
    return names


def muon_for(net: nn.Module, lr: float, adamw: Mapping | None = None, **muon) -> MuonAdamW:
    """The optimizer of ``optim_g: {type: Muon, lr: …, adamw: {lr: …, betas: …}}`` for the trainable part of a network.

    Raises:
        UserError: this torch has no Muon.
    """
    names = muon_parameters(net)
    matrices, others = [], []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            (matrices if name in names else others).append(parameter)
    return MuonAdamW(matrices, others, lr, adamw or {}, **muon)
