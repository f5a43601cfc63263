"""Docstrings for mkdocstrings: the code's roles, such as :class:`EMA` and :math:`x^2`, become links and MathML."""

from __future__ import annotations

import re
from html import escape

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(class|func|meth|attr|mod|data|math):`([^`]+)`")
DISPLAY = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*|\n(?=\n?\1 +\S))*)", re.MULTILINE)
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)  # griffe takes the plural for doctests
# Called by Lightning, and of no use to a reader.
HOOKS = re.compile(r"on_\w+|setup|teardown|state_dict|load_state_dict|state_key|evaluate")
CODE = re.compile(r"(?<!:)::\n\n(?= {2,}\S)")


class Roles(griffe.Extension):
    """Rewrites the docstrings of a package once all of it is read, so that names can be looked up; hides hooks."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Rewrite every docstring of the package, and leave out what would be read twice or never."""
        superfluous: list[tuple[griffe.Object, str]] = []
        _rewrite(pkg, superfluous)
        for scope, name in superfluous:
            scope.del_member(name)


def _rewrite(scope: griffe.Object, superfluous: list[tuple[griffe.Object, str]]) -> None:
    if scope.docstring is not None:
        scope.docstring.value = translated(scope.docstring.value, scope)
    inherited = {name for base in _bases(scope) for name in base.members if not name.startswith("__")}
    for name, member in scope.members.items():
        if scope.is_class and (HOOKS.fullmatch(name) or name in inherited):
            superfluous.append((scope, name))
        elif not member.is_alias:
            _rewrite(member, superfluous)


def _bases(scope: griffe.Object) -> list[griffe.Class]:
    """Classes of this package that a class inherits from."""
    return scope.mro() if isinstance(scope, griffe.Class) else []


def translated(text: str, scope: griffe.Object) -> str:
    """A docstring with links for roles, and MathML for formulas."""
    text = DISPLAY.sub(lambda found: f"{found[1]}{_mathml(found[2], 'block')}", text)
    text = EXAMPLE.sub("Examples:", text)
    text = CODE.sub(":\n\n", text)
    return ROLE.sub(lambda found: _role(found[1], found[2], scope), text)


def _mathml(latex: str, display: str) -> str:
    return convert(" ".join(latex.split()).replace(r"\arg", r"\operatorname{arg}"), display=display)


def _role(kind: str, content: str, scope: griffe.Object) -> str:
    if kind == "math":
        return _mathml(content, "inline")
    target = content.lstrip("~")
    shown = target.rpartition(".")[2] if content.startswith("~") else target
    path = _path_of(target, scope)
    code = f"`{shown}`"
    return code if path is None else f'<autoref optional identifier="{escape(path)}"><code>{shown}</code></autoref>'


def _path_of(target: str, scope: griffe.Object) -> str | None:
    """Full path of a name as it is seen from an object; None where it is of another package."""
    if target.startswith("lightning_difftune"):
        return target
    here: griffe.Object | None = scope
    while here is not None:
        try:
            return here[target].canonical_path
        except (KeyError, griffe.AliasResolutionError, griffe.CyclicAliasError):
            pass
        if here.is_class and target.partition(".")[0] in (inherited := here.inherited_members):
            return inherited[target.partition(".")[0]].canonical_path
        here = here.parent
    return None
