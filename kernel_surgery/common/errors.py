"""The errors that Kernel Surgery raises for bad input.

Each message says what is wrong, where it is wrong, and the next step. If two values do not fit, it names both. A
command prints the message and exits with status 2 (`common.command.main`). Any other exception is a bug in this package
and keeps its traceback. All of these errors are ValueErrors, so `except ValueError` catches the family.
"""

import argparse


class KernelSurgeryError(ValueError):
    """The input cannot be used. The base class of every error here."""


class UserError(KernelSurgeryError, argparse.ArgumentTypeError):
    """An option, or a combination of options, cannot be used.

    It is also an ArgumentTypeError, so argparse prints the message that a `type=` function raises. For any other
    ValueError, argparse prints only "invalid ... value".
    """


class ModelError(KernelSurgeryError):
    """A model cannot be loaded, or has no place for the edit."""


class SubspaceError(KernelSurgeryError):
    """A subspace, or the activations it is fitted to, cannot be used."""


class MismatchError(SubspaceError):
    """A subspace does not belong to the model."""


class CheckpointError(KernelSurgeryError):
    """Files on disk are damaged, incomplete, or different from their record."""


class MissingFileError(KernelSurgeryError, FileNotFoundError):
    """A file does not exist."""


class ExistsError(KernelSurgeryError, FileExistsError):
    """The path of a new file or folder already exists. It is left unchanged."""
