"""Which PopART this is: the API of 3.4.0, embedded."""
from typing import NamedTuple

_NUMBER = (3, 4, 0)


class VersionNumber(NamedTuple):
    """`(major, minor, point)`."""

    major: int
    minor: int
    point: int


def versionString():
    """`3.4.0+embedded`."""
    return ".".join(map(str, _NUMBER)) + "+embedded"


def versionNumber():
    return VersionNumber(*_NUMBER)


def packageHash():
    """PopART's is the commit of the SDK; the embedded one has no SDK behind it and says so."""
    return "embedded"
