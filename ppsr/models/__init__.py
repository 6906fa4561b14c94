"""Models (training, validation, checkpoints), registered in basicsr's MODEL_REGISTRY under their class names."""

from ppsr.models.pure_pass_sr_model import PurePassSRModel

__all__ = ['PurePassSRModel']
