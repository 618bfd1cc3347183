"""Writes what is derived from each record to a file in tests/families, for review.

`python tests/written_out.py [SLUG...]` writes them again. Configs, and how they are judged, come from the record; names
of tensors come from what transformers' own model saves, so that the record is compared with something it did not make.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_conformance.model.families.families import RECORDS
from moe_conformance.model.families.record import Record
from moe_conformance.suites.block.configs import plain, varied
from moe_conformance.suites.capture_shape.cases import captured
from moe_conformance.suites.describe.cases import of

FOLDER = Path(__file__).parent / "families"
# A layer's own number, and an expert's.
_LAYER = re.compile(r"(.*?(?:layers|blocks|block)\.)(\d+)(\..+)")
_EXPERT = re.compile(r"(experts\.(?:expert_)?)\d+(?=\.)")
# Tensors that have nothing to do with experts: towers other than the language model, and other parts of a layer.
_ELSEWHERE = re.compile(r"audio|vision_(?:tower|model|encoder)|visual|\bvit\b|attn|attention|mamba|conv|indexer|mtp")


def said(record: Record) -> Iterator[str]:
    """Every config that is judged, as its case has it, and what else the record says."""
    yield f"model types: {', '.join((record.model_type, *record.also))}"
    classes = filter(None, (record.tiny.model_class, record.tiny.text_class, record.published_config_class))
    yield f"checkpoints are of: {', '.join(classes)}"
    if record.sample:
        yield f"sample: {record.sample}"
    if record.names is not None:
        yield f"prefixes: {_json({'': record.names.prefix, **record.names.prefixes})}"
        if record.names.published:
            yield f"published otherwise: {_json(record.names.published)}"
        if record.names.once_transposed:
            yield "packed experts lie transposed where transformers 4 wrote them"
    if record.dead:
        yield f"dead: {', '.join(record.dead)}"
    for kind, case in of(record):
        named = f" {case.recipe['class']}" if "class" in case.recipe else ""
        names = f" names {', '.join(case['names'])}" if "names" in case.recipe else ""
        yield f"{case.id} ({kind}{', lenient' if case.lenient else ''}){named}{names}: {_json(case['keys'])}"
    for name in record.captured:
        yield f"{(case := captured(record, name)).id}: {_json(case['want'])}"
    if record.block is not None:
        whole = plain(record, record.block)
        blocks = {"": whole} | {f"-{name}": varied(whole, variant) for name, variant in record.variants.items()}
        for name, family in blocks.items():
            block = {key: value for key, value in vars(family.block).items() if key != "keys"}
            lenient = " lenient" if family.lenient else ""
            yield f"family-{record.slug}{name}{lenient} {_json(block)}: {_json(family.config)}"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def generic(names: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The names of all layers, with {l} for a layer's number and {e} for an expert's, and their shapes."""
    return {
        match[1] + "{l}" + _EXPERT.sub(r"\1{e}", match[3]): shape
        for name, shape in names.items()
        if (match := _LAYER.fullmatch(name)) and not _ELSEWHERE.search(name)
    }


def never_written(record: Record, real: Iterable[str]) -> Iterator[str]:
    """Names in a record that the real model does not write: spellings that are only read, and optional parts."""
    names = {line.split(" ")[1] for line in real if line.startswith(("hub ", "modules "))}
    for piece in record.names.pieces if record.names else ():
        if piece.experts == "identity" or not any(name.endswith(f"{{l}}.{piece.pattern}") for name in names):
            rest = " ".join(str(value) for name, value in vars(piece).items() if name != "pattern")
            yield f"not seen {piece.pattern} {rest}"


def real_names(hub: Path, modules: Path) -> Iterator[str]:
    """The tensors of the layers that the real model writes, in folders with the names of the hub and of its modules."""
    from safetensors import safe_open

    yield f"saved as: {json.loads((hub / 'config.json').read_text()).get('model_type', '')}"
    written: set[str] = set()
    for form, folder in (("hub", hub), ("modules", modules)):
        shapes: dict[str, tuple[int, ...]] = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(str(path), "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        for pattern, shape in sorted(generic(shapes).items()):
            if pattern not in written:
                written.add(pattern)
                yield f"{form} {pattern} {'x'.join(map(str, shape))}"


def saved(model_type: str, folder: Path) -> tuple[Path, Path]:
    """The tiny model of a family in both forms."""
    import tiny_models

    for form in ("hub", "modules"):
        tiny_models.build(model_type).save_pretrained(folder / form, save_original_format=form == "hub")
    return folder / "hub", folder / "modules"


def path_of(record: Record) -> Path:
    return FOLDER / f"{record.slug}.txt"


def main(slugs: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for record in RECORDS.values():
        if slugs and record.slug not in slugs:
            continue
        with tempfile.TemporaryDirectory() as name:
            names = list(real_names(*saved(record.model_type, Path(name)))) if record.names is not None else []
        found = [*said(record), *names, *never_written(record, names), ""]
        path_of(record).write_text("\n".join(found), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1:])
