"""The command line of popdet, and the config schema."""

__version__ = "0.1.0"
