"""The name under which PopART's compiled module is imported by some programs: the same objects as `popart`."""
from popart import *  # noqa: F403
from popart import __version__  # noqa: F401
