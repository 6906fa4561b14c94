"""Muon for a network: orthogonalised momentum for its matrices and convolution kernels, AdamW for everything else.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) is torch's own (:class:`torch.optim.Muon`, since
torch 2.9). That one takes matrices only; here a convolution kernel (out, in, k, k) is the matrix (out, in·k·k), and the
parameters that are no matrices at heart (norms, biases, tables, dictionaries, depthwise kernels) go to AdamW in the
same object: rate schedules, warm-up, gradient scaling and checkpoints see one optimizer.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ppsr.errors import UserError

__all__ = ['MuonAdamW', 'muon_for', 'muon_parameters']

ADAMW = {'betas': (0.9, 0.95), 'weight_decay': 0.0}  # unless optim_g → adamw says otherwise


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
        for group, part in zip(self.param_groups, self.parts.values()):
            part.param_groups[0]['lr'] = group['lr']
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
