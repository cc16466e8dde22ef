"""The exceptions of popart_core, with PopART's hierarchy and names."""
import enum


class RecoveryAction(enum.IntEnum):
    """What a recoverable Poplar error asks for."""

    IPU_RESET = 0
    LINK_RESET = 1
    PARTITION_RESET = 2
    FULL_RESET = 3


class popart_exception(Exception):
    """A model, an option or a call that PopART refuses."""


class popart_internal_exception(popart_exception):
    """PopART's own invariants were broken."""


class popart_runtime_error(popart_exception):
    """A session was used in a state in which it cannot do what was asked."""


class poplibs_exception(Exception):
    """Raised by PopLibs on hardware."""


class poplar_exception(Exception):
    """Raised by Poplar on hardware."""


class poplar_runtime_error(poplar_exception):
    """Raised while a Poplar program runs."""


class poplar_application_runtime_error(poplar_runtime_error):
    """The program itself failed, for example a floating point exception."""


class poplar_system_runtime_error(poplar_runtime_error):
    """The system under the program failed."""


class poplar_recoverable_runtime_error(poplar_system_runtime_error):
    """The system can be brought back by `recoveryAction`."""

    recoveryAction = RecoveryAction.FULL_RESET


class poplar_unrecoverable_runtime_error(poplar_system_runtime_error):
    """The system cannot be brought back."""


class poplar_unknown_runtime_error(poplar_system_runtime_error):
    """The state of the system is not known."""


class OutOfMemoryException(popart_exception):
    """The program does not fit; raised by prepareDevice and compileAndExport."""

    def __init__(self, message, summary="", profile_path=""):
        super().__init__(message)
        self._summary = summary
        self._profile_path = profile_path

    def isSuccessful(self):
        """Whether a report could be made though the program does not fit."""
        return bool(self._summary)

    def getSummaryReport(self):
        return self._summary

    def getProfilePath(self):
        return self._profile_path


class OutOfMemoryError:
    """What prepareDevice of the compiled module fills; false until memory ran out. Python raises OutOfMemoryException."""

    def __init__(self):
        self._error = None

    def isSuccessful(self):
        return self._error is None

    def getSummaryReport(self):
        return "" if self._error is None else self._error.getSummaryReport()

    def getProfilePath(self):
        return "" if self._error is None else self._error.getProfilePath()

    def __str__(self):
        return "" if self._error is None else str(self._error)

    def __repr__(self):
        return f"OutOfMemoryError({self})"


def unsupported(what, remedy=""):
    """A popart_exception for something PopART 3.4 has and the embedded runtime does not have yet."""
    text = f"The embedded PopART does not support {what}."
    return popart_exception(f"{text} {remedy}" if remedy else text)


def absent(what, remedy=""):
    """A callable that stands where PopART has something, and raises by name when it is called."""

    def refuse(*args, **kwargs):
        raise unsupported(what, remedy)

    return refuse


for _name, _kind in list(globals().items()):
    if isinstance(_kind, type) and issubclass(_kind, Exception):
        _kind.__module__ = "popart_core"  # where PopART has them: a traceback ends with the same line
