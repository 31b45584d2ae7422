"""The table of experiments/README.md, measured again and written in place.

    python tests/family_table.py [--cells=parameters,score] [--fashion_mnist=DIR] [--minilm=DIR]
        [--torch=PYTHON] [--workdir=DIR] [EXPERIMENT …]

A cell that is not asked for, or needs what was not given, stays as it is. `score`, with its time,
runs the command that the experiment's docstring has for the row; all of them take hours. `parity`
and `ratio` need PYTHON, the interpreter of an environment of its own with torch, torchvision, timm
and transformers. A run that is in --workdir is not repeated.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TABLE = ROOT / 'experiments' / 'README.md'
CELLS = ('parameters', 'parity', 'score', 'ratio')
# Data of which only the shape counts: what is told is the published size.
IMAGES = '--dataset=digits --num_classes=1000 --image_size=224 --channels=3 --width=0 '
CLOTHES, DIGITS, PAIRS = 'Fashion-MNIST', 'digits', 'English–Chinese messages'


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      experiment: its name.
      family: what is trained; with the name, what the row is found by.
      data: what it is trained on, as a person reads it; empty without a run.
      command: which of the docstring's commands is run.
      seeds: how many runs are made, of which the mean is told.
      metric: the run's score, in the last evaluation of the data set that it has last.
      size: knobs of the published size, whose parameters are counted.
      note: which size that is.
      parity: cases of tests/pretrained/test_parity.py, as a regular expression.
      races: cases of tests/race, separated by blanks.
    """

    experiment: str
    family: str
    data: str = ''
    command: int = 0
    seeds: int = 1
    metric: str = 'accuracy'
    size: str = ''
    note: str = ''
    parity: str = ''
    races: str = ''


ROWS = (
    Row('alexnet', 'AlexNet', DIGITS, size=f'{IMAGES} --hidden=0', parity='alexnet',
        races='alexnet'),
    Row('alexnet', 'AlexNet, width 32', CLOTHES, 1),
    Row('vgg', 'VGG-11 to 19, with and without BatchNorm', DIGITS, parity='vgg.*', note='16',
        size=f'{IMAGES} --hidden=0 --depth=16 --nobatch_norm', races='vgg16'),
    Row('vgg', '11 layers, width 32', CLOTHES, 1),
    Row('inception', 'Inception v1 (GoogLeNet)', DIGITS, size=f'{IMAGES} --auxiliary=0',
        note='without auxiliary heads', parity='inception_v1', races='inception1'),
    Row('inception', 'Inception v1, width 8', CLOTHES, 1),
    Row('inception', 'Inception v3', size=f'{IMAGES} --version=3 --image_size=299',
        parity='inception_v3', races='inception3'),
    Row('resnet', 'ResNet-18 to 152, 6n + 2', DIGITS, size=f'{IMAGES} --depth=50', note='50',
        parity='resnet.*', races='resnet18 resnet50'),
    Row('resnet', '20 layers, width 16', CLOTHES, 1, races='resnet20'),
    Row('vit', 'ViT-Ti to H', DIGITS, note='B/16', parity='vit.*', races='vit', size=f'{IMAGES} '
        '--variant=B/16 --depth=0 --heads=0 --pool=token --positions=learned'),
    Row('vit', 'Ti/4, 4 layers, width 64', CLOTHES, 1),
    Row('cnn', 'two convolutions', DIGITS, races='cnn cnn256'),
    Row('cnn', 'two convolutions', CLOTHES, 1),
    Row('mlp', 'feed-forward', 'breast cancer'),
    Row('lstm_classifier', 'LSTM, GRU or Elman', '63 languages', races='lstm_classifier'),
    Row('rnn_lm', 'LSTM, GRU or Elman', 'standard library, bytes', metric='bits_per_byte',
        races='rnn_lm'),
    Row('wavenet', 'WaveNet', 'standard library, bytes', metric='bits_per_byte'),
    Row('rnn_translation', 'GRUs, additive attention', PAIRS, seeds=3, metric='bleu',
        races='rnn_translation'),
    Row('rnn_translation', 'GRUs, without attention', PAIRS, 1, seeds=3, metric='bleu'),
    Row('transformer_translation', 'Transformer, as Marian', PAIRS, metric='bleu', parity='marian',
        races='transformer'),
    Row('bert', 'BERT', 'standard library, masked words', size='--size=base --vocab=30522',
        note='base, both heads', parity='bert.*', races='bert'),
    Row('bert', 'MiniLM, from its weights', 'docstrings', 1, parity='minilm'),
    Row('bert', 'MiniLM, from scratch', 'docstrings', 2),
    Row('roberta', 'RoBERTa', 'standard library, masked tokens', note='base',
        size='--size=base --vocab=50265', parity='roberta.*'),
    Row('gpt_stdlib', 'GPT-2, smallest', 'standard library, bytes', seeds=3,
        metric='bits_per_byte', races='gpt gpt6'),
    Row('gpt2', 'GPT-2', 'standard library, BPE', 2, metric='bits_per_byte', size='--size=1.5B',
        note='1.5B', parity='gpt2'),
    Row('gpt3', 'GPT-3', 'standard library, BPE', 1, metric='bits_per_byte', size='--size=175B',
        note='175B'),
    Row('llama', 'Llama 3', 'standard library, BPE', 2, metric='bits_per_byte',
        size='--size=405B --scan', note='405B', parity='llama.*', races='llama'),
)  # fmt: skip


def commands(experiment: str) -> list[list[str]]:
    """Returns the flags of the commands in an experiment's docstring."""
    source = (ROOT / 'experiments' / f'{experiment}.py').read_text('utf-8')
    found: list[str] = []
    for line in source.split('"""')[1].splitlines():
        text = line.strip().rstrip('\\')
        if text.startswith('python launch.py '):
            found.append(text)
        elif found and line.startswith(' ' * 8):
            found[-1] += ' ' + text
    return [shlex.split(command)[2:] for command in found]


def launch(flags: list[str]) -> str:
    """Runs launch.py and returns what it wrote to stdout."""
    command = [sys.executable, str(ROOT / 'launch.py'), *flags]
    print(shlex.join(command), file=sys.stderr)
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def parameters(row: Row) -> str:
    """Returns how many parameters the published size has."""
    flags = [f'--experiment={row.experiment}', '--action=describe', *shlex.split(row.size)]
    count = json.loads(launch(flags))['parameters']
    return f'{count:,} ({row.note})' if row.note else f'{count:,}'


def score(row: Row, given: argparse.Namespace, workdir: Path) -> tuple[str, str] | None:
    """Returns the score and the time of the row's runs; None where their data was not given."""
    flags = commands(row.experiment)[row.command]
    if any('idx:DIR' in flag for flag in flags) and not given.fashion_mnist:
        return None
    if any('=MINILM' in flag for flag in flags) and not given.minilm:
        return None
    filled = [
        flag.replace('idx:DIR', f'idx:{given.fashion_mnist}').replace('MINILM', str(given.minilm))
        for flag in flags
    ]
    scores, seconds = [], []
    for seed in range(row.seeds):
        folder = workdir / f'{row.experiment}_{row.command}_{seed}'
        clock = folder / 'seconds'
        if not clock.exists():
            shutil.rmtree(folder, ignore_errors=True)  # What an interrupted run took is not known.
            start = time.monotonic()
            launch([*filled, f'--seed={seed}', f'--workdir={folder}'])
            clock.write_text(str(time.monotonic() - start))
        seconds.append(float(clock.read_text()))
        records = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
        scores.append([r for r in records if row.metric in r and 'set' in r][-1][row.metric])
    minutes, rest = divmod(round(statistics.mean(seconds)), 60)
    return told(row.metric, scores), f'{minutes}:{rest:02}'


def told(metric: str, scores: list[float]) -> str:
    """Returns the mean as a person reads it, and the scores where there are several."""
    shapes = {'accuracy': '{:.1f}', 'bits_per_byte': '{:.3f}', 'bleu': '{:.1f}'}
    names = {'accuracy': ' %', 'bits_per_byte': ' bits per byte', 'bleu': ' BLEU'}
    show = shapes[metric].format
    scores = [100 * score if metric == 'accuracy' else score for score in scores]
    each = f' ({", ".join(map(show, scores))})' if len(scores) > 1 else ''
    return f'{show(statistics.mean(scores))}{each}{names[metric]}'


def parities(given: argparse.Namespace) -> dict[str, float]:
    """Returns the largest absolute difference of each case of the parity test."""
    tests = ROOT / 'tests' / 'pretrained'
    with tempfile.TemporaryDirectory() as folder:
        cases = [f'minilm={given.minilm}'] if given.minilm else []
        subprocess.run([given.torch, tests / 'generate_parity.py', folder], check=True)
        if cases:
            subprocess.run([given.torch, tests / 'generate_parity.py', folder, *cases], check=True)
        command = [sys.executable, '-m', 'pytest', '-s', '-q', tests / 'test_parity.py']
        ran = subprocess.run(
            [*command, f'--parity={folder}'],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, float] = {}
    for case, error in re.findall(r'^(\w+) \w+: (\S+) absolute', ran.stdout, re.MULTILINE):
        found[case] = max(found.get(case, 0.0), float(error))
    return found


def ratio(row: Row, torch: str) -> str:
    """Returns PyTorch's step time over ours, of each of the row's cases."""
    command = [sys.executable, ROOT / 'tests' / 'race', f'--torch={torch}', *row.races.split()]
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(lines, file=sys.stderr)
    found = re.findall(r'^(\w+) .* ratio (\S+)$', lines, re.MULTILINE)
    return ', '.join(f'{number} ({case})' for case, number in found)


def write(row: Row, cells: dict[str, str]) -> None:
    """Writes cells of a row into the table."""
    head = f'| `{row.experiment}` | {row.family} |'
    lines = TABLE.read_text('utf-8').split('\n')
    names = ('experiment', 'family', 'parameters', 'parity', 'data', 'score', 'time', 'ratio')
    (place,) = (
        n for n, line in enumerate(lines)
        if line.startswith(head) and line.split(' | ')[4] == (row.data or '–')
    )  # fmt: skip
    old = dict(zip(names, lines[place].strip('| ').split(' | '), strict=True))
    lines[place] = '| ' + ' | '.join({**old, **cells}.values()) + ' |'
    TABLE.write_text('\n'.join(lines), 'utf-8')


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--cells', default=','.join(CELLS))
    # Commands run in the root, wherever this is started.
    parser.add_argument('--fashion_mnist', default=None, type=os.path.abspath)
    parser.add_argument('--minilm', default=None, type=os.path.abspath)
    parser.add_argument('--torch', default='')
    parser.add_argument('--workdir', default='')
    parser.add_argument('experiments', nargs='*')
    given = parser.parse_args()
    wanted = given.cells.split(',')
    if unknown := {*wanted} - {*CELLS} | {*given.experiments} - {row.experiment for row in ROWS}:
        parser.error(f'{", ".join(sorted(unknown))}: neither a cell ({", ".join(CELLS)}) nor a row')
    workdir = Path(given.workdir or tempfile.mkdtemp()).resolve()
    rows = [row for row in ROWS if not given.experiments or row.experiment in given.experiments]
    errors = parities(given) if given.torch and 'parity' in wanted else {}
    for row in rows:
        cells = {}
        if row.size and 'parameters' in wanted:
            cells['parameters'] = parameters(row)
        if worst := [
            e for case, e in errors.items() if row.parity and re.fullmatch(row.parity, case)
        ]:
            cells['parity'] = f'{max(worst):.1e}'.replace('e-0', 'e-')
        if row.data and 'score' in wanted and (found := score(row, given, workdir)):
            cells['score'], cells['time'] = found
        if row.races and given.torch and 'ratio' in wanted:
            cells['ratio'] = ratio(row, given.torch)
        write(row, cells)


if __name__ == '__main__':
    main()
