"""Everything that can go wrong and be said plainly. Each message states what happened and what to do next.

CogumiError
├── RecipeError      a recipe that cannot be run
├── DataError        input data that cannot be used
├── ArtifactError    a folder on disk that is not what its manifest says
├── GateError        a quality gate that failed: the build stops with the figure
├── TrainingError    training that cannot start or go on
├── ExportError      a model that cannot be written faithfully
├── BundleError      a bundle that must not be opened
├── StateError       what was kept of earlier use (memory, cache, learning) cannot be read
└── RequestError     a request that cannot be answered as asked
    ├── ContextError     prompt and answer do not fit the context
    └── BusyError        no slot is free; come back later
"""


class CogumiError(Exception):
    """Base of all errors meant for the user: one clear line, no traceback."""


class RecipeError(CogumiError):
    """A recipe that cannot be run."""


class DataError(CogumiError):
    """Input data that cannot be used."""


class ArtifactError(CogumiError):
    """A folder on disk that is not what its manifest says."""


class GateError(CogumiError):
    """A quality gate that failed."""


class TrainingError(CogumiError):
    """Training that cannot start or go on."""


class ExportError(CogumiError):
    """A model that cannot be written faithfully."""


class BundleError(CogumiError):
    """A bundle that must not be opened."""


class StateError(CogumiError):
    """What was kept of earlier use (memory, cache, learning) cannot be read."""


class RequestError(CogumiError):
    """A request that cannot be answered as asked."""


class ContextError(RequestError):
    """Prompt and answer do not fit the context."""


class BusyError(RequestError):
    """No slot is free; come back later."""
