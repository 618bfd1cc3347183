"""What is known of a model from its config: its layers and their names, and the form of its weights."""

from __future__ import annotations

from typing import NamedTuple

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import CONFIG, Folder
from moe_conformance.checkpoints.layout import Layout
from moe_conformance.checkpoints.scheme import Contradiction, Scheme, scheme_of
from moe_conformance.errors import ConfigError, DenseModelError, UnknownFamilyError
from moe_conformance.reference_impl.checkpoint.names import family_of
from moe_conformance.reference_impl.checkpoint.places import Places

OTHER_MODEL = "config.json and the tensors are of different models; take both from one place"


class Model(NamedTuple):
    """What is known of the model from its config.

    layout: None if config.json is wrong, which is a finding, or if no record has its names; why: the reason.
    """

    model_type: str
    layout: Layout | None
    scheme: Scheme | None
    why: str = ""


def model_of(folder: Folder, findings: Findings) -> Model:
    """Raises DenseModelError where neither config nor tensors have experts."""
    model_type = folder.config.get("model_type")
    name = model_type if isinstance(model_type, str) else "no model_type"
    scheme = None
    try:
        scheme = scheme_of(folder.config, folder.modelopt)
    except Contradiction as error:
        got, _, want = str(error).partition(", want ")
        findings.add("config", CONFIG, got=got, want=want, do="take config.json from where the tensors come from")
    try:
        layout = Layout(Places(folder.config), folder.config)
        record, _ = family_of(folder.config)
        return Model(record.model_type if record.model_type != name else name, layout, scheme)
    except ConfigError as error:
        dense = error if isinstance(error, DenseModelError) else error.__cause__
        if isinstance(dense, DenseModelError):
            _no_experts(dense, folder, findings)
            return Model(name, None, scheme)
        if isinstance(error, UnknownFamilyError):
            return Model(name, None, scheme, str(error))
        want, do = "a config that says what its layers are", "mend config.json, or take it from its release"
        findings.add("config", CONFIG, got=str(error), want=want, do=do)
        return Model(name, None, scheme)


def _no_experts(error: DenseModelError, folder: Folder, findings: Findings) -> None:
    """By its config; raises the error where its tensors have none either."""
    first = next((tensor for tensor in folder.tensors if ".experts." in tensor), None)
    if first is None:
        raise error
    file = folder.tensors[first].file
    want = f"none, for {error}"
    findings.add("contradiction", file, first, got="experts in the tensors", want=want, do=OTHER_MODEL)
