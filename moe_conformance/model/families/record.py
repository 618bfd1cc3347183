"""One model family: everything this project knows about it. records/ has one file a family; every table is derived from
them.

A record says what its model's own code computes. Where transformers, the code that was published with the model, and
the paper disagree, `authority` says which one it follows and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_conformance.model.families.configs import Keys
from moe_conformance.model.families.keys import keys_in
from moe_conformance.model.families.layers import Rule, every_layer
from moe_conformance.model.families.naming import Names
from moe_conformance.model.families.words import Fields, activation

# Names that several families have. A family may use any of them, and those that its config uses must agree.
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
LAYERS = ("num_hidden_layers", "n_layers")
WIDTH = ("moe_intermediate_size",)
DENSE_WIDTH = ("intermediate_size",)
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


@dataclass(frozen=True)
class Shared:
    """count: keys for their number, or that number. width: keys for the width of one; (): that of a routed expert."""

    count: tuple[str, ...] | int = SHARED_COUNT
    width: tuple[str, ...] = ()


COUNTED = Shared()
ONE_AS_WIDE = Shared(1)
ONE_OF_ITS_OWN_WIDTH = Shared(1, ("shared_expert_intermediate_size",))


@dataclass(frozen=True)
class Sizes:
    """How a family spells its sizes.

    layers: rule for the MoE layers. num_layers: keys of the number of layers, () where the list of blocks gives it.
    experts_under: key of the level that holds experts, top-k and width. top_k: keys, or the number the model fixes.
    width: keys of an expert's width, or that width. width_of_hidden: key of the ratio of width to hidden_size.
    width_entry: which entry to take if the width is a list whose entries are not layers. extra_experts: key and
    default of further experts without weights that the router also chooses among. latent: key of the width that the
    experts work in, latent_required: whether it must be set. switch: key that must be true. least_experts: fewer is a
    dense model. encoder: rule, layer keys and width keys of an encoder. pyramid: legacy key with the experts of each
    layer. runs: rule for the layer of each run, where a forward pass runs some more than once.
    """

    layers: Rule = every_layer
    num_layers: tuple[str, ...] = LAYERS
    experts_under: str = ""
    top_k: tuple[str, ...] | int = TOP_K
    width: tuple[str, ...] | int = WIDTH
    width_of_hidden: str = ""
    width_entry: int | None = None
    shared: Shared | None = None
    extra_experts: tuple[str, int] | None = None
    latent: str = ""
    latent_required: bool = False
    switch: str = ""
    least_experts: int = 0
    encoder: tuple[Rule, tuple[str, ...], tuple[str, ...]] | None = None
    pyramid: str = ""
    runs: Rule | None = None

    def __post_init__(self) -> None:
        if bool(self.width) == bool(self.width_of_hidden):
            raise ValueError(
                f"sizes: got width {self.width!r} and width_of_hidden {self.width_of_hidden!r}, want one of them"
            )
        if self.width_entry is not None and (not self.width or isinstance(self.width, int)):
            raise ValueError(f"sizes: got width_entry with width {self.width!r}, want keys of a list of widths")


@dataclass(frozen=True)
class Method:
    """What a layer computes: the fields of specs.py that are not at their defaults. A `Key` stands for what the config
    says.

    routing, logits, experts (an MLPSpec), layer, latent: fields of the specs. shared: of SharedSpec; shared_mlp: of its
    MLP, where that is not as the experts are. dense: of DenseSpec; dense_mlp: of its MLP, width included.
    unsaid: why specs.py cannot express the layer.
    """

    routing: Any = field(default_factory=dict)
    logits: Fields = field(default_factory=dict)
    experts: Fields = field(default_factory=activation)
    shared: Fields = field(default_factory=dict)
    shared_mlp: Fields = field(default_factory=dict)
    latent: Fields = field(default_factory=dict)
    dense: Fields | None = None
    dense_mlp: Fields = field(default_factory=dict)
    layer: Fields = field(default_factory=dict)
    unsaid: str = ""


@dataclass(frozen=True)
class Wrapper:
    """The model around the family's text model, whose config has the family's below `path`.

    config_class: transformers'. rest: further keys that this class requires. typed: its text config must say its model
    type
    (transformers 4 builds it only then).
    """

    config_class: str
    rest: Keys = field(default_factory=dict)
    path: tuple[str, ...] = ("text_config",)
    typed: bool = False


@dataclass(frozen=True)
class Block:
    """The config of a block that is judged: the record's, of two layers, with every knob turned.

    keys: what differs from the record's config, None for a key that is dropped. layer: the decoder layer. grouped: the
    family reads experts_implementation. given: takes a routing instead of its router's. token_ids, state: its router
    needs them. bias: its selection bias, if hashed values are unsuitable. only: the config as it is, without variants.
    """

    keys: Keys = field(default_factory=dict)
    layer: int = 1
    grouped: bool = True
    given: bool = True
    token_ids: bool = False
    state: bool = False
    bias: tuple[float, ...] = ()


@dataclass(frozen=True)
class Variant:
    """Another setting of a block's config: keys that are changed or dropped, and fields of Block that differ.

    lenient: why an engine that computes otherwise breaks no more than a SHOULD.
    """

    keys: Keys = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    lenient: str = ""
    layer: int | None = None
    token_ids: bool | None = None
    bias: tuple[float, ...] | None = None
    state: bool | None = None


KINDS = ("sizes", "layers", "refused", "dense")
FORMS = ("class", "nested", "plain")


@dataclass(frozen=True)
class Config:
    """A further config of the family, in addition to those that every family has.

    kind: it is judged by the "sizes" or the "layers" it says, or is "refused" with the keys in `names`, or "dense".
    keys, dropped: what differs from the record's config. bare: the sizes of a model without experts alone.
    form: arguments of the record's "class", or of the wrapper's ("nested"), or a "plain" config.json: of the record's
    model type, or of `model_type`, with the record's level `below` (text_config) and `top` beside it. untyped: without
    the level's own model type. lenient: why an engine that says otherwise breaks no more than a SHOULD.
    """

    name: str
    kind: Literal["sizes", "layers", "refused", "dense"] = "sizes"
    keys: Keys = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    bare: bool = False
    form: Literal["class", "nested", "plain"] = "class"
    model_type: str = ""
    below: str = ""
    top: Keys = field(default_factory=dict)
    untyped: bool = False
    names: tuple[str, ...] = ()
    lenient: str = ""

    def __post_init__(self) -> None:
        for what, value, known in (("kind", self.kind, KINDS), ("form", self.form, FORMS)):
            if value not in known:
                raise ValueError(f"config {self.name}: {what}: got {value!r}, want one of {', '.join(known)}")
        if (self.model_type or self.top or self.untyped) and self.form != "plain":
            raise ValueError(
                f"config {self.name}: got model_type, top or untyped with form {self.form!r}, want form 'plain'; "
                "arguments of a class have neither"
            )


@dataclass(frozen=True)
class Tiny:
    """The real model, small.

    model_class: transformers' class that publishes checkpoints; text_class: that of the text model alone, where it
    writes checkpoints of its own. config_class: of model_class, where that is neither the wrapper's nor the record's.
    keys: by dotted path, keys that are not set by the named sizes.
    """

    model_class: str
    text_class: str = ""
    config_class: str = ""
    keys: Keys = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One model family.

    model_type: of the config level that describes the experts. also: further model types of that level, and of
    wrappers that are not called as it is without "_text". slug: how cases call it. config_class: transformers'.
    dead: keys that a config carries and its MoE layers do not read, or in training alone. disputed: those of them that
    another authority reads where they are true, which no published config says, each with the reason to be lenient.
    names: None where no canonical tensor could hold what its layers have.
    config: nine layers, in which no two roles share a number and none is a default. beside: keys that published
    config.json files carry although the model does the same without them; few classes read them, some engines require
    them.
    ways: what a config may say of how its layers compute: flags and choices on, off, otherwise; numbers that no class
    has by default. block: None where nothing routes. variants: other settings of its switches.
    configs: further ones. captured: those of which a capturer is asked the sizes: "" for the record's own, "nested" for
    that of its wrapper, or the name of a further one. sample: it is one of the few that stand for a way to route, to
    compute an expert or to combine, or of the fewer that stand for these.
    """

    model_type: str
    config_class: str
    sizes: Sizes
    method: Method
    config: Keys
    tiny: Tiny
    names: Names | None = None
    also: tuple[str, ...] = ()
    slug: str = ""
    wrapper: Wrapper | None = None
    dead: tuple[str, ...] = ()
    disputed: Keys = field(default_factory=dict)
    beside: Keys = field(default_factory=dict)
    ways: tuple[Keys, ...] = ()
    block: Block | None = Block()
    variants: Mapping[str, Variant] = field(default_factory=dict)
    configs: tuple[Config, ...] = ()
    captured: tuple[str, ...] = ()
    sample: Literal["", "core", "smoke"] = ""
    authority: str = ""

    def __post_init__(self) -> None:
        for name in ("also", "dead", "ways", "configs", "captured"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(
                    f"record of {self.model_type}: {name}: got {getattr(self, name)!r}, want a tuple; a comma makes one"
                )
        if not self.slug:
            object.__setattr__(self, "slug", self.model_type.removesuffix("_text").replace("_", "-"))

    @property
    def published_config_class(self) -> str:
        """The config class of what the family's checkpoints are of."""
        return self.tiny.config_class or (self.wrapper.config_class if self.wrapper else self.config_class)

    @property
    def covers(self) -> str:
        """Which stages the record covers, in words."""
        if self.method.unsaid:
            return f"config alone: {self.method.unsaid}"
        return "config, layers, block, checkpoint"

    @property
    def method_keys(self) -> tuple[tuple[str, ...], ...]:
        """The names of each key that decides the method of the family's layers; sizes and rules of layers apart."""
        found = [key.names for part in vars(self.method).values() for key in keys_in(part)]
        return tuple(dict.fromkeys(found))
