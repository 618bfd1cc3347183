"""The reference as an engine: it offers everything that any case may ask for."""

from __future__ import annotations

import pytest

from moe_conformance.catalogue.case import collect
from moe_conformance.engines.reference import Reference
from moe_conformance.protocol.features import FEATURES, complaints
from moe_conformance.protocol.stages import STAGES
