"""Labelled words, answered questions and docstrings, read off Python source by its own parser."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

# Longer lines are left out of the labelled ones: they are tables, not statements.
MOST_WORDS = 80
# Characters of a page that questions are asked about, and of an answer.
PAGE, LONGEST_ANSWER = 1500, 200
SKIPPED = {
    tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip
RETURNS = re.compile(r'\b[Rr]eturns?\s+(?P<answer>[^\s:].*?)(?=\.(?:\s|$)|;|\n\s*\n|$)', re.DOTALL)
RAISES = re.compile(
    r'\b[Rr]aises?\s+(?:an?\s+|the\s+)?(?P<answer>\w+(?:Error|Exception|Warning))\b'
)

Place = tuple[int, int]


class Line(NamedTuple):
    """A logical line: its words, and a label `O`, `B-TYPE` or `I-TYPE` for each."""

    words: list[str]
    labels: list[str]


class Question(NamedTuple):
    """A question about a text, and where in it the answer begins, in characters."""

    context: str
    question: str
    answer: str
    start: int


def labelled_lines(source: bytes) -> Iterator[Line]:
    """Yields the logical lines of a file that name something.

    Labelled are dotted names: of a module that is imported, a function (or class) that is called,
    an exception that is raised or caught, a class that is derived from; and the name of a parameter
    where it is declared. What is not Python gives nothing.
    """
    try:
        spans = {start: (end, kind) for start, end, kind in named_spans(ast.parse(source))}
        tokens = list(tokenize.tokenize(io.BytesIO(source).readline))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return
    words: list[str] = []
    labels: list[str] = []
    end, kind = (0, 0), ''
    in_from = False
    for token in tokens:
        if token.type == tokenize.NEWLINE:
            if len(words) <= MOST_WORDS and any(label != 'O' for label in labels):
                yield Line(words, labels)
            words, labels, in_from = [], [], False
        elif token.type not in SKIPPED:
            place = token.start[0], len(token.line[: token.start[1]].encode())
            if not words and token.string == 'from':
                in_from = True
            elif in_from:
                # The tree does not say where the module of a `from` stands.
                in_from = token.string != 'import'
                if in_from:
                    before = labels[-1]
                    words.append(token.string)
                    labels.append('B-module' if before == 'O' else 'I-module')
                    continue
            if place in spans:
                end, kind = spans[place]
                labels.append(f'B-{kind}')
            else:
                labels.append(f'I-{kind}' if place < end else 'O')
            words.append(token.string)


def named_spans(tree: ast.AST) -> Iterator[tuple[Place, Place, str]]:
    """Yields where names worth a label begin and end: (line, byte in it)."""

    def span(node: ast.AST | None, kind: str) -> Iterator[tuple[Place, Place, str]]:
        for one in node.elts if isinstance(node, ast.Tuple) else (node,):
            target = one.func if isinstance(one, ast.Call) and kind == 'exception' else one
            if is_dotted(target):
                # Only a node that was made by hand, not parsed, does not know its end.
                assert target.end_lineno is not None
                assert target.end_col_offset is not None
                start = target.lineno, target.col_offset
                yield start, (target.end_lineno, target.end_col_offset), kind

    # Later ones overwrite: an exception that is raised is also a class that is called.
    order = {ast.Call: 0, ast.Import: 1, ast.ClassDef: 1, ast.arg: 1, ast.Raise: 2,
             ast.ExceptHandler: 2}  # fmt: skip
    nodes = [node for node in ast.walk(tree) if type(node) in order]
    for node in sorted(nodes, key=lambda node: order[type(node)]):
        match node:
            case ast.Call():
                yield from span(node.func, 'function')
            case ast.Import():
                for name in node.names:
                    width = len(name.name.encode())
                    start = name.lineno, name.col_offset
                    yield start, (start[0], start[1] + width), 'module'
            case ast.ClassDef():
                for base in node.bases:
                    yield from span(base, 'class')
            case ast.arg():
                start = node.lineno, node.col_offset
                yield start, (start[0], start[1] + len(node.arg.encode())), 'parameter'
            case ast.Raise():
                yield from span(node.exc, 'exception')
            case ast.ExceptHandler():
                yield from span(node.type, 'exception')


def is_dotted(node: ast.AST | None) -> TypeGuard[ast.Attribute | ast.Name]:
    """Returns whether an expression is a name, or names joined by dots."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def questions(source: bytes) -> Iterator[Question]:
    """Yields what the docstrings of a file answer: what a function returns, what it raises.

    A page is the descriptions of consecutive functions, each under its name. A function that stands
    twice on a page is asked nothing about.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    documented = [(node.name, ast.get_docstring(node) or '') for node in sorted(
        functions, key=lambda node: node.lineno)]  # fmt: skip
    page: list[tuple[str, str]] = []
    for name, text in [*((n, t) for n, t in documented if t), ('', ' ' * PAGE)]:
        if page and sum(len(t) for _, t in page) + len(text) > PAGE:
            yield from page_questions(page)
            page = []
        page.append((name, text))


def docstrings(source: bytes) -> Iterator[str]:
    """Yields the docstrings of a file: its own, and those of its classes and functions."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield text


def page_questions(page: list[tuple[str, str]]) -> Iterator[Question]:
    """Yields the questions that one page of (name, docstring) answers."""
    names = [name for name, _ in page]
    context, starts = '', []
    for name, text in page:
        context += f'{name}\n'
        starts.append(len(context))
        context += f'{text}\n\n'
    for (name, text), start in zip(page, starts, strict=True):
        if names.count(name) > 1:
            continue
        for verb, pattern in (('return', RETURNS), ('raise', RAISES)):
            found = pattern.search(text)
            if found and len(found['answer']) <= LONGEST_ANSWER:
                place = start + found.start('answer')
                yield Question(context, f'What does {name} {verb}?', found['answer'], place)
