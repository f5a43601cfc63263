"""Errors that a user can mend. Each says what was wrong, what was found and what to do."""


class DiffTuneError(Exception):
    """Base of every error that is the input's fault, not the program's.

    The command line prints its message without a traceback and exits with status 2.
    """


class ConfigError(DiffTuneError):
    """A setting, or a combination of settings, that cannot work."""


class CheckpointError(DiffTuneError):
    """Weights that are missing, unreadable, or of another model."""


class DataError(DiffTuneError):
    """Images, labels or folders that cannot be used."""


class StoreError(DiffTuneError):
    """A memory bank or latent cache that is incomplete, altered, or made by something else."""


class NumericsError(DiffTuneError):
    """A loss or weights that are no longer finite."""
