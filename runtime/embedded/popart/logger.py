"""getLogger: PopART's channels (`all`, `session`, `ir`, `opx`, `pattern`, ...), each a Python logger `popart.<name>`."""
import logging

_LEVELS = {
    "TRACE": 5, "DEBUG": logging.DEBUG, "INFO": logging.INFO, "WARN": logging.WARNING, "WARNING": logging.WARNING,
    "ERR": logging.ERROR, "ERROR": logging.ERROR, "CRITICAL": logging.CRITICAL, "OFF": logging.CRITICAL + 10,
}  # fmt: skip
_HEAD = "popart"


class Logger:
    """One channel. Silent up to WARN until setLevel says otherwise, as PopART's are."""

    def __init__(self, name="all"):
        self.name = name
        self._logger = logging.getLogger(_HEAD if name == "all" else f"{_HEAD}.{name}")

    def setLevel(self, level):
        """TRACE, DEBUG, INFO, WARN, ERR, CRITICAL or OFF, in any case; `all` sets every channel."""
        number = _LEVELS.get(str(level).upper())
        if number is None:
            raise ValueError(f"Unknown logging level '{level}'; it is one of {', '.join(_LEVELS)}")
        self._logger.setLevel(number)

    def debug(self, message):
        self._logger.debug("%s", message)

    def info(self, message):
        self._logger.info("%s", message)

    def warn(self, message):
        self._logger.warning("%s", message)

    def error(self, message):
        self._logger.error("%s", message)

    def critical(self, message):
        self._logger.critical("%s", message)


def getLogger(name="all"):
    """The Logger of a channel."""
    return Logger(name)
