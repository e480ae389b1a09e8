"""A report travels as a stream does: no exception in the background either."""

from tests.unit.transport.conftest import no_error_in_the_background

__all__ = ["no_error_in_the_background"]
