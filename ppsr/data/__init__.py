"""Data sets: prepared (``ppsr prepare``), checked and read. Importing it registers ``PairedSRDataset`` with basicsr."""

from ppsr.data.paired_sr_dataset import PairedSRDataset

__all__ = ['PairedSRDataset']
