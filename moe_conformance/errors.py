"""Everything this package raises on purpose; the tree is the documentation."""

from __future__ import annotations


class MoEConformanceError(Exception):
    """Base of all errors below."""


class UsageError(MoEConformanceError):
    """A command, option, known-failures file or engine name is wrong: exit code 2."""


class Unsupported(MoEConformanceError):
    """The engine does not offer this stage, or this feature of it. Never counted as a pass."""


class Absent(Unsupported):
    """The engine has nothing of the kind: no model, no code. Told apart from what the adapter could judge and does not.

    An adapter's statement about the engine, taken from the engine's own registry where it has one.
    """


class BeyondLimits(Unsupported):
    """The call exceeds the adapter's `limits()` for this stage, in size or dtype."""


class Unjudged(Unsupported):
    """The answer to these inputs is written down for the default seed alone."""


class Unavailable(MoEConformanceError):
    """The engine cannot start here: a package, a device or a version is missing."""


class Nonconformance(MoEConformanceError):
    """The engine's answer breaks a clause. Raised by checks, turned into the verdict `fail`."""


class Broken(MoEConformanceError):
    """Something a check needs is broken: a golden is missing, a package does not import.

    The verdict is `error`, because the engine was not judged.
    """


class Undecided(MoEConformanceError, ValueError):
    """The oracle cannot tell what is right for these inputs. They are drawn again; the engine is not to blame."""


class ConfigError(MoEConformanceError, ValueError):
    """A model config lacks a key or contradicts itself; the message names every key looked for."""


class DenseModelError(ConfigError):
    """The config describes a model without routed experts."""


class UnknownFamilyError(ConfigError):
    """No record has the checkpoint names of this config's model."""


class InputError(MoEConformanceError, ValueError):
    """A tensor argument has the wrong shape, dtype, range or layout."""


class CheckpointError(MoEConformanceError):
    """A checkpoint cannot be loaded whole; nothing of it was kept."""
