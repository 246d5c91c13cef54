"""Jinja's syntax trees and syntax errors, read for prompts. Nodes carry their character offset as ``lineno``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from jinja2 import nodes


def explained(source: str, offset: int, message: str) -> tuple[int, str, str]:
    """Where a syntax error is, what it is, and what to write instead."""
    if message.startswith("Unexpected end of template") and (ends := re.findall(r"'end(\w+)'", message)):
        opened: list[re.Match[str]] = []
        tag, name = ends[-1], ""
        for match in re.finditer(rf"\{{#.*?#\}}|\{{%[-+]?\s*(end)?{tag}\b\s*(\w*)", source, re.DOTALL):
            if match[1]:
                del opened[-1:]
            elif match[2] is not None:
                opened.append(match)
        if opened:  # Of nested blocks, of which there should be none, the outermost is the one that was forgotten.
            first = opened[0 if tag == "block" else -1]
            offset, name = first.start(), f" {first[2]}" if tag == "block" else ""
        return offset, f"`{tag}{name}` is never closed", f"Write `{{% end{tag} %}}` where it ends"
    tag = max(("{{", "{%"), key=lambda opening: source.rfind(opening, 0, max(offset - 1, 0) + 1))
    got = source[max(offset - 1, 0) : offset + 2]
    if message.startswith("unexpected end of template") or got[1:2] == "}" or "{%" in got or "{{" in got:
        closing = "}}" if tag == "{{" else "%}"
        return offset, message, f"Write `{closing}` where the `{tag}` before it ends"
    return offset, message, "Correct the syntax"


def start(node: nodes.Node) -> int:
    """The offset of the first character of an expression."""
    if isinstance(node, nodes.Filter | nodes.Test | nodes.Getattr | nodes.Getitem | nodes.Call) and node.node:
        return start(node.node)
    return node.lineno if node.lineno is not None else start(next(node.iter_child_nodes()))


def says(part: nodes.Node) -> bool:
    """Whether it is more than space."""
    return not isinstance(part, nodes.TemplateData) or bool(part.data.strip())


def passed(node: nodes.Node) -> set[int]:
    """The offsets of columns that, where they are missing, are the value of ``node``: nothing is computed of them."""
    match node:
        case nodes.Getattr() | nodes.Getitem():
            return {node.lineno + 1}
        case nodes.Filter(name="default", args=others):
            return set().union(*map(passed, others))
        case nodes.CondExpr(expr1=one, expr2=nodes.Expr() as other):
            return passed(one) | passed(other)
    return set()


def asked(test: nodes.Node, scope: Mapping[str, str]) -> set[tuple[str, str]]:
    """Root and column of all that is there wherever ``test`` holds."""
    match test:
        case nodes.And(left=left, right=right):
            return asked(left, scope) | asked(right, scope)
        case nodes.Test(name="defined", node=column) | nodes.Not(node=nodes.Test(name="none", node=column)):
            match column:
                case (
                    nodes.Getattr(node=nodes.Name(name=name), attr=key)
                    | nodes.Getitem(node=nodes.Name(name=name), arg=nodes.Const(value=key))
                ):
                    return {(scope.get(name, ""), key)}
    return set()
