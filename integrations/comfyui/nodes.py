"""The nodes: images are ComfyUI's, (B, H, W, C) float32 in [0, 1]; masks (B, H, W) float32, 1 = pure."""

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch

from ppsr.integrations import spandrel as ppsr_spandrel
from ppsr.pictures.upscaler import Upscaler
from ppsr.weights import list_pretrained

FOLDER = 'upscale_models'  # where ComfyUI keeps weights that enlarge

ppsr_spandrel.install()  # ComfyUI's own "Load Upscale Model" gets Pure-Pass, too


def _path(name: str) -> str:
    """Shipped weights by their name, others from ComfyUI's folder."""
    return name if name in list_pretrained() else folder_paths.get_full_path_or_raise(FOLDER, name)


def _device() -> torch.device:
    """The one that ComfyUI works on, where ppsr knows it."""
    device = comfy.model_management.get_torch_device()
    return device if device.type in ('cpu', 'cuda') else torch.device('cpu')


def _each(image: torch.Tensor, work) -> torch.Tensor:
    """work(picture) of every picture of a batch (B, H, W, C), stacked."""
    return torch.stack([torch.from_numpy(work(picture)) for picture in image.cpu().clamp(0, 1).numpy()])


class LoadModel:
    """Weights of ppsr, of ATD-light, or shipped ones."""

    CATEGORY = 'ppsr'
    RETURN_TYPES = ('PPSR_MODEL',)
    RETURN_NAMES = ('model',)
    FUNCTION = 'load'

    @classmethod
    def INPUT_TYPES(cls):
        names = [*list_pretrained(), *folder_paths.get_filename_list(FOLDER)]
        return {
            'required': {
                'name': (names, {'tooltip': f'shipped weights, or a file in models/{FOLDER}'}),
                'pure_pass': ('BOOLEAN', {'default': True, 'tooltip': 'off: nothing is exempted'}),
            }
        }

    def load(self, name, pure_pass):
        descriptor = ppsr_spandrel.load(_path(name), pure_pass=pure_pass)
        return (descriptor.model,)


class Upscale:
    """Enlarges a batch; tiles where the memory asks for them."""

    CATEGORY = 'ppsr'
    RETURN_TYPES = ('IMAGE', 'FLOAT')
    RETURN_NAMES = ('image', 'pure_share')
    FUNCTION = 'upscale'

    @classmethod
    def INPUT_TYPES(cls):
        return {
            'required': {
                'model': ('PPSR_MODEL',),
                'image': ('IMAGE',),
                'factor': ('FLOAT', {'default': 0.0, 'min': 0.0, 'max': 16.0, 'step': 0.25, 'tooltip': '0: its own'}),
                'tile': ('INT', {'default': 0, 'min': 0, 'max': 4096, 'step': 16, 'tooltip': '0: as memory demands'}),
            }
        }

    def upscale(self, model, image, factor, tile):
        upscaler = Upscaler(
            model,
            device=_device(),
            outscale=factor or None,
            tile=tile or None,
            tile_overlap=min(32, tile // 2) if tile else 32,
        )
        bar, shares = comfy.utils.ProgressBar(len(image)), []

        def stop_if_asked(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()

        def work(picture: np.ndarray) -> np.ndarray:
            result, stats = upscaler.upscale_with_stats(picture, on_tile=stop_if_asked)
            shares.append(stats.pure_share)
            bar.update(1)
            return result

        result = _each(image, work)
        model.to(comfy.model_management.unet_offload_device())
        return result, sum(shares) / len(shares)


class Mask:
    """Which pixels the network exempts: 1 = pure."""

    CATEGORY = 'ppsr'
    RETURN_TYPES = ('MASK',)
    RETURN_NAMES = ('pure',)
    FUNCTION = 'mask'

    @classmethod
    def INPUT_TYPES(cls):
        return {'required': {'model': ('PPSR_MODEL',), 'image': ('IMAGE',)}}

    def mask(self, model, image):
        upscaler = Upscaler(model, device='cpu', tile=0)

        def work(picture: np.ndarray) -> np.ndarray:
            pure = upscaler.mask(picture)
            return np.zeros(picture.shape[:2], np.float32) if pure is None else pure.astype(np.float32)

        return (_each(image, work),)


NODE_CLASS_MAPPINGS = {'PPSRLoadModel': LoadModel, 'PPSRUpscale': Upscale, 'PPSRMask': Mask}
NODE_DISPLAY_NAME_MAPPINGS = {
    'PPSRLoadModel': 'Load PP-ATD-light',
    'PPSRUpscale': 'Upscale with Pure-Pass',
    'PPSRMask': 'Pure-Pass mask',
}
