"""Rules of the house that no linter knows: who may touch what, and how long files may be."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(
    file
    for folder in ('', 'bigjax', 'experiments', 'pallas_kernels', 'tests')
    for file in (ROOT / folder).glob('**/*.py' if folder else '*.py')
)
NAMES = [str(file.relative_to(ROOT)) for file in CODE]
BUDGETS = {'launch.py': 120, 'bigjax/train.py': 250, 'experiments': 110, 'tests': 400, '': 300}
SETTINGS = ('launch.py', 'tests/conftest.py')
SINGLE_DEVICE = ('bigjax/models/', 'bigjax/nn/')


def budget(name):
    return next(lines for part, lines in BUDGETS.items() if name.startswith(part))


def imported(tree):
    """Returns every module a file imports, with the names taken out of it, dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def settings_touched(tree):
    """Returns lines that change JAX's configuration or the environment."""
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Call | ast.Assign | ast.Delete) else ''
        if re.match(
            r'jax\.config\.(update\(|\w+ = )|os\.environ\[.*\] = |del os\.environ'
            r'|os\.environ\.(update|setdefault|pop|clear)\(|os\.(putenv|unsetenv)\(',
            text,
        ):
            yield f'line {node.lineno}: {text}'


@pytest.mark.parametrize('name', NAMES)
def test_file_keeps_the_rules(name):
    text = (ROOT / name).read_text('utf-8')
    tree = ast.parse(text)
    lines = text.count('\n')
    assert lines <= budget(name), f'{name} has {lines} lines; split it'
    if name not in SETTINGS:
        assert list(settings_touched(tree)) == [], f'only {" and ".join(SETTINGS)} may'
    if name.startswith(SINGLE_DEVICE):
        modules = ' '.join(imported(tree))
        assert not re.search(r'\b(optax|orbax|jax\.sharding)\b', modules), modules
        strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not strings & {'stage', 'fsdp', 'expert', 'tensor'}, 'models do not know the mesh'


def test_the_search_for_settings_finds_them():
    code = "jax.config.update('a', 1)\nos.environ['A'] = 'b'\nos.environ.setdefault('A', 'b')"
    assert len(list(settings_touched(ast.parse(code)))) == 3


def test_no_path_of_one_machine():
    listed = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard'],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    files = listed.stdout.splitlines() if listed.returncode == 0 else NAMES
    private = re.compile(r'(?<![\w.~])/(home|root|Users|work|mnt|private)/\w')
    found = []
    for name in files:
        path = ROOT / name
        if path.is_file() and path.suffix in ('.py', '.toml', '.md', '.txt', '.cfg', ''):
            lines = enumerate(path.read_text('utf-8', 'ignore').splitlines(), 1)
            found += [f'{name}:{number}: {line}' for number, line in lines if private.search(line)]
    assert not found, '\n'.join(found)
