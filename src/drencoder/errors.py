"""Every error a user can cause, as one tree.

::

    DrencoderError            the command line prints it as one sentence and exits with code 2
    ├── RecipeError           a recipe file, an override or an option that cannot be meant
    ├── DataError             data that is missing, unreadable, empty or ill-shaped
    ├── ModelError            a base model or an adapter that cannot be loaded or trained
    ├── DeviceError           a device that is not there
    ├── PrivacyError          a privacy statement that cannot be made
    │   └── BudgetError       the next release would exceed the budget
    ├── EngineError           other machines that cannot be reached, or will not answer
    │   └── QuorumError       too few clients of a cohort answered
    ├── EncoderError          an encoder that cannot be built or used
    │   ├── CodeError         a received code that is truncated, oversized, foreign or not finite
    │   └── ViabilityError    an encoder that carries nothing, found before any budget was spent
    └── ArtifactError         a run folder that is missing, incomplete or was changed by hand
        └── LostError         a killed run left nothing that could be resumed

Each message names the value, the bound and the cure. A bug of ours is an `AssertionError`
or whatever Python raises, never one of these.
"""


class DrencoderError(Exception):
    """Base of all errors that are the caller's to mend."""


class RecipeError(DrencoderError):
    """A recipe, an override or an option cannot be meant."""


class DataError(DrencoderError):
    """Data is missing, unreadable, empty or ill-shaped."""


class ModelError(DrencoderError):
    """A base model or an adapter cannot be loaded or trained."""


class DeviceError(DrencoderError):
    """The asked-for device is not there."""


class PrivacyError(DrencoderError):
    """A privacy statement cannot be made."""


class BudgetError(PrivacyError):
    """The next release would exceed the budget."""


class EngineError(DrencoderError):
    """Other machines cannot be reached, or will not answer."""


class QuorumError(EngineError):
    """Too few clients of a cohort answered; `answered` did, or None where that is a secret."""

    def __init__(self, message: str, answered: int | None = None) -> None:
        super().__init__(message)
        self.answered = answered


class EncoderError(DrencoderError):
    """An encoder cannot be built or used."""


class CodeError(EncoderError):
    """A received code is truncated, oversized, foreign or not finite."""


class ViabilityError(EncoderError):
    """An encoder carries nothing; found before any budget was spent."""


class ArtifactError(DrencoderError):
    """A run folder is missing, incomplete or was changed by hand."""


class LostError(ArtifactError):
    """A killed run left nothing that could be resumed."""
