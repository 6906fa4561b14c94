"""Data sets: prepared (``ppsr prepare``), checked and read. Importing it registers them with basicsr."""

from ppsr.data.paired_sr_dataset import PairedSRDataset
from ppsr.data.synthetic_graphics import SyntheticGraphics

__all__ = ['PairedSRDataset', 'SyntheticGraphics']
