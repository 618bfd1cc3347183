"""Writes the package of a new adapter: all of it, or nothing."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import moe_conformance
from moe_conformance import engine
from moe_conformance.catalogue.aliases import current
from moe_conformance.errors import UsageError
from moe_conformance.protocol.engine import Engine
from moe_conformance.protocol.stages import STAGES
from moe_conformance.running.discovery import registered
from moe_conformance.starter import stages as starter

TEMPLATES = Path(__file__).with_name("templates")
# Template -> where it goes, and whose names stand between @ and @.
FILES = {
    "pyproject.toml.in": "pyproject.toml",
    "README.md.in": "README.md",
    "known_failures.toml.in": "known_failures.toml",
    "test_conformance.py.in": "tests/test_conformance.py",
    "conformance.yml.in": ".github/workflows/conformance.yml",
}
# Names of engines; module and distribution names are derived from them.
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*")
_MODULES = {
    "Any": "typing",
    "Literal": "typing",
    "Mapping": "collections.abc",
    "Path": "pathlib",
    "Sequence": "collections.abc",
    "TYPE_CHECKING": "typing",
}


def new_engine(name: str, stages: Sequence[str], into: Path) -> Path:
    """Write the package and return its folder. Raises UsageError, and writes nothing, where that cannot be done."""
    stages = _checked(name, stages)
    module = module_name(name)
    folder = into / f"{name}-conformance"
    if not into.is_dir():
        raise UsageError(f"--into: got {into}, which is no folder; make it first")
    if folder.exists():
        raise UsageError(f"name: got {name!r}, but {folder} exists; take another name, or another folder by --into")
    words = {
        "NAME": name,
        "MODULE": module,
        "CLASS": class_name(name),
        "STAGES": " ".join(f"--stage {stage}" for stage in stages),
        "VERSION": moe_conformance.__version__,
    }
    files = {target: _filled(TEMPLATES / source, words) for source, target in FILES.items()}
    files[f"{module}/__init__.py"] = f'"""How moe-conformance calls {name}."""\n'
    files[f"{module}/adapter.py"] = adapter(name, stages)
    try:
        whole = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=into))
        try:
            for target, text in files.items():
                (whole / target).parent.mkdir(parents=True, exist_ok=True)
                (whole / target).write_text(text, encoding="utf-8")
            whole.chmod(0o755)  # mkdtemp's permissions are for the owner only
            whole.rename(folder)
        finally:
            shutil.rmtree(whole, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"--into: cannot write to {into}: {error}; name another folder") from error
    return folder


def module_name(name: str) -> str:
    """my-engine -> my_engine_conformance: the engine itself may be my_engine."""
    return f"{name.replace('-', '_')}_conformance"


def class_name(name: str) -> str:
    """my-engine -> MyEngineAdapter: a name that no import of the adapter's has."""
    return "".join(part[0].upper() + part[1:] for part in re.split("[-_]", name)) + "Adapter"


def _checked(name: str, stages: Sequence[str]) -> list[str]:
    """The stages in data order, each once."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"name: got {name!r}, want letters and digits, parts joined by - or _, beginning with a letter: my-engine"
        )
    # As indexes compare names of distributions.
    there = {known.lower().replace("_", "-"): target for known, target in registered().items()}
    if (target := there.get(name.lower().replace("_", "-"))) is not None:
        raise UsageError(f"name: got {name!r}, but {target.name} is registered, as {target.path}; take another name")
    module = module_name(name)
    if importlib.util.find_spec(module) is not None:
        raise UsageError(f"name: got {name!r}, but a package {module} is installed; take another name")
    for stage in current("stage", stages, STAGES):
        if stage not in starter.OFFERED:
            raise UsageError(
                f"stage: got {stage!r}, which no few lines can answer; want one of {', '.join(starter.OFFERED)}. "
                f"The package has a stub of each other stage: fill in that of {stage}, and declare it"
            )
    return [stage for stage in STAGES if stage in stages]


def _filled(template: Path, words: dict[str, str]) -> str:
    text = template.read_text(encoding="utf-8")
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    return text


def adapter(name: str, stages: Sequence[str]) -> str:
    """The text of adapter.py: working stages from `starter.stages`, stubs of the others in the protocol's own words."""
    declared = "\n".join(
        f'            "{stage}": frozenset({{{", ".join(map(_quoted, starter.OFFERED[stage]))}}}),' for stage in stages
    )
    stubs = list(_stubs(stages))
    helpers = [inspect.getsource(starter.Recorder)] * ("capture_session" in stages)
    parts = [
        f'''class {class_name(name)}(Engine):
    """Each stage that is declared below works, in plain torch: put a call of your engine in its place.

    `environment`, `missing`, `limits` and `ran` of Engine may be overridden, too.
    """

    name = "{name}"

    @property
    def info(self) -> EngineInfo:
        # The version is the engine's, not that of this package.
        return EngineInfo(self.name, "0", "cpu")

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        # What is not declared is not judged. `moe-conformance features STAGE` lists the words.
        return {{
{declared}
        }}
''',
        *(inspect.getsource(getattr(starter.Starter, stage)) for stage in stages),
        f"    # Stubs from here on. Fill one in, declare it in `capabilities`, and it is judged.\n{stubs[0]}",
        *stubs[1:],
    ]
    body = "\n\n".join([*helpers, "\n".join(parts)])
    head = f'"""How moe-conformance calls {name}."""\n\nfrom __future__ import annotations\n'
    return f"{head}\n{_imports(body)}\n\n{body}"


def _quoted(word: str) -> str:
    return f'"{word}"'


def _stubs(stages: Sequence[str]) -> Iterator[str]:
    """The stages of the protocol that are not among these, refused as not written."""
    for name, function in vars(Engine).items():
        refusal = f'_not_offered("{name}")'
        if inspect.isfunction(function) and refusal in (text := inspect.getsource(function)) and name not in stages:
            yield text.replace(refusal, f'Unsupported("{name}: not written yet")')


def _imports(body: str) -> str:
    """What the names in a module's text are imported from, in the order that ruff wants."""
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)} | {"TYPE_CHECKING"}
    modules: dict[str, list[str]] = {}
    for name in sorted(used & _MODULES.keys(), key=lambda name: (not name.isupper(), name.lower())):
        modules.setdefault(_MODULES[name], []).append(name)
    lines = [f"from {module} import {', '.join(names)}" for module, names in sorted(modules.items())]
    ours = [f"    {name}," for name in sorted(used & set(engine.__all__), key=str.lower)]
    lines += ["", "from moe_conformance.engine import (", *ours, ")"]
    return "\n".join([*lines, "", "if TYPE_CHECKING:", "    from torch import Tensor", ""])
