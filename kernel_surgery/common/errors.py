"""The errors that Kernel Surgery raises for what it is given.

Each message says what is wrong, where, both values where two do not fit, and the next step. A command prints the
message and exits with status 2 (`common.command.main`). Any other exception is a fault of ours and keeps its traceback.
All of them are ValueErrors, so `except ValueError` catches the family.
"""

import argparse


class KernelSurgeryError(ValueError):
    """Something that was given cannot be used."""


class UserError(KernelSurgeryError, argparse.ArgumentTypeError):
    """An option, or a combination of options, cannot be used.

    It is an ArgumentTypeError as well, so that argparse passes on the message of a `type=` function: of any
    other ValueError argparse says only "invalid ... value".
    """


class ModelError(KernelSurgeryError):
    """A model cannot be loaded, or has no place for the edit."""


class SubspaceError(KernelSurgeryError):
    """A subspace, or the activations it is fitted to, cannot be used."""


class MismatchError(SubspaceError):
    """A subspace does not belong to the model it was given with."""


class CheckpointError(KernelSurgeryError):
    """Files on disk are damaged, incomplete, or not what they should be."""


class MissingFileError(KernelSurgeryError, FileNotFoundError):
    """There is no such file."""


class ExistsError(KernelSurgeryError, FileExistsError):
    """Something exists where a new file or folder would go. It was left as it is."""
