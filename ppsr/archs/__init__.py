"""Networks, registered in basicsr's ARCH_REGISTRY under their class names."""

from ppsr.archs.atd_light_arch import ATDLight, PPATDLight

__all__ = ['ATDLight', 'PPATDLight']
