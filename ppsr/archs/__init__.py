"""Networks, registered in basicsr's ARCH_REGISTRY under their class names."""

from ppsr.archs.atd_light_arch import ATDLight, PPATDLight
from ppsr.archs.atd_light_v2_arch import ATDLightV2, PPATDLightV2
from ppsr.archs.camixer_atd_light_arch import CAMixerATDLight
from ppsr.archs.masked import MaskedNetwork
from ppsr.archs.swinir_light_arch import PPSwinIRLight, SwinIRLight

__all__ = [
    'ATDLight',
    'ATDLightV2',
    'CAMixerATDLight',
    'MaskedNetwork',
    'PPATDLight',
    'PPATDLightV2',
    'PPSwinIRLight',
    'SwinIRLight',
]
