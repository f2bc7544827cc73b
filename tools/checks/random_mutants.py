"""Random mutants of Python source, drawn by syntax.

The sites are the statements within functions. A statement has several mutants of several kinds; drawing is uniform over
statements, then over the kinds of a statement, then over its mutants of that kind. The order is a function of the seed
and of the sources. Not mutated: docstrings, annotations, strings, `raise` and `assert`, arguments of errors and
warnings, logging and printing, code of `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

KINDS = ("comparison", "constant", "operator", "branch", "off by one", "dropped")
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
OUTPUT_FUNCTIONS = {"print", "warn", "debug", "info", "warning", "error", "exception", "critical", "log_once"}
TYPE_FUNCTIONS = {"cast", "TypeVar"}
Replacement = tuple[str, ast.AST, ast.AST]  # kind, node, changed node


class Site(NamedTuple):
    """A statement within a function."""

    file: str
    function: str  # qualified name
    number: int  # among the statements of the file
    line: int


class Mutant(NamedTuple):
    """One changed expression or statement."""

    file: str
    function: str
    kind: str
    line: int
    column: int
    before: str
    after: str
    source: str  # of the file with the change


class Statements:
    """The statements within functions of one source file, and their mutants."""

    def __init__(self, file: str, source: str) -> None:
        self._file = file
        self._source = source.encode()  # columns of `ast` are bytes
        self._starts = [0]
        for line in self._source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._tree = ast.parse(source)
        self._dump = ast.dump(self._tree)
        self._code_lines = code_lines(source, file)
        self._statements = list(_statements(self._tree))
        self.sites = [
            Site(file, function, index, self._line(statement, statement))
            for index, (function, statement) in enumerate(self._statements)
        ]

    def mutants(self, site: Site) -> list[Mutant]:
        """Return all mutants of a statement."""
        mutants = [self.mutant(site, *replacement) for replacement in self.replacements(site)]
        return [mutant for mutant in mutants if mutant is not None]

    def replacements(self, site: Site) -> list[Replacement]:
        """Return the changes of a statement, not all of which may compile."""
        return list(_replacements(self._statements[site.number][1]))

    def mutant(self, site: Site, kind: str, node: ast.AST, changed: ast.AST) -> Mutant | None:
        """Return the source with a changed node; None if it does not compile, or is the same code."""
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None and node.end_col_offset is not None
        first = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        after = ast.unparse(ast.fix_missing_locations(changed))
        source = (self._source[:first] + after.encode() + self._source[end:]).decode()
        try:
            tree = ast.parse(source)
            compile(source, self._file, "exec")
        except SyntaxError:
            return None
        if ast.dump(tree) == self._dump:
            return None
        return Mutant(
            file=self._file,
            function=site.function,
            kind=kind,
            line=self._line(node, self._statements[site.number][1]),
            column=node.col_offset,
            before=self._source[first:end].decode(),
            after=after,
            source=source,
        )

    def _line(self, node: ast.expr | ast.stmt, statement: ast.stmt) -> int:
        """Return the node's first line, or its statement's if no code belongs to that of the node."""
        return node.lineno if node.lineno in self._code_lines else statement.lineno


def draw(
    sources: Mapping[str, str],
    seed: int,
    is_drawn: Callable[[Site], bool] = lambda site: True,
    is_selected: Callable[[Mutant], bool] = lambda mutant: True,
) -> Iterator[Mutant]:
    """Yield at most one mutant per statement, in random order.

    `is_drawn` and `is_selected` leave out statements and mutants; they do not change the order of the others.
    """
    files = {file: Statements(file, sources[file]) for file in sorted(sources)}
    sites = [site for statements in files.values() for site in statements.sites]
    random.Random(seed).shuffle(sites)
    for site in sites:
        if is_drawn(site):
            mutant = _draw_one(files[site.file], site, random.Random(f"{seed} {site.file} {site.number}"), is_selected)
            if mutant is not None:
                yield mutant


def _draw_one(
    statements: Statements, site: Site, choice: random.Random, is_selected: Callable[[Mutant], bool]
) -> Mutant | None:
    by_kind: dict[str, list[Replacement]] = {}
    for replacement in statements.replacements(site):
        by_kind.setdefault(replacement[0], []).append(replacement)
    while by_kind:
        kind = choice.choice(sorted(by_kind))
        replacement = choice.choice(by_kind[kind])
        mutant = statements.mutant(site, *replacement)
        if mutant is not None and is_selected(mutant):
            return mutant
        by_kind[kind].remove(replacement)
        if not by_kind[kind]:
            del by_kind[kind]
    return None


def code_lines(source: str, file: str) -> set[int]:
    """Return the lines to which bytecode belongs."""
    codes = [compile(source, file, "exec")]
    lines: set[int] = set()
    while codes:
        code = codes.pop()
        lines.update(line for _, _, line in code.co_lines() if line)
        codes += [constant for constant in code.co_consts if isinstance(constant, type(code))]
    return lines


def _statements(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """Yield (qualified name of the function, statement) of all statements within functions."""

    def visit(node: ast.AST, names: tuple[str, ...], in_function: bool) -> Iterator[tuple[str, ast.stmt]]:
        for name, value in ast.iter_fields(node):
            if name == "body" and _is_type_checking(node):
                continue
            for child in value if isinstance(value, list) else ():
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from visit(child, (*names, child.name), True)
                elif isinstance(child, ast.ClassDef):
                    yield from visit(child, (*names, child.name), False)
                elif isinstance(child, ast.stmt):
                    if in_function:
                        yield ".".join(names), child
                    yield from visit(child, names, in_function)
                elif isinstance(child, ast.ExceptHandler | ast.match_case):
                    yield from visit(child, names, in_function)

    yield from visit(tree, (), False)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _replacements(statement: ast.stmt) -> Iterator[Replacement]:
    """Yield the mutants of a statement; of a compound one, those of its header."""
    match statement:
        case ast.Raise() | ast.Assert() | ast.Import() | ast.ImportFrom() | ast.Global() | ast.Nonlocal():
            return
        case ast.Expr(value=ast.Constant()):  # a docstring
            return
        case ast.Expr(value=ast.Call() as call):
            if _is_output(call):
                return
            yield "dropped", statement, ast.Pass()
        case ast.AugAssign(target=target, op=op, value=value):
            yield "dropped", statement, ast.Assign([target], value, lineno=statement.lineno)
            yield "dropped", statement, ast.Pass()
            if type(op) in OPERATORS:
                yield "operator", statement, ast.AugAssign(target, OPERATORS[type(op)](), value)
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return
        case ast.If(test=test):
            if _is_type_checking(statement):
                return
            yield "branch", test, ast.UnaryOp(ast.Not(), test)
            if not isinstance(test, ast.Constant):
                yield "branch", test, ast.Constant(False)
    for name, value in ast.iter_fields(statement):
        if name in ("annotation", "type_comment", "decorator_list", "returns", "args", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.expr | ast.withitem):
                yield from _in_expression(child)


def _in_expression(node: ast.AST) -> Iterator[Replacement]:
    match node:
        case ast.JoinedStr() | ast.Lambda(body=ast.Constant(value=str())):
            return
        case ast.Call() if _is_output(node) or _is_error(node):
            return
        case ast.Call(func=ast.Name(id=name)) if name in TYPE_FUNCTIONS:
            return
        case ast.Call(func=ast.Name(id="range"), args=arguments):
            for argument in arguments:
                yield from _off_by_one(argument)
            return
        case ast.Subscript(value=value, slice=index):
            yield from _in_expression(value)
            for bound in index.elts if isinstance(index, ast.Tuple) else [index]:
                yield from _in_index(bound)
            return
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for position, op in enumerate(ops):
                changed = [*ops[:position], COMPARISONS[type(op)](), *ops[position + 1 :]]
                yield "comparison", node, ast.Compare(left, changed, comparators)
        case ast.BoolOp(op=op, values=values):
            yield "operator", node, ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS and not _has_text(node):
            yield "operator", node, ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield "operator", node, operand
        case ast.IfExp(test=test):
            yield "branch", test, ast.UnaryOp(ast.Not(), test)
        case ast.comprehension(ifs=conditions):
            for condition in conditions:
                yield "branch", condition, ast.UnaryOp(ast.Not(), condition)
        case ast.Constant(value=bool(value)):
            yield "constant", node, ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield "constant", node, ast.Constant(value + 1)
    for child in ast.iter_child_nodes(node):
        yield from _in_expression(child)


def _in_index(node: ast.expr) -> Iterator[Replacement]:
    """Yield the mutants of an index or slice; a name may be a key and is not changed."""
    match node:
        case ast.Slice(lower=lower, upper=upper, step=step):
            for bound in (lower, upper):
                if bound is not None:
                    yield from _off_by_one(bound)
            if step is not None:
                yield from _in_expression(step)
        case ast.Constant(value=int()) | ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int())):
            yield from _off_by_one(node)
        case ast.BinOp(op=ast.Add() | ast.Sub()) if not _has_text(node):
            yield from _off_by_one(node)
        case _:
            yield from _in_expression(node)


def _off_by_one(node: ast.expr) -> Iterator[Replacement]:
    match node:
        case ast.Starred() | ast.Constant(value=None | str() | bool()):
            yield from _in_expression(node)
        case ast.Constant(value=int(value)):
            yield "off by one", node, ast.Constant(value + 1)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            changed = ast.Constant(0) if value == 1 else ast.UnaryOp(ast.USub(), ast.Constant(value - 1))
            yield "off by one", node, changed
        case _:
            yield "off by one", node, ast.BinOp(copy.deepcopy(node), ast.Add(), ast.Constant(1))
            yield from _in_expression(node)


def _is_output(call: ast.Call) -> bool:
    """Return whether a call logs, prints or warns."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name in OUTPUT_FUNCTIONS or name.startswith("log_")
    return False


def _is_error(call: ast.Call) -> bool:
    """Return whether a call constructs an exception."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.endswith(("Error", "Exception", "Warning"))
    return False


def _has_text(node: ast.AST) -> bool:
    """Return whether one of the operands is a string."""
    match node:
        case ast.BinOp(left=left, right=right):
            return _has_text(left) or _has_text(right)
        case ast.Constant(value=str()) | ast.JoinedStr():
            return True
    return False
