"""Errors that are a user's to mend: each message names the place (file, line, field or key) and what to do."""


class KTOError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback."""


class ConfigError(KTOError):
    """A configuration key, a combination of keys or a layout that cannot work."""


class DataError(KTOError):
    """A data file or record that cannot be read; names file, line and field."""


class DivergenceError(KTOError):
    """Training has left the finite numbers; names the step."""


class StoppedEarly(Exception):
    """Raised on all ranks when a run is to end before training has begun: no error, as it goes on another time."""


class CheckpointError(KTOError):
    """A checkpoint or a Hugging Face folder that is missing, incomplete or of another model."""
