"""The Lightning-free core of fewstep: diffusion mathematics, networks and metrics."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fewstep")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
