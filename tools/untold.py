"""Kinds of code whose mutants no judge of behaviour can tell: annotations and signatures, and the words of errors.

A suite asks that something is refused, not how it is put, so that engines may refuse in their own words. Nor can it
tell `is` from `==` where one object stands for equal values, nor an order of words where only equality was asked. No
line is named here: each rule is of a kind of code or of a kind of mutant.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cosmic_ray.work_item import WorkItem

Position = tuple[int, int]
Span = tuple[Position, Position]


def in_annotation(item: WorkItem) -> bool:
    """Nothing executes it: an annotation, or what stands between the parameters of a signature."""
    (mutation,) = item.mutations
    return _within(_annotations(mutation.module_path), tuple(mutation.start_pos))


def in_words(item: WorkItem) -> bool:
    """It is only said: in the arguments of a raise, in what a block that ends in a raise first puts into names, in what
    a handler that ends in a raise catches to say it anew, and in private functions that are called for nothing else.
    """
    (mutation,) = item.mutations
    return _within(_words(mutation.module_path), tuple(mutation.start_pos))


def compares_alike(item: WorkItem) -> bool:
    """`is` for `==`, or another order than equality between words, of which the legal ones are few."""
    (mutation,) = item.mutations
    _, _, names = mutation.operator_name.partition("ReplaceComparisonOperator_")
    before, _, after = names.partition("_")
    if before not in ("Eq", "NotEq"):
        return False
    if after in ("Is", "IsNot"):
        return (after == "Is") == (before == "Eq")
    return after in ("Lt", "LtE", "Gt", "GtE") and _within(
        _words_compared(mutation.module_path), tuple(mutation.start_pos)
    )


@cache
def _words_compared(file: Path) -> tuple[Span, ...]:
    return tuple(
        _span(node)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Compare)
        for side in [node.left, *node.comparators]
        if isinstance(side, ast.Constant) and isinstance(side.value, str)
    )


@cache
def _annotations(file: Path) -> tuple[Span, ...]:
    spans = []
    for node in ast.walk(ast.parse(file.read_text())):
        spans += [_span(part) for part in (getattr(node, "annotation", None), getattr(node, "returns", None)) if part]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            values = sorted(_span(value) for value in [*node.args.defaults, *node.args.kw_defaults] if value)
            ends = [(node.lineno, node.col_offset), *(end for _, end in values)]
            starts = [*(start for start, _ in values), (node.body[0].lineno, 0)]
            spans += zip(ends, starts, strict=True)
    return tuple(spans)


@cache
def _words(file: Path) -> tuple[Span, ...]:
    tree = ast.parse(file.read_text())
    spans = list(_said(tree))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("_")]
    while True:
        alone = [node for node in functions if _span(node) not in spans and _is_only_called(tree, node, spans)]
        if not alone:
            return tuple(spans)
        spans += [_span(node) for node in alone]


def _said(tree: ast.Module) -> Iterator[Span]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from (_span(part) for part in [*node.exc.args, *(word.value for word in node.exc.keywords)])
        if isinstance(node, ast.ExceptHandler) and node.type and isinstance(node.body[-1], ast.Raise):
            yield _span(node.type)
        blocks = [getattr(node, "body", []), getattr(node, "orelse", [])]
        for block in blocks if isinstance(node, ast.If | ast.ExceptHandler) else []:
            if block and isinstance(block[-1], ast.Raise):
                yield from (_span(part) for part in block[:-1] if isinstance(part, ast.Assign))


def _is_only_called(tree: ast.Module, function: ast.FunctionDef, spans: list[Span]) -> bool:
    start, end = _span(function)
    uses = [
        (node.lineno, node.col_offset)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == function.name)
        or (isinstance(node, ast.Attribute) and node.attr == function.name)
    ]
    return bool(uses) and all(_within(tuple(spans), use) or start <= use < end for use in uses)


def _span(node: ast.expr | ast.stmt) -> Span:
    return (node.lineno, node.col_offset), (node.end_lineno or node.lineno, node.end_col_offset or 0)


def _within(spans: tuple[Span, ...], position: Position) -> bool:
    return any(start <= position < end for start, end in spans)
