"""Is a checkpoint whole: every MoE tensor of its config there once, of its shape and dtype, with what belongs to it.

From config and headers alone. What every tensor is called is in layout.py, how each form lies in forms.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from moe_conformance.checkpoints.findings import Findings
from moe_conformance.checkpoints.folder import CONFIG, Folder
from moe_conformance.checkpoints.forms import CARRIERS, FLOATS, INTEGERS, Held, Trouble, kind_of, troubles_of
from moe_conformance.checkpoints.generic import alike
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.checkpoints.layout import CUT, MTP, NUMBER, Layout, Spelling, Spot, ends, stored_shape
from moe_conformance.checkpoints.scheme import Contradiction, Scheme, scheme_of
from moe_conformance.errors import ConfigError, DenseModelError
from moe_conformance.model.families.naming import Piece, Stack
from moe_conformance.model.specs import Shape
from moe_conformance.quote import FEW, plainly
from moe_conformance.reference_impl.checkpoint.names import family_of
from moe_conformance.reference_impl.checkpoint.places import Layer, Places

OTHER_MODEL = "config.json and the tensors are of different models; take both from one place"
MEND = "mend the export"
# What bitsandbytes adds to the weight's own name.
OF_THE_WEIGHT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4")
# Of a draft layer, whatever the config counts.
DRAFT_MARKS = ("eh_proj", "enorm", "hnorm", "shared_head")


class Matrix(NamedTuple):
    """The tensors of one matrix: by the end of each one's name."""

    stored: dict[str, Stored]

    @property
    def members(self) -> dict[str, Held]:
        return {end: Held(entry.dtype, entry.shape) for end, entry in self.stored.items()}

    @property
    def carrier(self) -> Stored:
        """The tensor that the matrix is called by."""
        return next((self.stored[end] for end in CARRIERS if end in self.stored), next(iter(self.stored.values())))


Experts = dict[int | None, Matrix]


class Group(NamedTuple):
    """What a layer holds in one spelling: each expert's matrix, or one of all, under None."""

    spelling: Spelling
    experts: Experts


# stack, layer, pattern of the spelling.
Key = tuple[Stack, int, str]
Outside = dict[str, dict[str, Stored]]


class Model(NamedTuple):
    """What is known of the model from its config. layout: None where config.json is not right, which is a finding,
    or no record has its names; why: then the reason."""

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
    except DenseModelError as error:
        if not any(".experts." in tensor for tensor in folder.tensors):
            raise
        first = next(tensor for tensor in folder.tensors if ".experts." in tensor)
        findings.add(
            "contradiction",
            folder.tensors[first].file,
            first,
            got="experts in the tensors",
            want=f"none, for {error}",
            do=OTHER_MODEL,
        )
        return Model(name, None, scheme)
    except ConfigError as error:
        if _has_record(folder.config):
            want, do = "a config that says what its layers are", "mend config.json, or take it from its release"
            findings.add("config", CONFIG, got=str(error), want=want, do=do)
            return Model(name, None, scheme)
        return Model(name, None, scheme, str(error))


def _has_record(config: Mapping[str, Any]) -> bool:
    from moe_conformance.model.families.families import NESTED, RECORDS

    levels = [config, *(config.get(key) for key in NESTED)]
    types = [level.get("model_type") for level in levels if isinstance(level, Mapping)]
    found = [RECORDS.record_of(name) for name in types if isinstance(name, str)]
    return any(record is not None and record.names is not None for record in found)


def judge(folder: Folder, model: Model, findings: Findings) -> dict[Key, Group]:
    """Everything that headers say. returns what the MoE layers hold, by layer and spelling."""
    groups, outside = _sorted(folder, model.layout, findings)
    judged = _Judge(folder, model, findings)
    for key, group in groups.items():
        judged.group(key, group)
    if model.layout is not None:
        judged.coverage(groups)
    else:
        alike(outside, folder, findings)
    judged.outside(outside)
    judged.scheme()
    return groups


def _sorted(folder: Folder, layout: Layout | None, findings: Findings) -> tuple[dict[Key, Group], Outside]:
    """Every tensor in its place: in the MoE layers, or by the stem of its name."""
    spots: dict[tuple[str, ...], Spot | None] = {}
    raw: dict[tuple[Stack, str, Spelling], list[tuple[str | None, str, Stored]]] = {}
    outside: Outside = {}
    strangers: list[tuple[Spot, str, Stored]] = []
    stems: dict[tuple[str, ...], tuple[int, str]] = {}
    split = CUT.split
    for name, entry in folder.tensors.items():
        cut = split(name)
        words = tuple(cut[::2])
        if words in spots:
            spot = spots[words]
        else:
            spot = spots[words] = layout.spot(name) if layout else None
        if spot is not None and any(cut[2 * at + 1] != text for at, text in spot.fixed):
            spot = layout.spot(name) if layout else None
        if spot is None:
            found = stems.get(words)
            if found is None:
                stem, end = next(ends(name), (name, ""))
                found = stems[words] = len(name) - len(stem), end
            outside.setdefault(name[: len(name) - found[0]], {}).setdefault(found[1], entry)
            continue
        layer = cut[2 * spot.layer + 1]
        if spot.spelling is None:
            strangers.append((spot, layer, entry))
            continue
        expert = None if spot.expert is None else cut[2 * spot.expert + 1]
        raw.setdefault((spot.stack, layer, spot.spelling), []).append((expert, spot.end, entry))
    groups = dict(_grouped(raw, findings))
    _strangers(strangers, layout, groups, findings)
    return groups, outside


def _grouped(
    raw: Mapping[tuple[Stack, str, Spelling], list[tuple[str | None, str, Stored]]], findings: Findings
) -> Iterator[tuple[Key, Group]]:
    for (stack, digits, spelling), held in raw.items():
        if not NUMBER.fullmatch(digits):
            for _, _, entry in held:
                _number(entry, findings)
            continue
        experts: Experts = {}
        for expert, end, entry in held:
            if expert is None:
                number = None
            elif NUMBER.fullmatch(expert):
                number = int(expert)
            else:
                _number(entry, findings)
                continue
            matrix = experts.get(number)
            if matrix is None:
                matrix = experts[number] = Matrix({})
            other = matrix.stored.setdefault(end, entry)
            if other is not entry:
                _again(other, entry, findings)
        yield (stack, int(digits), spelling.pattern), Group(spelling, experts)


def _number(entry: Stored, findings: Findings) -> None:
    do = "rename the tensor"
    findings.add(
        "extra", entry.file, entry.name, got="a number that no layer or expert has", want="0, 1, 2, ...", do=do
    )


def _again(held: Stored, entry: Stored, findings: Findings) -> None:
    findings.add(
        "doubled",
        entry.file,
        entry.name,
        got=f"the same weights as {plainly(held.name)} in {plainly(held.file)}",
        want="each weight once",
        do="remove one of them: which is read depends on the engine",
    )


def _strangers(
    strangers: list[tuple[Spot, str, Stored]], layout: Layout | None, groups: Mapping[Key, Group], findings: Findings
) -> None:
    """Names within an MoE block that are in no spelling of the family."""
    if layout is None:
        return
    routed = {(stack, index) for stack, index, _ in groups}
    for spot, digits, entry in strangers:
        index = int(digits) if NUMBER.fullmatch(digits) else -1
        layer, is_draft = layout.layer(spot.stack, index)
        if layer is None or is_draft or (spot.stack, index) not in routed:
            continue
        if any(spot.end == known or spot.end.startswith(f"{known}.") for known in layout.absent):
            findings.add(
                "contradiction",
                entry.file,
                entry.name,
                got="a tensor of a part that config.json switches off",
                want="none, or the key that switches it on",
                do="take config.json from where the tensors come from",
            )
        else:
            findings.add(
                "extra",
                entry.file,
                entry.name,
                got="a name in the MoE block that this family does not have",
                want="the family's own names",
                do="rename it or remove it: engines that read it by name do not find it",
            )


class _Judge:
    """Judges groups, and remembers what it has judged once."""

    def __init__(self, folder: Folder, model: Model, findings: Findings) -> None:
        self._folder, self._scheme, self._layout, self._findings = folder, model.scheme, model.layout, findings
        self._known: dict[tuple[Any, ...], list[Trouble]] = {}
        self._quantised: dict[str, Stored] = {}

    def group(self, key: Key, group: Group) -> None:
        assert self._layout is not None
        stack, index, _ = key
        layer, _ = self._layout.layer(stack, index)
        if layer is None:
            self._no_layer(stack, index, group)
            return
        pieces = [piece for piece in group.spelling.pieces if piece.target in layer.tensors]
        if not pieces:
            return
        fits: dict[Piece, tuple[Shape, ...]] = {}
        wrong: list[Stored] = []
        beyond: list[int] = []
        known: dict[tuple[str, Shape], bool] = {}
        for number, matrix in group.experts.items():
            piece = _piece_of(pieces, number, layer)
            if piece is None:
                beyond.append(number or 0)
                continue
            if piece not in fits:
                fits[piece] = self._shapes(piece, layer, number is not None)
            carrier = matrix.stored.get("weight")
            if len(matrix.stored) == 1 and carrier is not None:
                # As nearly all are: floats, of the shape that they should have.
                seen = carrier.dtype, carrier.shape
                if seen not in known:
                    known[seen] = self._plain_fits(piece, carrier, fits[piece][0])
                if known[seen]:
                    continue
            self._matrix(group.spelling, piece, matrix, fits[piece], wrong)
        if wrong:
            self._misshapen(wrong, group, pieces, layer, index)
        if beyond:
            self._beyond(beyond, group, layer)
        if len(group.experts) > 1:
            self._alike(group, pieces)

    def _no_layer(self, stack: Stack, index: int, group: Group) -> None:
        assert self._layout is not None
        routed = [piece for piece in group.spelling.pieces if "router." in piece.target or "experts." in piece.target]
        if not routed:
            return  # a dense MLP where the family has one beside its experts
        entries = [matrix.carrier for matrix in group.experts.values()]
        if index < self._layout.num_layers:
            got, want = f"layer {index} with experts", "a dense one, as config.json says"
        elif self._is_draft(index):
            return
        else:
            got, want = f"layer {index}", f"{self._layout.num_layers} layers, as config.json says"
        self._findings.add("contradiction", entries[0].file, _names(entries), got=got, want=want, do=OTHER_MODEL)

    def _is_draft(self, index: int) -> bool:
        """Whether the layer has what only draft layers have."""
        middle = f".{index}."
        return any(middle in name and any(m in name for m in DRAFT_MARKS) for name in self._folder.tensors)

    def _shapes(self, piece: Piece, layer: Layer, by_expert: bool) -> tuple[Shape, ...]:
        """The shape as floats, and the others that a quantised form may be of."""
        assert self._layout is not None
        whole = layer.tensors[piece.target]
        stored = stored_shape(piece, whole, layer.sizes, by_expert)
        found = [stored]
        if "transposed" in piece.ops or (self._layout.names.once_transposed and not by_expert and len(stored) == 3):
            found.append((*stored[:-2], stored[-1], stored[-2]))
        return tuple(found)

    def _plain_fits(self, piece: Piece, carrier: Stored, want: Shape) -> bool:
        return carrier.dtype in _dtypes(piece) and carrier.shape == want

    def _matrix(
        self, spelling: Spelling, piece: Piece, matrix: Matrix, shapes: tuple[Shape, ...], wrong: list[Stored]
    ) -> None:
        members = matrix.members
        kind = kind_of(members) if not piece.target.endswith("router.table") else None
        if kind is None:
            self._plain(piece, matrix, shapes, wrong)
            return
        self._quantised.setdefault(kind, matrix.carrier)
        signature = (kind, shapes, tuple(sorted(members.items())))
        troubles = self._known.get(signature)
        if troubles is None:
            each = [troubles_of(members, shape, self._scheme) for shape in shapes]
            troubles = self._known[signature] = next((found for found in each if not found), each[0])
        self._say(matrix, troubles, spelling)
        self._is_left(matrix, kind)

    def _say(self, matrix: Matrix, troubles: Iterable[Trouble], spelling: Spelling | None) -> None:
        carrier = matrix.carrier
        for trouble in troubles:
            entry = matrix.stored.get(trouble.end)
            name = entry.name if entry else _beside(carrier, trouble.end, matrix)
            file = entry.file if entry else carrier.file
            self._findings.add(trouble.kind, file, name, got=trouble.got, want=trouble.want, do=trouble.do)

    def _is_left(self, matrix: Matrix, kind: str) -> None:
        module = matrix.carrier.name.rpartition(".")[0]
        if self._scheme is not None and module in self._scheme.left:
            self._findings.add(
                "contradiction",
                matrix.carrier.file,
                matrix.carrier.name,
                got=f"{kind} weights of a module that quantization_config leaves as it was",
                want="floats",
                do="take config.json from where the tensors come from",
            )

    def _plain(self, piece: Piece, matrix: Matrix, shapes: tuple[Shape, ...], wrong: list[Stored]) -> None:
        carrier = matrix.stored.get("weight")
        if carrier is None:
            entry = matrix.carrier
            end = next(end for end, held in matrix.stored.items() if held is entry)
            want = "the weights that it belongs to"
            name = _beside(entry, "weight", matrix) if end != "bias" else entry.name
            self._findings.add("missing", entry.file, name, got=f"{end} alone", want=want, do=MEND)
            return
        dtypes = _dtypes(piece)
        if carrier.dtype not in dtypes:
            got, want = f"{carrier.dtype} {list(carrier.shape)}", f"{' or '.join(dtypes)} {list(shapes[0])}"
            do = "take the form's other tensors along, or export it as floats"
            self._findings.add("mistyped", carrier.file, carrier.name, got=got, want=want, do=do)
        elif carrier.shape not in (shapes if self._turns(piece) else shapes[:1]):
            wrong.append(carrier)
        for end, entry in matrix.stored.items():
            if end not in ("weight", "input_scale", "output_scale"):
                got = f"{end} beside {carrier.dtype} weights"
                do = "remove it, or take the quantised weights that it belongs to"
                self._findings.add("extra", entry.file, entry.name, got=got, want="floats alone", do=do)

    def _turns(self, piece: Piece) -> bool:
        assert self._layout is not None
        return self._layout.names.once_transposed and ".experts." in f".{piece.target}"

    def _misshapen(self, wrong: list[Stored], group: Group, pieces: list[Piece], layer: Layer, index: int) -> None:
        """All of a layer's: config and tensors contradict each other. Some: these are wrong."""
        piece = pieces[0]
        by_expert = None not in group.experts
        want = stored_shape(piece, layer.tensors[piece.target], layer.sizes, by_expert)
        is_router = "router." in piece.target
        kind = "router" if is_router else "contradiction" if len(wrong) == len(group.experts) else "misshapen"
        do = MEND if kind == "misshapen" else OTHER_MODEL
        for entry in wrong:
            got = f"shape {list(entry.shape)}"
            if entry.shape == want[::-1] and len(want) == 2:
                got, do = got + ", transposed", MEND
            if is_router and len(entry.shape) == len(want) and entry.shape[1:] == want[1:]:
                got = f"a router of {entry.shape[0]} classes, shape {list(entry.shape)}"
            said = f"{list(want)}, as config.json says"
            self._findings.add(kind, entry.file, entry.name, got=got, want=said, do=do)

    def _beyond(self, beyond: list[int], group: Group, layer: Layer) -> None:
        """Experts with numbers that the config does not have."""
        entries = [group.experts[number].carrier for number in beyond]
        held, count = len(group.experts), layer.sizes.experts
        kind = "contradiction" if set(group.experts) == set(range(held)) else "extra"
        got = f"{held} experts" if kind == "contradiction" else "an expert of that number"
        do = OTHER_MODEL if kind == "contradiction" else "remove it, or take the config.json that has it"
        want = f"{count}, as config.json says"
        self._findings.add(kind, entries[0].file, _names(entries), got=got, want=want, do=do)

    def _alike(self, group: Group, pieces: list[Piece]) -> None:
        """All experts of a layer in one form; those that the config leaves as they were apart."""
        if any(piece.experts != "routed" for piece in pieces):
            return
        forms = {number: self._form(matrix) for number, matrix in group.experts.items()}
        counts = Counter(forms.values())
        if len(counts) < 2:
            return
        usual = counts.most_common(1)[0][0]
        for number, form in forms.items():
            matrix = group.experts[number]
            carrier = matrix.carrier
            if form == usual or self._leaves(carrier):
                continue
            do = f"{MEND}; an expert that was left as it was must stand in quantization_config"
            self._findings.add("mistyped", carrier.file, carrier.name, got=form, want=f"{usual}, as its like", do=do)

    def _form(self, matrix: Matrix) -> str:
        kind = kind_of(matrix.members)
        return f"{kind} weights" if kind else f"{matrix.carrier.dtype} weights"

    def _leaves(self, carrier: Stored) -> bool:
        return self._scheme is not None and self._scheme.leaves(carrier.name.rpartition(".")[0])

    def coverage(self, groups: Mapping[Key, Group]) -> None:
        """Every canonical tensor of every layer, whole and once."""
        layout = self._layout
        assert layout is not None
        by_layer: dict[tuple[Stack, int], list[Group]] = {}
        for (stack, index, _), group in groups.items():
            by_layer.setdefault((stack, index), []).append(group)
        for place, layer in layout.layers.items():
            self._covered(place, layer, by_layer.get(place, []))
        for place, held in by_layer.items():
            draft, is_draft = layout.layer(*place)
            routed = any("experts." in piece.target for group in held for piece in group.spelling.pieces)
            if is_draft and draft is not None and routed:
                self._covered(place, draft, held)

    def _covered(self, place: tuple[Stack, int], layer: Layer, held: list[Group]) -> None:
        stack, index = place
        routed = [g for g in held if any(".experts." in f".{piece.target}" for piece in g.spelling.pieces)]
        if not routed:
            self._no_experts(stack, index, layer)
            return
        before = self._before(stack, index, held)
        for target in layer.tensors:
            halves: tuple[int | None, ...] = (0, 1) if target.rpartition(".")[2] in ("w13", "b13") else (None,)
            for half in halves:
                self._filled(before, layer, target, half, held)

    def _no_experts(self, stack: Stack, index: int, layer: Layer) -> None:
        """One finding for the layer, not one for each of its experts."""
        if not self._folder.whole:
            return  # they may be in a shard that was not read, which has a finding of its own
        assert self._layout is not None
        place = f"{self._layout.names.prefix}{stack.path}.{index}.{stack.inner}"
        dense = next((n for n in self._folder.tensors if n.startswith(place) and "gate_proj" in n), None)
        got = "no experts" + (f"; {plainly(dense)} in their place" if dense else "")
        want = f"{layer.sizes.experts} experts in this layer, as config.json says"
        kind = "contradiction" if dense else "missing"
        do = OTHER_MODEL if dense else "download the missing shards, or mend the export"
        self._findings.add(kind, CONFIG, place, got=got, want=want, do=do)

    def _before(self, stack: Stack, index: int, held: list[Group]) -> str:
        """What precedes the layer's names."""
        name = next(iter(held[0].experts.values())).carrier.name
        middle = f".{index}."
        assert self._layout is not None
        inner = self._layout.own.inner if stack is MTP else stack.inner
        return name[: name.index(middle) + len(middle)] + inner

    def _filled(self, before: str, layer: Layer, target: str, half: int | None, held: list[Group]) -> None:
        """One half of one tensor: by whom it is filled, and which experts are not."""
        routed = ".experts." in f".{target}" and target.rpartition(".")[2] in ("w13", "w1", "w2", "b13", "b1", "b2")
        fillers = [
            (group, piece)
            for group in held
            for piece in group.spelling.pieces
            if piece.target == target and piece.experts != "identity" and (half is None or piece.half in (None, half))
        ]
        if not fillers:
            self._missing(before, self._spelled(target, half, held), "no such tensor", held)
            return
        filled: dict[int | None, Matrix] = {}
        for group, piece in fillers:
            first = layer.sizes.experts if piece.experts == "second" else 0
            last = first + layer.sizes.experts
            for number, matrix in group.experts.items():
                expert = number if number is None else number - first
                if number is not None and not first <= number < last:
                    continue
                # The same expert, or all of them in one tensor.
                other = filled.get(expert) or filled.get(None)
                if other is None and expert is None:
                    other = next(iter(filled.values()), None)
                if other is not None:
                    _again(other.carrier, matrix.carrier, self._findings)
                filled.setdefault(expert, matrix)
        if not routed or None in filled:
            return
        experts = layer.sizes.experts
        gone = experts - len(filled)
        if not gone or not self._folder.whole:
            return
        group, piece = fillers[0]
        first = experts if piece.experts == "second" else 0
        names = [
            f"{before}{group.spelling.name.replace('{e}', str(first + expert))}"
            for expert in islice((e for e in range(experts) if e not in filled), FEW)
        ]
        like = next(iter(filled.values())).carrier
        if set(filled) == set(range(len(filled))) and gone > 1:
            got, want = f"{len(filled)} experts", f"{experts}, as config.json says"
            self._findings.add("contradiction", like.file, names, got=got, want=want, do=OTHER_MODEL, count=gone)
            return
        want = f"{like.dtype} {list(like.shape)}, as its like"
        do = "download the shard that has it, or mend the export"
        self._findings.add("missing", like.file, names, got="no such tensor", want=want, do=do, count=gone)

    def _spelled(self, target: str, half: int | None, held: list[Group]) -> str:
        """How the layer would call what it lacks: in the words of what it has."""
        assert self._layout is not None
        by_expert = any(group.spelling.by_expert for group in held)
        options = [
            spelling
            for spelling in self._layout.spellings
            if any(p.target == target and (half is None or p.half in (None, half)) for p in spelling.pieces)
        ]
        present = {_block(group.spelling.pattern) for group in held}
        best = sorted(options, key=lambda s: (_block(s.pattern) not in present, s.by_expert != by_expert))
        return best[0].name.replace("{e}", "0") if best else target

    def _missing(self, before: str, name: str, got: str, held: list[Group]) -> None:
        if not self._folder.whole:
            return
        file = next(iter(held[0].experts.values())).carrier.file
        do = "download the shard that has it, or mend the export"
        want = "it, as config.json says"
        self._findings.add("missing", file, before + name, got=got, want=want, do=do)

    def outside(self, stems: Outside) -> None:
        """What belongs to quantised weights that are none of the MoE layers'."""
        for held in stems.values():
            if len(held) == 1 and ("" in held or "weight" in held or "bias" in held):
                (entry,) = held.values()
                if entry.dtype in FLOATS:
                    continue
            matrix = Matrix(held)
            kind = kind_of(matrix.members)
            if kind is None:
                continue
            self._quantised.setdefault(kind, matrix.carrier)
            signature = (kind, None, tuple(sorted(matrix.members.items())))
            troubles = self._known.get(signature)
            if troubles is None:
                troubles = self._known[signature] = troubles_of(matrix.members, None, self._scheme)
            self._say(matrix, troubles, None)

    def scheme(self) -> None:
        """Whether config and tensors agree that the model is quantised."""
        found = next(iter(self._quantised.items()), None)
        if found and self._scheme is None:
            kind, entry = found
            self._findings.add(
                "contradiction",
                entry.file,
                entry.name,
                got=f"{kind} weights",
                want="floats, for config.json has no quantization_config",
                do="take config.json from where the tensors come from",
            )
        if not found and self._scheme is not None and self._scheme.kinds and self._folder.whole:
            self._findings.add(
                "contradiction",
                CONFIG,
                got=f"quantization_config of {self._scheme.method}, and no tensor in such a form",
                want=" or ".join(sorted(self._scheme.kinds)),
                do="take config.json from where the tensors come from",
            )


def _piece_of(pieces: list[Piece], number: int | None, layer: Layer) -> Piece | None:
    """What an expert's number is of; None for one that the layer has not."""
    if number is None:
        return pieces[0]
    experts = layer.sizes.experts
    for piece in pieces:
        first = 0 if piece.experts == "routed" else experts
        count = layer.sizes.identity if piece.experts == "identity" else experts
        if first <= number < first + count:
            return piece
    return None


def _dtypes(piece: Piece) -> tuple[str, ...]:
    return INTEGERS if piece.target.endswith("router.table") else FLOATS


def _block(pattern: str) -> str:
    return pattern.rpartition(".")[0]


def _names(entries: Iterable[Stored]) -> list[str]:
    return [entry.name for entry in entries]


def _beside(entry: Stored, end: str, matrix: Matrix) -> str:
    """The name of a tensor that is not there, of the matrix that the entry is of."""
    if end in OF_THE_WEIGHT:
        return f"{entry.name}.{end}"
    own = next(known for known, held in matrix.stored.items() if held is entry)
    stem = entry.name.removesuffix(own) if own and entry.name.endswith(own) else f"{entry.name}_"
    return f"{stem}{end}"
