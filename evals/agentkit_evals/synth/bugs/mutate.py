"""Faults in Python source: one change to the syntax tree each, written back as the smallest change to the text.

| kind | change |
|---|---|
| comparison | `==` and `!=`, `in` and `not in`, `is` and `is not` |
| boundary | `<` and `<=`, `>` and `>=` |
| operator | `+` and `-`, `*` and `/`, `//` and `/`, `&` and `|`, `<<` and `>>`, also in `+=` |
| boolean | `and` and `or` |
| condition | a condition is negated, or a `not` is dropped |
| constant | a number is one more or less, `True` and `False` |
| off-by-one | a bound of a slice or a `range` is one more or less |
| swapped-arguments | the first two arguments of a call |
| removed-branch | an `if` without `else`, an `elif` or an `else` |
| removed-return | a `return` with a value |
| removed-call | a call that is a statement |
| removed-assignment | an assignment to an attribute or an item |
| wrong-exception | the type of a raised or caught exception |
| wrong-default | the default of a parameter |
| wrong-name | a parameter is used in place of another |
| loop-control | `break` and `continue` |

Only the bodies and defaults of functions are changed; annotations, docstrings and f-strings stay.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

KINDS = (
    *("comparison", "boundary", "operator", "boolean", "condition", "constant", "off-by-one", "swapped-arguments"),
    *("removed-branch", "removed-return", "removed-call", "removed-assignment", "wrong-exception", "wrong-default"),
    *("wrong-name", "loop-control"),
)
_COMPARISONS: dict[type[ast.cmpop], tuple[str, str, str]] = {
    ast.Eq: ("comparison", "==", "!="),
    ast.NotEq: ("comparison", "!=", "=="),
    ast.In: ("comparison", "in", "not in"),
    ast.NotIn: ("comparison", "not in", "in"),
    ast.Is: ("comparison", "is", "is not"),
    ast.IsNot: ("comparison", "is not", "is"),
    ast.Lt: ("boundary", "<", "<="),
    ast.LtE: ("boundary", "<=", "<"),
    ast.Gt: ("boundary", ">", ">="),
    ast.GtE: ("boundary", ">=", ">"),
}
_OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
_EXCEPTIONS = {
    "ValueError": "TypeError",
    "TypeError": "ValueError",
    "KeyError": "IndexError",
    "IndexError": "KeyError",
    "AttributeError": "KeyError",
    "LookupError": "ValueError",
    "StopIteration": "ValueError",
    "NotImplementedError": "ValueError",
    "RuntimeError": "ValueError",
    "OSError": "ValueError",
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Mutation:
    """One fault: the whole text of the changed file, and where the change is."""

    kind: str
    line: int
    """Line of the change, from 1."""
    function: str
    """Qualified name of the function that has the fault."""
    docstring: str | None
    """Docstring of that function."""
    text: str


def mutations(source: str) -> Iterator[Mutation]:
    """Yield all faults of a module, in the order of the text.

    Raises:
        SyntaxError, ValueError: `source` is not a module.
    """
    data = source.encode()
    return filter(None, (_apply(data, fault) for fault in _faults(source)))


def drawn(source: str, rng: random.Random) -> Iterator[Mutation]:
    """Yield the faults of a module in random order, one of each (function, kind) before a second one."""
    data, rest = source.encode(), _faults(source)
    rng.shuffle(rest)
    while rest:
        seen: set[tuple[str, str]] = set()
        later = []
        for fault in rest:
            if (key := (fault.function, fault.kind)) in seen:
                later.append(fault)
            elif mutation := _apply(data, fault):
                seen.add(key)
                yield mutation
        rest = later


def _faults(source: str) -> list[_Fault]:
    found = _Module(source).faults(ast.parse(source))
    return sorted(found, key=lambda fault: (fault.start, fault.end, fault.kind, fault.new))


def _apply(data: bytes, fault: _Fault) -> Mutation | None:
    """Return the fault as a change of the text, or None if the new text is no Python."""
    text = (data[: fault.start] + fault.new.encode() + data[fault.end :]).decode()
    line = data.count(b"\n", 0, fault.start) + 1
    return Mutation(fault.kind, line, fault.function, fault.docstring, text) if _parses(text) else None


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


@dataclass(frozen=True, slots=True)
class _Fault:
    kind: str
    start: int  # byte offsets in the source
    end: int
    new: str
    function: str
    docstring: str | None


class _Module:
    def __init__(self, source: str) -> None:
        self.data = source.encode()
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr | ast.stmt) -> str:
        return self.data[self.start(node) : self.end(node)].decode()

    def faults(self, tree: ast.Module) -> Iterator[_Fault]:
        for function, name in _functions(tree):
            docstring = ast.get_docstring(function)
            parameters = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
            for node in _own_nodes(function):
                for kind, start, end, new in self.changes(node, function, parameters):
                    yield _Fault(kind, start, end, new, name, docstring)

    def changes(self, node: ast.AST, function: _Function, parameters: list[str]) -> Iterator[tuple[str, int, int, str]]:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
                kind, old, new = _COMPARISONS[type(op)]
                yield from self.between(kind, left, right, old, new)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS and not _is_text(left):
                yield from self.between("operator", left, right, *_OPERATORS[type(op)])
            case ast.AugAssign(target=target, op=op, value=value) if type(op) in _OPERATORS:
                old, new = _OPERATORS[type(op)]
                yield from self.between("operator", target, value, old + "=", new + "=")
            case ast.BoolOp(op=op, values=values):
                old, new = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                for left, right in itertools.pairwise(values):
                    yield from self.between("boolean", left, right, old, new)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield "condition", self.start(node), self.start(operand), ""
            case ast.Constant(value=bool() as value):
                yield "constant", self.start(node), self.end(node), str(not value)
            case ast.Constant(value=int() as value):
                for number in (value + 1, value - 1):
                    if number >= 0:
                        yield "constant", self.start(node), self.end(node), str(number)
            case ast.Slice(lower=lower, upper=upper):
                for bound in filter(None, (lower, upper)):
                    yield from self.off_by_one(bound)
            case ast.Break():
                yield "loop-control", self.start(node), self.end(node), "continue"
            case ast.Continue():
                yield "loop-control", self.start(node), self.end(node), "break"
            case ast.Return(value=value) if value is not None and not _is_none(value):
                yield "removed-return", self.start(node), self.end(node), "pass"
            case ast.Expr(value=ast.Call()):
                yield "removed-call", self.start(node), self.end(node), "pass"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield "removed-assignment", self.start(node), self.end(node), "pass"
            case ast.Raise(exc=exception) if exception is not None:
                yield from self.other_exception(exception.func if isinstance(exception, ast.Call) else exception)
            case ast.ExceptHandler(type=exception) if exception is not None:
                yield from self.other_exception(exception)
            case ast.Name(id=name, ctx=ast.Load()) if name in parameters and name not in ("self", "cls"):
                others = [other for other in parameters if other not in (name, "self", "cls")]
                for other in others[:2]:
                    yield "wrong-name", self.start(node), self.end(node), other
            case ast.If(test=test, body=body, orelse=orelse):
                yield from self.branches(node, body, orelse)
                if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
                    yield "condition", self.start(test), self.end(test), f"not ({self.text(test)})"
            case ast.While(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Constant):
                yield "condition", self.start(test), self.end(test), f"not ({self.text(test)})"
            case ast.Call(func=func, args=arguments):
                if isinstance(func, ast.Name) and func.id == "range" and arguments:
                    yield from self.off_by_one(arguments[-1 if len(arguments) < 3 else 1])
                if len(arguments) >= 2 and not any(isinstance(each, ast.Starred) for each in arguments[:2]):
                    first, second = arguments[:2]
                    middle = self.data[self.end(first) : self.start(second)].decode()
                    new = self.text(second) + middle + self.text(first)
                    if self.text(first) != self.text(second) and not isinstance(first, ast.GeneratorExp):
                        yield "swapped-arguments", self.start(first), self.end(second), new
        if node is function:
            for default in filter(None, (*function.args.defaults, *function.args.kw_defaults)):
                yield from self.other_default(default)

    def between(
        self, kind: str, left: ast.expr, right: ast.expr, old: str, new: str
    ) -> Iterator[tuple[str, int, int, str]]:
        """Yield the replacement of the operator `old` in the text between two operands."""
        gap = self.data[self.end(left) : self.start(right)].decode()
        words = r"\s+".join(re.escape(word) for word in old.split())
        pattern = rf"\b{words}\b" if old[0].isalpha() else re.escape(old)
        if (found := re.search(pattern, gap)) and "#" not in gap:
            start = self.end(left) + len(gap[: found.start()].encode())
            yield kind, start, start + len(found[0].encode()), new

    def off_by_one(self, bound: ast.expr) -> Iterator[tuple[str, int, int, str]]:
        match bound:
            case ast.Constant(value=int() as value) if not isinstance(value, bool):
                for other in (value + 1, value - 1):
                    yield "off-by-one", self.start(bound), self.end(bound), str(other)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)):
                yield "off-by-one", self.start(bound), self.end(bound), f"-{value + 1}"
            case ast.Name() | ast.Attribute() | ast.Call() | ast.Subscript() | ast.BinOp():
                for sign in "+-":
                    yield "off-by-one", self.start(bound), self.end(bound), f"{self.text(bound)} {sign} 1"

    def other_exception(self, exception: ast.expr) -> Iterator[tuple[str, int, int, str]]:
        if isinstance(exception, ast.Tuple):
            for each in exception.elts:
                yield from self.other_exception(each)
        elif isinstance(exception, ast.Name) and exception.id in _EXCEPTIONS:
            yield "wrong-exception", self.start(exception), self.end(exception), _EXCEPTIONS[exception.id]

    def other_default(self, default: ast.expr) -> Iterator[tuple[str, int, int, str]]:
        match default:
            case ast.Constant(value=bool() as value):
                yield "wrong-default", self.start(default), self.end(default), str(not value)
            case ast.Constant(value=int() as value):
                yield "wrong-default", self.start(default), self.end(default), str(value + 1)
            case ast.Constant(value=str() as value) if len(value) > 1:
                yield "wrong-default", self.start(default), self.end(default), repr(value[:-1])

    def branches(
        self, node: ast.If, body: list[ast.stmt], orelse: list[ast.stmt]
    ) -> Iterator[tuple[str, int, int, str]]:
        if orelse:
            yield "removed-branch", self.end(body[-1]), self.end(orelse[-1]), ""
        elif self.data.startswith(b"elif", self.start(node)):
            line = self.starts[node.lineno - 1]
            yield "removed-branch", line - 1, self.end(node), ""
        else:
            yield "removed-branch", self.start(node), self.end(node), "pass"


def _functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[_Function, str]]:
    """Yield every function of a module with its qualified name; not those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, _Function):
            yield node, prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from _functions(node, prefix)


def _own_nodes(function: _Function) -> Iterator[ast.AST]:
    """Yield the function and the nodes of its body, without annotations, decorators, docstrings and f-strings."""
    yield function
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    waiting: list[ast.AST] = [*reversed(body)]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.JoinedStr):
            continue
        children: Iterable[ast.AST] = ast.iter_child_nodes(node)
        if isinstance(node, _Function):
            children = node.body
        elif isinstance(node, ast.AnnAssign):
            children = filter(None, (node.value,))
        waiting += reversed(list(children))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def function_at(source: str, first: int, last: int) -> tuple[str, str | None]:
    """Return the qualified name and the docstring of the function around the lines `first` to `last`, or ("", None)."""
    for function, name in _functions(ast.parse(source)):
        assert function.end_lineno is not None
        if function.lineno <= first and last <= function.end_lineno:
            return name, ast.get_docstring(function)
    return "", None
