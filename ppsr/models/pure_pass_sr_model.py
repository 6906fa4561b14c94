"""The BasicSR model around PP-ATD-light: an SRModel that counts what Pure-Pass saves and loads weights safely."""

from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed
from basicsr.metrics import calculate_metric
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger, imwrite, tensor2img
from basicsr.utils.registry import MODEL_REGISTRY
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import default_collate
from tqdm import tqdm

from ppsr.errors import UserError
from ppsr.registry import register
from ppsr.weights import load_into, read_checkpoint

__all__ = ['PurePassSRModel']

OPTIMIZERS = ('Adam', 'AdamW', 'SGD', 'RMSprop', 'RAdam', 'NAdam')
# what Pure-Pass did to a data set, reported beside PSNR and SSIM; which direction a best-of record prefers
STATISTICS = {'pure_percent': 'higher', 'gmacs': 'lower', 'gmacs_saved_percent': 'higher'}
STATIC_OUTPUT = (720, 1280)  # static multiply-adds are told for this output size, as papers do


@register(MODEL_REGISTRY)
class PurePassSRModel(SRModel):
    """SRModel of basicsr, with:

    - parameters and GMACs at 1280×720 output logged when it is built;
    - per validation set, beside the metrics: mean share of pure pixels, mean GMACs per image and the share saved
      against the dense network, counted from the masks that were really used;
    - named auxiliary losses: a network with ``auxiliary_losses() -> {name: scalar}`` has them added to the training
      loss, each times ``train.auxiliary_weights[name]`` (or the network's own ``auxiliary_weights``), and logged;
    - every optimizer of torch.optim that super-resolution uses (basicsr 1.4.2 knows Adam only);
    - weights read without running code, keys named when they do not fit.

    Networks of other packages work; they have no statistics unless they offer ``macs``.
    """

    def __init__(self, opt: dict):
        super().__init__(opt)
        net = self.get_bare_model(self.net_g)
        if hasattr(net, 'macs') and opt['rank'] == 0:
            h, w = (side // opt['scale'] for side in STATIC_OUTPUT)
            parameters = sum(p.numel() for p in net.parameters())
            get_root_logger().info(
                f'{type(net).__name__}: {parameters:,} parameters, {sum(net.macs(h, w).values()) / 1e9:.2f} GMACs for '
                f'{STATIC_OUTPUT[1]}×{STATIC_OUTPUT[0]} output ({w}×{h} input) when no pixel is pure.'
            )

    # ------------------------------------------------------------------ building

    def model_to_device(self, net):
        net = net.to(self.device)
        if self.opt['dist']:
            unused = self.opt.get('find_unused_parameters', False)
            devices = [torch.cuda.current_device()] if self.device.type == 'cuda' else None  # None: CPU with gloo
            return DistributedDataParallel(net, device_ids=devices, find_unused_parameters=unused)
        return DataParallel(net) if self.opt['num_gpu'] > 1 else net

    def get_optimizer(self, optim_type, params, lr, **kwargs):
        if optim_type not in OPTIMIZERS:
            raise UserError(f'train → optim_g → type: {optim_type!r} is not one of {", ".join(OPTIMIZERS)}.')
        return getattr(torch.optim, optim_type)(params, lr, **kwargs)

    def load_network(self, net, load_path, strict=True, param_key='params_ema'):
        checkpoint = read_checkpoint(load_path, param_key)
        net = self.get_bare_model(net)
        left_out = load_into(net, checkpoint, strict)
        logger = get_root_logger()
        logger.info(f'Loaded {type(net).__name__} from {load_path} ({checkpoint.key or "bare state dict"}).')
        if left_out:
            logger.warning(f'{len(left_out)} parameters were left as they are: {"; ".join(left_out[:6])}')

    # ------------------------------------------------------------------ training

    def optimize_parameters(self, current_iter):
        self.optimizer_g.zero_grad()
        self.output = self.net_g(self.lq)
        losses = self._losses()
        sum(losses.values()).backward()
        self.optimizer_g.step()
        self.log_dict = self.reduce_loss_dict(losses)
        if self.ema_decay > 0:
            self.model_ema(decay=self.ema_decay)

    def _losses(self) -> OrderedDict:
        """Every term of the loss by its name in the log."""
        losses = OrderedDict()
        if self.cri_pix:
            losses['l_pix'] = self.cri_pix(self.output, self.gt)
        if self.cri_perceptual:
            perceptual, style = self.cri_perceptual(self.output, self.gt)
            losses.update({n: v for n, v in (('l_percep', perceptual), ('l_style', style)) if v is not None})
        net = self.get_bare_model(self.net_g)
        if hasattr(net, 'auxiliary_losses'):
            weights = self.opt['train'].get('auxiliary_weights') or getattr(net, 'auxiliary_weights', {})
            for name, loss in net.auxiliary_losses().items():
                losses[f'l_{name}'] = loss * weights.get(name, 1.0)
        return losses

    # ------------------------------------------------------------------ validation

    def test(self):
        """Run the network (its EMA where there is one) on ``self.lq``; sets ``self.output`` and ``self.statistics``."""
        net = self.get_bare_model(getattr(self, 'net_g_ema', self.net_g))
        training = net.training
        net.eval()
        try:
            with torch.no_grad():
                self.output, self.statistics = self._run(net)
        finally:
            net.train(training)  # the mode that it was found in

    def _run(self, net):
        if not hasattr(net, 'macs'):
            return net(self.lq), {}
        output, mask = net(self.lq, return_mask=True)
        h, w = self.lq.shape[-2:]
        macs, dense = sum(net.macs(h, w, mask).values()), _dense_macs(net, h, w)
        pure = 0.0 if mask is None else mask[..., :h, :w].double().mean().item()
        return output, {
            'pure_percent': 100 * pure,
            'gmacs': macs / 1e9,
            'gmacs_saved_percent': 100 * (1 - macs / dense),
        }

    def dist_validation(self, dataloader, current_iter, tb_logger, save_img):
        self.nondist_validation(dataloader, current_iter, tb_logger, save_img)

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        """Metrics and statistics of one data set; several processes take every n-th image each and share their sums."""
        dataset, val = dataloader.dataset, self.opt['val']
        rank, world_size = self.opt['rank'], self.opt['world_size']
        name = dataset.opt['name']
        metrics = val.get('metrics') or {}
        sums: dict[str, float] = dict.fromkeys(metrics, 0.0)
        mine = range(rank, len(dataset), world_size)
        for i in tqdm(mine, desc=name, unit='image', leave=False, disable=rank != 0 or not val.get('pbar', False)):
            data = default_collate([dataset[i]])
            self.feed_data(data)
            self.test()
            images = self._as_images()
            for metric, options in metrics.items():
                sums[metric] += calculate_metric(images, dict(options))
            for statistic, value in self.statistics.items():
                sums[statistic] = sums.get(statistic, 0.0) + value
            if save_img:
                imwrite(images['img'], str(self._image_path(name, Path(data['lq_path'][0]).stem, current_iter)))
            self._forget_images()

        if self.opt['dist']:
            keys = [*metrics, *STATISTICS]
            total = torch.tensor([sums.get(key, 0.0) for key in keys], dtype=torch.float64, device=self.device)
            torch.distributed.all_reduce(total)
            net = self.get_bare_model(self.net_g)
            sums = {k: v for k, v in zip(keys, total.tolist()) if k in metrics or hasattr(net, 'macs')}
        self.metric_results = {key: value / len(dataset) for key, value in sums.items()}
        self._initialize_best_metric_results(name)
        for key, value in self.metric_results.items():
            self._update_best_metric_result(name, key, value, current_iter)
        if rank == 0:
            self._log_validation_metric_values(current_iter, name, tb_logger)

    def _as_images(self) -> dict:
        """Result and ground truth as uint8 BGR images, under the names that basicsr's metrics take."""
        images = {'img': tensor2img([self.output.detach()])}
        if hasattr(self, 'gt'):
            images['img2'] = tensor2img([self.gt.detach()])
        return images

    def _forget_images(self) -> None:
        for attribute in ('lq', 'gt', 'output'):
            if hasattr(self, attribute):
                delattr(self, attribute)

    def _image_path(self, dataset_name: str, image_name: str, current_iter) -> Path:
        folder = Path(self.opt['path']['visualization'])
        if self.opt['is_train']:
            return folder / image_name / f'{image_name}_{current_iter}.png'
        return folder / dataset_name / f'{image_name}_{self.opt["val"].get("suffix") or self.opt["name"]}.png'

    def _initialize_best_metric_results(self, dataset_name):
        self.best_metric_results = getattr(self, 'best_metric_results', {})
        record = self.best_metric_results.setdefault(dataset_name, {})
        better = {k: v.get('better', 'higher') for k, v in (self.opt['val'].get('metrics') or {}).items()} | STATISTICS
        for key in self.metric_results:
            start = float('-inf') if better[key] == 'higher' else float('inf')
            record.setdefault(key, {'better': better[key], 'val': start, 'iter': -1})


def _dense_macs(net, height: int, width: int) -> int:
    """Multiply-adds of the network without Pure-Pass: no token exempt, no mask computed."""
    macs = net.macs(height, width)
    return sum(macs.values()) - macs.get('mask', 0)
