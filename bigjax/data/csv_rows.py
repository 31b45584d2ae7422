"""The user's CSV files with a header, read strictly: what is wrong is named by file and line."""

import contextlib
import csv
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from bigjax.data.user_files import listed
from bigjax.experiment import UsageError

# How files begin that hold tables, too, but are no text in UTF-8.
OTHER_KINDS = {
    b'\xff\xfe': 'is UTF-16',
    b'\xfe\xff': 'is UTF-16',
    b'PK\x03\x04': 'is a workbook or another zip archive',
    b'\x1f\x8b': 'is compressed by gzip',
}
OTHER_SEPARATORS = {'\t': 'tabs', ';': 'semicolons', '|': 'vertical bars'}

# Number of the line in which a row begins, and values.
Row = tuple[int, list[str]]
Rows = list[Row]


def first_text(row: Row) -> str:
    """Returns the first value of a row."""
    return row[1][0]


def read_csv(path: str, columns: Sequence[str] | Mapping[str, str], *, flag: str = '') -> Rows:
    """Returns line number and the chosen columns of every row of a CSV file with a header.

    Args:
        path: the file.
        columns: names of columns, or {knob: name} where a knob chooses it.
        flag: how the user named the file; `--dataset=csv:PATH` by default.

    Raises:
        UsageError: the file is empty, not UTF-8 or not CSV, or a column or a value is missing or
            there twice.
    """
    flag = flag or f'--dataset=csv:{path}'
    names = list(columns.values()) if isinstance(columns, Mapping) else list(columns)
    rows: Rows = []
    check_kind(path, flag)
    behind = 1
    try:
        with open(path, encoding='utf-8-sig', newline='') as file, fields_of_any_length():
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            check_columns(header, columns, flag)
            places = [header.index(name) for name in names] if header else []
            behind = reader.line_num + 1
            for row in reader:
                line, behind = behind, reader.line_num + 1
                if not row:
                    continue
                if len(row) != len(header):
                    raise UsageError(
                        f'{flag}: line {line} has {len(row)} values where the header '
                        f'has {len(header)}; quote values that hold commas or line ends'
                    )
                rows.append((line, [row[place] for place in places]))
    except UnicodeDecodeError as error:
        raise UsageError(f'{flag}: {where_not_utf8(path)}; save it as UTF-8') from error
    except csv.Error as error:
        raise UsageError(
            f'{flag}: line {reader.line_num}: {error}, in a row that begins in line {behind}; end '
            'each quoted value by a quote, and write "" for a quote inside it'
        ) from error
    if not rows:
        raise UsageError(
            f'{flag}: the file has {"a header but no rows" if header else "nothing in it"}; it '
            f'needs a header with the columns {", ".join(names)}, and at least one row'
        )
    return rows


@contextlib.contextmanager
def fields_of_any_length() -> Iterator[None]:
    """Lets `csv`, whose limit of 131072 letters is one for all readers, read longer values."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def check_kind(path: str, flag: str) -> None:
    """Raises UsageError where the first bytes of a file say that it is no text in UTF-8."""
    with open(path, 'rb') as file:
        begin = file.read(4)
    kinds = [kind for mark, kind in OTHER_KINDS.items() if begin.startswith(mark)]
    kinds += ['looks like UTF-16'] if b'\0' in begin else []
    if kinds:
        raise UsageError(f'{flag}: it {kinds[0]}; save it as CSV in UTF-8')


def check_columns(header: list[str], columns: Sequence[str] | Mapping[str, str], flag: str) -> None:
    """Raises UsageError where a column is not in the header of a file that has one, or not once."""
    named = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    there = listed(repr(c) if c != c.strip() or not c else c for c in header)
    if len(header) == 1 and header[0] not in named.values():
        for separator, name in OTHER_SEPARATORS.items():
            if separator in header[0]:
                raise UsageError(
                    f'{flag}: {name} stand between its columns where commas are needed; save it '
                    'with commas'
                )
    for knob, name in named.items():
        free = unnamed(header, name, named.values())
        way_out = f'; try --{knob}={shlex.quote(free[0])}' if free else ''
        if not isinstance(columns, Mapping):
            way_out = ''
        if header and name not in header:
            raise UsageError(f'{flag}: no column {name!r}; the columns are {there}{way_out}')
        if header.count(name) > 1:
            raise UsageError(
                f'{flag}: {header.count(name)} columns are named {name!r}; rename all but one'
            )
        other = next(other for other, column in named.items() if column == name)
        if other != knob:
            raise UsageError(
                f'--{knob}={name}: is --{other}, too; the columns are {there}{way_out}'
            )


def unnamed(header: list[str], name: str, taken: Iterable[str]) -> list[str]:
    """Returns the columns that `name` may stand for: not taken, those spelt alike first."""
    free = [c for c in header if c not in taken and c.strip().lower() not in ('', 'id', 'index')]
    return sorted(free, key=lambda column: column.strip().lower() != name.strip().lower())


def where_not_utf8(path: str) -> str:
    """Returns how many lines of a file are not UTF-8, and the first of them."""
    bad = []
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                bad.append(number)
    return f'{len(bad)} lines are not UTF-8, the first is line {bad[0] if bad else "?"}'
