"""The errors that popdet raises on purpose, and the exit code that the command line gives each.

0 ok, 1 mismatch or quality gate, 2 usage or config, 3 environment, 4 bad input file.
A message says what was found, where (file, node, module path), and what to do.
"""


class PopdetError(Exception):
    """Base of every error a user can cause or cure; the command line prints it without a traceback."""

    exit_code = 2


class MismatchError(PopdetError):
    """Numbers differ by more than the thresholds allow, or a quality gate was missed."""

    exit_code = 1


class ConfigError(PopdetError):
    """A config file, an override or a command-line value that cannot be used."""

    exit_code = 2


class GraphError(PopdetError):
    """A graph that a pass, a rule of PopART or a stage map cannot accept; names the node and its module path."""

    exit_code = 2


class EnvironmentProblem(PopdetError):
    """Something this machine lacks: the Poplar SDK, a compiler, a library version."""

    exit_code = 3


class BadInputFile(PopdetError):
    """A file that is missing, truncated, corrupt, tampered with or not what its name says."""

    exit_code = 4
