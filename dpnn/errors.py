"""What can go wrong, and the exit code that each kind ends a job with."""


class DpnnError(Exception):
    """The base of every error that dpnn raises on purpose; its text is the one message that a user sees."""

    exit_code = 1
    agreed = False
    """Whether all ranks raise it, so that one of them tells it."""


class JobError(DpnnError):
    """A wrong command, job file or launcher."""

    exit_code = 2


class DataError(DpnnError):
    """Data that are missing, damaged, or don't fit the job."""

    exit_code = 3


class RankError(DpnnError):
    """A rank, or the network between ranks, failed."""

    exit_code = 4


class RankLost(RankError):
    """A rank has died that the others can do without."""


class NotFiniteError(DpnnError):
    """The loss, or a parameter, is no longer a finite number."""

    exit_code = 5


class Stopped(DpnnError):
    """The run was told to stop and has written a checkpoint: run it again to go on."""

    exit_code = 75
