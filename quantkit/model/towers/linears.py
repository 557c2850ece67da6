"""The linear layers of towers, and which of them may be quantized.

Letters: O out features, I in features.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

from torch import nn

from quantkit.model.names import NameMap
from quantkit.model.refs import WeightRef

Chains = tuple[tuple[str, ...], ...]
_READ = "its layer's code reads this weight itself"
_COMPUTED = "transformers computes this weight on loading"
# Code of which no part reads a layer's weight for what it computes: torch's, and what loads models.
_MACHINERY = ("torch.", "transformers.modeling_utils")
# Methods that are done before weights are replaced.
_FIRST = ("__init__", "_init_weights")


def tower_weights(model: Any, names: NameMap, paths: tuple[str, ...]) -> tuple[WeightRef, ...]:
    """The matrices among the parameters at `paths`; those with `kept` must stay as they are.

    A layer whose weight other code than its own reads would not run without one: torch's
    attention, and what a class around it names in its source.
    """
    found = []
    known: dict[type, Chains] = {}
    wanted = {path for path in paths if path.endswith(".weight")}
    for path in sorted(wanted):
        module = model.get_submodule(path.removesuffix(".weight"))
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or weight is None or weight.dim() != 2:
            continue
        for piece in names.of(path):
            whole = len(names.of(path)) == 1 and not (piece.opaque or piece.transposed)
            kept = None if whole and piece.name.endswith(".weight") else _COMPUTED
            if kept is None and _is_read(model, path.removesuffix(".weight"), known):
                kept = _READ
            found.append(
                WeightRef(
                    name=piece.name,
                    block=None,
                    shape=(weight.shape[0], weight.shape[1]),
                    parameter=path,
                    input=path,
                    role="linear" if kept is None else "read",
                    kept=kept,
                )
            )
    return tuple(found)


def _is_read(model: Any, path: str, known: dict[type, Chains]) -> bool:
    """Whether code outside of a linear layer reads its weight; `known` are classes' chains."""
    module = model.get_submodule(path)
    if type(module) is not nn.Linear:
        # A subclass may do anything with it.
        return True
    parts = path.split(".")
    for end in range(len(parts)):
        around = model.get_submodule(".".join(parts[:end]))
        if isinstance(around, nn.MultiheadAttention):
            return True
        kind = type(around)
        if kind not in known:
            known[kind] = _chains(kind)
        if any(_fits(chain, parts[end:]) for chain in known[kind]):
            return True
    return False


def _fits(chain: tuple[str, ...], path: list[str]) -> bool:
    """Whether a chain of names that ends in a weight can mean the layer at a path from there.

    One that begins with self means the whole path, any other its end; "*" is any number.
    """
    names = chain[1:] if chain[0] == "self" else chain
    if len(names) > len(path) or (chain[0] == "self" and len(names) < len(path)):
        return False
    tail = path[len(path) - len(names) :]
    return all(a in (b, "*") for a, b in zip(names, tail, strict=True))


def _chains(kind: type) -> Chains:
    """What a class's own code reads weights of: ("self", "blocks", "0", "mlp", "fc2")."""
    found = []
    for ancestor in kind.__mro__:
        if ancestor is object or ancestor.__module__.startswith(_MACHINERY):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(ancestor)))
        except (OSError, TypeError, SyntaxError):
            continue
        methods = [
            node
            for top in tree.body
            for node in getattr(top, "body", ())
            if isinstance(node, ast.FunctionDef) and node.name not in _FIRST
        ]
        for method in methods:
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and node.attr == "weight":
                    found.append(_names(node.value))
    return tuple(dict.fromkeys(chain for chain in found if len(chain) > (chain[:1] == ("self",))))


def _names(node: ast.expr) -> tuple[str, ...]:
    """The chain of names and numbers of an expression, from where it can be told."""
    if isinstance(node, ast.Attribute):
        return (*_names(node.value), node.attr)
    if isinstance(node, ast.Subscript):
        index = node.slice.value if isinstance(node.slice, ast.Constant) else "*"
        return (*_names(node.value), str(index))
    if isinstance(node, ast.Name) and node.id == "self":
        return ("self",)
    return ()
