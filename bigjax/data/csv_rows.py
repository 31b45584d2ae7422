"""The user's CSV files with a header, read strictly: what is wrong is named by file and line."""

import csv
from collections.abc import Mapping, Sequence

from bigjax.experiment import UsageError

Rows = list[tuple[int, list[str]]]


def read_csv(path: str, columns: Sequence[str] | Mapping[str, str], *, flag: str = '') -> Rows:
    """Returns line number and the chosen columns of every row of a CSV file with a header.

    Args:
        path: the file.
        columns: names of columns, or {knob: name} where a knob chooses it.
        flag: how the user named the file; `--dataset=csv:PATH` by default.

    Raises:
        UsageError: the file is empty, not UTF-8 or not CSV, or a column or a value is missing.
    """
    flag = flag or f'--dataset=csv:{path}'
    names = list(columns.values()) if isinstance(columns, Mapping) else list(columns)
    rows = []
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            check_columns(header, columns, flag)
            places = [header.index(name) for name in names] if header else []
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise UsageError(
                        f'{flag}: line {reader.line_num} has {len(row)} values where the header '
                        f'has {len(header)}; quote values that hold commas or line ends'
                    )
                rows.append((reader.line_num, [row[place] for place in places]))
    except UnicodeDecodeError as error:
        raise UsageError(f'{flag}: {where_not_utf8(path)}; save it as UTF-8') from error
    except csv.Error as error:
        raise UsageError(f'{flag}: line {reader.line_num}: {error}') from error
    if not rows:
        raise UsageError(
            f'{flag}: the file has {"a header but no rows" if header else "nothing in it"}; it '
            f'needs a header with the columns {", ".join(names)}, and at least one row'
        )
    return rows


def check_columns(header: list[str], columns: Sequence[str] | Mapping[str, str], flag: str) -> None:
    """Raises UsageError where a column is not in the header of a file that has one."""
    named = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    for knob, name in named.items():
        if header and name not in header:
            free = next((column for column in header if column not in named.values()), header[0])
            way_out = f'; try --{knob}={free}' if isinstance(columns, Mapping) else ''
            raise UsageError(
                f'{flag}: no column {name!r}; the columns are {", ".join(header)}{way_out}'
            )


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
