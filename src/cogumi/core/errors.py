"""The errors shown to users. Each message states what happened and what to do next.

CogumiError
├── RecipeError      a recipe that cannot be run
├── DataError        input data that cannot be used
├── ArtifactError    a folder on disk that does not match its manifest
├── GateError        a quality gate that failed: the build stops with the figure
├── TrainingError    training that cannot start or continue
├── ExportError      a model that cannot be exported without loss
├── BundleError      a bundle that must not be opened
├── PackageError     a feature whose optional package is not installed
├── StateError       saved state (memory, cache, learning) that cannot be read
└── RequestError     a request that cannot be answered as given
    ├── ContextError     prompt and answer do not fit the context
    └── BusyError        all slots and the queue are full; retry later
"""


class CogumiError(Exception):
    """Base of all errors meant for the user: one clear line, no traceback."""


class RecipeError(CogumiError):
    """A recipe that cannot be run."""


class DataError(CogumiError):
    """Input data that cannot be used."""


class ArtifactError(CogumiError):
    """A folder on disk that does not match its manifest."""


class GateError(CogumiError):
    """A quality gate that failed."""


class TrainingError(CogumiError):
    """Training that cannot start or continue."""


class ExportError(CogumiError):
    """A model that cannot be exported without loss."""


class BundleError(CogumiError):
    """A bundle that must not be opened."""


class PackageError(CogumiError):
    """A feature whose optional package is not installed."""


class StateError(CogumiError):
    """Saved state (memory, cache, learning) that cannot be read."""


class RequestError(CogumiError):
    """A request that cannot be answered as given."""


class ContextError(RequestError):
    """Prompt and answer do not fit the context."""


class BusyError(RequestError):
    """All slots and the queue are full; retry later."""
