"""From exact to fast: what the settings of Pure-Pass cost and save with given weights (``ppsr calibrate``), and the
choice of one from that (``ppsr upscale --max-loss``)."""

from ppsr.calibration.curve import Curve, Point, curve_of
from ppsr.calibration.dial import Choice, Wish, choose, load_as_wished

__all__ = ['Choice', 'Curve', 'Point', 'Wish', 'choose', 'curve_of', 'load_as_wished']
