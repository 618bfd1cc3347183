"""Checks each matrix: the shape that its layer asks for, in one of the published forms, the same as its neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from moe_conformance.checkpoints.findings import Findings, Level
from moe_conformance.checkpoints.folder import CONFIG, Folder
from moe_conformance.checkpoints.forms import (
    CARRIERS,
    FLOATS,
    INTEGERS,
    Ends,
    Members,
    Trouble,
    either,
    kind_of,
    troubles_of,
)
from moe_conformance.checkpoints.headers import Stored
from moe_conformance.checkpoints.layout import stored_shape
from moe_conformance.checkpoints.model import OTHER_MODEL, Model
from moe_conformance.checkpoints.scheme import Kind
from moe_conformance.checkpoints.sorting import Group, Key, Matrix, Outside, again, beside
from moe_conformance.model.families.naming import Piece, Stack
from moe_conformance.model.specs import Shape
from moe_conformance.reference_impl.checkpoint.places import Layer

MEND = "mend the export"


class Judge:
    """Judges groups, and caches its judgements."""

    def __init__(self, folder: Folder, model: Model, usual: Ends, findings: Findings) -> None:
        """usual: ends of names that the checkpoint has."""
        self._folder, self._usual, self._findings = folder, usual, findings
        self._scheme, self._layout = model.scheme, model.layout
        self._known: dict[tuple[Any, ...], list[Trouble]] = {}
        self._quantised: dict[str, Stored] = {}
        self._left = frozenset(model.scheme.left if model.scheme else ())
        # Quantised by an unknown method.
        self._is_open = model.scheme is not None and not model.scheme.known

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
        wrong: list[Stored] = []
        beyond: list[int] = []
        shapes: dict[int, tuple[Shape, ...]] = {}
        # Dtypes and shapes that fit, by place of the piece: nearly every tensor has one of few.
        fitting: set[tuple[int, str, Shape]] = set()
        is_plain = True
        for number, matrix in group.experts.items():
            at = piece_of(pieces, number, layer)
            if at is None:
                beyond.append(number or 0)
                continue
            carrier = matrix.stored.get("weight")
            alone = carrier is not None and len(matrix.stored) == 1
            if alone and carrier is not None and (at, carrier.dtype, carrier.shape) in fitting:
                continue
            piece = pieces[at]
            if at not in shapes:
                shapes[at] = self._shapes(piece, layer, number is not None)
            if alone and carrier is not None and carrier.dtype in _dtypes(piece) and carrier.shape == shapes[at][0]:
                fitting.add((at, carrier.dtype, carrier.shape))
                continue
            is_plain = False
            self._matrix(piece, matrix, shapes[at], wrong)
        if wrong:
            self._misshapen(wrong, group, pieces, layer)
        if beyond:
            self._beyond(beyond, group, layer)
        if len(group.experts) > 1 and not (is_plain and len({dtype for _, dtype, _ in fitting}) == 1):
            self._alike(group, pieces)

    def _no_layer(self, stack: Stack, index: int, group: Group) -> None:
        assert self._layout is not None
        routed = [piece for piece in group.spelling.pieces if "router." in piece.target or "experts." in piece.target]
        if not routed:
            return  # a dense MLP where the family has one beside its experts
        entries = [matrix.carrier for matrix in group.experts.values()]
        if index < self._layout.num_layers:
            got, want = f"layer {index} with experts", "a dense one, as config.json says"
        else:
            # In the same words for all, so that they are one finding.
            got, want = "a layer beyond them", f"{self._layout.num_layers} layers, as config.json says"
        self._findings.add("contradiction", entries[0].file, _names(entries), got=got, want=want, do=OTHER_MODEL)

    def _shapes(self, piece: Piece, layer: Layer, by_expert: bool) -> tuple[Shape, ...]:
        """The shape as floats, and the others that a quantised form may be of."""
        assert self._layout is not None
        whole = layer.tensors[piece.target]
        stored = stored_shape(piece, whole, layer.sizes, by_expert)
        found = [stored]
        if "transposed" in piece.ops or (self._layout.names.once_transposed and not by_expert and len(stored) == 3):
            found.append((*stored[:-2], stored[-1], stored[-2]))
        return tuple(found)

    def _matrix(self, piece: Piece, matrix: Matrix, shapes: tuple[Shape, ...], wrong: list[Stored]) -> None:
        carriers = [matrix.stored[end] for end in CARRIERS if end in matrix.stored]
        if len(carriers) > 1:
            again(carriers[0], carriers[1], self._findings)
        members = matrix.members
        kind = self._kind(members) if not piece.target.endswith("router.table") else None
        if kind is None:
            if not self._is_open or matrix.carrier.dtype in FLOATS:
                self._plain(piece, matrix, shapes, wrong)
            return
        self._quantised.setdefault(kind, matrix.carrier)
        halves = piece.half is None and piece.target.endswith("w13")
        signature = (kind, shapes, halves, tuple(sorted(members.items())))
        troubles = self._known.get(signature)
        if troubles is None:
            each = [troubles_of(members, shape, self._scheme, self._usual, halves) for shape in shapes]
            troubles = self._known[signature] = next((found for found in each if not found), each[0])
        self._say(matrix, troubles)
        self._is_left(matrix, kind)

    def _kind(self, members: Members) -> Kind | None:
        return kind_of(members, self._scheme, self._usual)

    def _say(self, matrix: Matrix, troubles: Iterable[Trouble]) -> None:
        carrier = matrix.carrier
        for trouble in troubles:
            entry = matrix.stored.get(trouble.end)
            name = entry.name if entry else beside(carrier, trouble.end, matrix)
            file = entry.file if entry else carrier.file
            self._findings.add(trouble.kind, file, name, got=trouble.got, want=trouble.want, do=trouble.do)

    def _is_left(self, matrix: Matrix, kind: str) -> None:
        module = matrix.carrier.name.rpartition(".")[0]
        if module in self._left:
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
        if carrier is None and self._is_open:
            return  # its weights go by a name that is not known
        if carrier is None:
            entry = matrix.carrier
            end = next(end for end, held in matrix.stored.items() if held is entry)
            want = "the weights that it belongs to"
            carriers = [carrier for carrier in CARRIERS if carrier in self._usual and carrier != "weight"]
            name = beside(entry, next(iter(carriers), "weight"), matrix) if end != "bias" else entry.name
            self._findings.add("missing", entry.file, name, got=f"{end} alone", want=want, do=MEND)
            return
        dtypes = _dtypes(piece)
        if carrier.dtype not in dtypes:
            got, want = f"{carrier.dtype} {list(carrier.shape)}", f"{either(dtypes)} {list(shapes[0])}"
            do = "take the form's other tensors along, or export it as floats"
            self._findings.add("mistyped", carrier.file, carrier.name, got=got, want=want, do=do)
        elif carrier.shape not in (shapes if self._turns(piece) else shapes[:1]):
            wrong.append(carrier)
        for end, entry in matrix.stored.items():
            if end not in ("weight", "input_scale", "output_scale") and not self._is_open:
                got = f"{end} beside {carrier.dtype} weights"
                do = "remove it, or take the quantised weights that it belongs to"
                self._findings.add("extra", entry.file, entry.name, got=got, want="floats alone", do=do)

    def _turns(self, piece: Piece) -> bool:
        assert self._layout is not None
        return self._layout.names.once_transposed and ".experts." in f".{piece.target}"

    def _misshapen(self, wrong: list[Stored], group: Group, pieces: list[Piece], layer: Layer) -> None:
        """If all of a layer's are misshapen, config and tensors contradict each other; if some are, those are wrong."""
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
        """All experts of a layer must have one form, apart from those that the config leaves unquantised."""
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
            level: Level = "defect"
            if {form, usual} <= {f"{dtype} weights" for dtype in FLOATS}:
                # Every reader casts it: right, but for what rounding takes.
                do, level = "see that it is meant: engines round the experts of a layer to one dtype", "note"
            want = f"{usual}, as its like"
            self._findings.add("mistyped", carrier.file, carrier.name, got=form, want=want, do=do, level=level)

    def _form(self, matrix: Matrix) -> str:
        """What all experts of a layer have in common; of an unknown form, its dtype and shape."""
        kind = None if self._is_open else self._kind(matrix.members)
        carrier = matrix.carrier
        if kind is None:
            return f"{carrier.dtype} {list(carrier.shape)}" if self._is_open else f"{carrier.dtype} weights"
        return f"{kind} weights"

    def _leaves(self, carrier: Stored) -> bool:
        return self._scheme is not None and self._scheme.leaves(carrier.name.rpartition(".")[0])

    def outside(self, stems: Outside) -> None:
        """Quantised weights outside the MoE layers."""
        for held in stems.values():
            if len(held) == 1 and ("" in held or "weight" in held or "bias" in held):
                (entry,) = held.values()
                if entry.dtype in FLOATS:
                    continue
            matrix = Matrix(held)
            kind = self._kind(matrix.members)
            if kind is None:
                continue
            self._quantised.setdefault(kind, matrix.carrier)
            signature = (kind, None, tuple(sorted(matrix.members.items())))
            troubles = self._known.get(signature)
            if troubles is None:
                troubles = self._known[signature] = troubles_of(matrix.members, None, self._scheme, self._usual)
            self._say(matrix, troubles)

    def scheme(self) -> None:
        """Whether config and tensors agree that the model is quantised."""
        found = next(iter(self._quantised.items()), None)
        if self._scheme is not None and not self._scheme.known:
            self._findings.add(
                "no-form",
                CONFIG,
                got=f"quantization_config of {self._scheme.method}",
                want="a form that is known",
                do="judged without its scales: what belongs to its weights was not looked at",
                level="note",
            )
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
                want=either(sorted(self._scheme.kinds)),
                do="take config.json from where the tensors come from",
            )


def piece_of(pieces: list[Piece], number: int | None, layer: Layer) -> int | None:
    """What an expert's number is of; None for one that the layer has not."""
    experts = layer.sizes.experts
    if number is None or (number < experts and pieces[0].experts == "routed"):
        return 0
    for at, piece in enumerate(pieces):
        first = 0 if piece.experts == "routed" else experts
        count = layer.sizes.identity if piece.experts == "identity" else experts
        if first <= number < first + count:
            return at
    return None


def _dtypes(piece: Piece) -> tuple[str, ...]:
    return INTEGERS if piece.target.endswith("router.table") else FLOATS


def _names(entries: Iterable[Stored]) -> list[str]:
    return [entry.name for entry in entries]
