"""Writing a file whole or not at all: a temporary name beside it, fsync, rename."""
import contextlib
import os
import pathlib

from .errors import popart_exception


@contextlib.contextmanager
def replacing(path, what, make_folder=False):
    """A binary file that takes the place of `path` when the block ends without an error.

    what: how messages call it, e.g. "the model". Raises popart_exception when it cannot be written.
    """
    temporary = pathlib.Path(f"{os.fspath(path)}.part")
    try:
        if make_folder:
            temporary.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise popart_exception(f"Cannot write {what} '{path}': {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # it is gone, or its folder is none
            temporary.unlink()
