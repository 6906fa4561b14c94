"""Pure-Pass for BasicSR. `import ppsr` registers the archs and models of this package in basicsr's registries."""

from ppsr.version import __version__

__all__ = ['__version__']
