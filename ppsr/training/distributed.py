"""Several processes: torchrun or SLURM start them, torch.distributed joins them, with NCCL on GPUs and gloo on CPUs."""

import os
import subprocess

import torch
import torch.distributed as dist

from ppsr.errors import UserError

__all__ = ['any_process', 'barrier', 'from_all', 'from_first', 'init_dist', 'leave_dist', 'raise_in_all']


def init_dist(opt: dict, launcher: str) -> None:
    """Join the process group and set ``opt['dist' | 'rank' | 'world_size' | 'num_gpu']``.

    'none' changes nothing, except where torchrun has started several processes: then it is 'pytorch'.

    basicsr's own function assumes CUDA. Here a process takes the GPU of its LOCAL_RANK, or the CPU when num_gpu is 0.

    Raises:
        UserError: the launcher's environment variables are not there.
    """
    if launcher == 'none' and 'TORCHELASTIC_RUN_ID' in os.environ and os.environ.get('WORLD_SIZE', '1') != '1':
        launcher = 'pytorch'
    if launcher == 'none':
        return
    if launcher == 'slurm':
        _slurm_environment()
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if missing:
        raise UserError(
            f'--launcher {launcher}: {", ".join(missing)} not set; start with torchrun (docs/reliability.md).'
        )
    on_gpu = opt['num_gpu'] != 0
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', os.environ['RANK'])) % torch.cuda.device_count())
    dist.init_process_group(backend='nccl' if on_gpu else 'gloo')
    opt.update(dist=True, rank=dist.get_rank(), world_size=dist.get_world_size())


def _slurm_environment() -> None:
    """Name the rendezvous in torchrun's variables; SLURM_* tell who and how many we are."""
    try:
        tasks, rank, local = (os.environ[f'SLURM_{name}'] for name in ('NTASKS', 'PROCID', 'LOCALID'))
        nodes = os.environ['SLURM_NODELIST']
    except KeyError as e:
        raise UserError(f'--launcher slurm: {e.args[0]} is not set; start with srun.') from e
    if 'MASTER_ADDR' not in os.environ:
        hosts = subprocess.run(['scontrol', 'show', 'hostnames', nodes], capture_output=True, text=True, check=True)
        os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')
    os.environ.update(WORLD_SIZE=tasks, RANK=rank, LOCAL_RANK=local)


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process: all get the same answer. `device` is one that the backend works on."""
    if _alone():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.item() > 0


def from_all(value) -> list:
    """The `value` (anything that pickles) of every process, in the order of their ranks."""
    if _alone():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(make):
    """What ``make()`` returns in the first process, in all of them; when it raises there, all of them raise.

    Raises:
        UserError: the same one in every process; in the others also one that tells whatever else went wrong in the
            first, which raises that itself: nobody is left waiting.
    """
    if _alone():
        return make()
    error, answer = None, [None, None]
    if dist.get_rank() == 0:
        try:
            answer = [make(), None]
        except BaseException as e:  # Ctrl-C, too: the others wait for the broadcast
            error, answer = e, [None, _sentence(e)]
    dist.broadcast_object_list(answer, src=0)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def raise_in_all(error: Exception | None, device: torch.device) -> None:
    """Raise the error that a process met in all processes, so that none goes on to wait for it.

    Called by every process at the same place, with its error or None. `device` is one that the backend works on.

    Raises:
        Exception: its own, in the process that has one.
        UserError: in the others, with the sentence of the first that failed.
    """
    if _alone():
        if error is not None:
            raise error
        return
    if not any_process(error is not None, device):
        return
    sentences = from_all(None if error is None else _sentence(error))
    if error is not None:
        raise error
    raise UserError(next(filter(None, sentences)))


def _sentence(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f'process {dist.get_rank()} failed ({type(error).__name__}: {error}).'


def barrier() -> None:
    """Wait until every process is here."""
    if not _alone():
        dist.barrier()


def leave_dist() -> None:
    """Leave the process group, if there is one."""
    if not _alone():
        dist.destroy_process_group()
