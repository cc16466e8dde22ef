"""What the tests of the custom ops share."""
import pytest

from custom_ops.host import HostKernels, load


@pytest.fixture(scope="session")
def kernels() -> HostKernels:
    """The host library, built from this tree."""
    found = load()
    assert found is not None, "these tests need g++"
    return found
