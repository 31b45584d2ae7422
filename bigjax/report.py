"""What a person reads before and after a run: the summary, the final scores, the curves.

scikit-learn and matplotlib are imported where they are used: start-up should not wait for them.
"""

import math
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bigjax import units
from bigjax.metrics import read_metrics

_WIDTH = 100
_HEAD = 8  # letters of a class at the head of a column
_MAX_CLASSES = 30  # more would push everything else off the screen


def summary_table(description: Mapping[str, Any]) -> str:
    """The start-up summary as text; lines whose key is missing or None are left out.

    Args:
        description: what `--action=describe` prints as JSON: experiment, knobs {name: value},
            parameters, parameters_by_module {module: parameters}, flops_per_step,
            examples_per_step, tokens_per_step, mesh {axis: size}, state_bytes_per_device,
            data {name, sizes {set: rows}}, devices, workdir.
    """
    lines = []
    if modules := description.get('parameters_by_module'):
        total = description['parameters']
        rows = _module_rows(modules)
        left = max(len('parameters'), *(len(name) for name, _ in rows))
        lines += [f'{name:<{left}}  {count:>15,}  {count / total:6.1%}' for name, count in rows]
        lines += ['─' * (left + 25), f'{"parameters":<{left}}  {total:>15,}', '']
    for label, text in _facts(description):
        body = textwrap.wrap(text, _WIDTH - 20, break_long_words=False, break_on_hyphens=False)
        lines.append(f'{label:<18}  ' + f'\n{"":20}'.join(body))
    return '\n'.join(lines)


def _module_rows(modules: Mapping[str, int]) -> list[tuple[str, int]]:
    """(module, parameters), a run of equal numbered siblings (block_0, block_1, …) as one row."""
    groups: list[tuple[str, list[str], int]] = []
    for name, count in modules.items():
        kind = re.sub(r'\d+', '#', name)
        if groups and kind != name and groups[-1][0] == kind and groups[-1][2] == count:
            groups[-1][1].append(name)
        else:
            groups.append((kind, [name], count))
    return [
        (n[0] if len(n) == 1 else f'{n[0]} … {n[-1]} ({len(n)} × {units.number(c)})', len(n) * c)
        for _, n, c in groups
    ]


def _facts(description: Mapping[str, Any]):
    for key, label, form in (
        ('experiment', 'experiment', str),
        ('knobs', 'knobs', _pairs),
        ('flops_per_step', 'FLOPs per step', units.number),
        ('examples_per_step', 'examples per step', '{:,}'.format),
        ('tokens_per_step', 'tokens per step', '{:,}'.format),
        ('data', 'data', _data),
        ('data', 'noticed', lambda v: '; '.join(v.get('notes') or ())),
        ('devices', 'devices', lambda v: _pairs(v) if isinstance(v, Mapping) else str(v)),
        ('mesh', 'mesh', lambda v: _pairs(v) if isinstance(v, Mapping) else str(v)),
        ('state_bytes_per_device', 'state per device', units.size),
        ('workdir', 'written to', str),
    ):
        if description.get(key) is not None and (text := form(description[key])):
            yield label, text


def _pairs(values: Mapping[str, Any]) -> str:
    return ' '.join(f'{name}={value}' for name, value in values.items())


def _data(data: Mapping[str, Any]) -> str:
    sizes = data.get('sizes') or {}
    parts = (f'{name} {v:,}' if isinstance(v, int) else f'{name} {v}' for name, v in sizes.items())
    return ': '.join(filter(None, (data.get('name'), ', '.join(parts))))


def classification_report(
    confusion_CC: np.ndarray, class_names: Sequence[str] | None = None
) -> tuple[dict[str, Any], str]:
    """Accuracy, macro precision, recall and F1 and the per-class scores of a confusion matrix.

    Macro scores are scikit-learn's: unweighted means over the classes that occur as a truth or a
    prediction; a class never predicted has precision 0.

    Args:
        confusion_CC: [C, C] counts, row = truth, column = prediction.
        class_names: C names; the class numbers by default.

    Returns:
        A dict for JSON (accuracy, macro_precision, macro_recall, macro_f1, classes, confusion) and
        the same as text.

    Raises:
        ValueError: if there is no example in it.
    """
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    counts = np.asarray(confusion_CC, np.float64)
    names = [str(name) for name in class_names or range(len(counts))]
    truth, guess = np.nonzero(counts)
    if not truth.size:
        raise ValueError('the confusion matrix is empty: nothing was evaluated')
    weight = counts[truth, guess]
    present = sorted(set(truth) | set(guess))
    each = precision_recall_fscore_support(
        truth, guess, labels=present, sample_weight=weight, zero_division=0
    )
    scores = {
        'accuracy': float(accuracy_score(truth, guess, sample_weight=weight)),
        **{
            f'macro_{k}': float(each[i].mean()) for i, k in enumerate(('precision', 'recall', 'f1'))
        },
        'classes': {
            names[c]: {'precision': p, 'recall': r, 'f1': f, 'examples': round(s)}
            for c, p, r, f, s in zip(present, *(e.tolist() for e in each), strict=True)
        },
        'confusion': counts.round().astype(int).tolist(),
    }
    return scores, _classification_text(scores, [names[c] for c in present], counts, present)


def _classification_text(scores, names, counts, present) -> str:
    width = max(5, *(len(name) for name in names))
    lines = [f'{"class":<{width}}  precision  recall      F1  examples']
    rows = list(scores['classes'].items())
    if len(rows) > _MAX_CLASSES:
        rows = sorted(rows, key=lambda row: row[1]['f1'])[:_MAX_CLASSES]
        lines.insert(0, f'the {_MAX_CLASSES} classes of {len(names)} with the lowest F1:')
    for name, s in rows:
        lines.append(
            f'{name:<{width}}  {s["precision"]:9.4f}  {s["recall"]:6.4f}  {s["f1"]:6.4f}'
            f'  {s["examples"]:8,}'
        )
    lines.append(
        f'{"macro":<{width}}  {scores["macro_precision"]:9.4f}  {scores["macro_recall"]:6.4f}'
        f'  {scores["macro_f1"]:6.4f}  {round(counts.sum()):8,}'
    )
    lines.append(f'accuracy {scores["accuracy"]:.4f}')
    if len(names) <= _MAX_CLASSES:
        shown = counts[np.ix_(present, present)].round().astype(int)
        cell = max(3, len(str(shown.max())))
        heads = [name[:_HEAD] for name in names]
        cell = max(cell, *(len(head) for head in heads))
        lines += ['', 'confusion matrix (row = truth, column = prediction)']
        lines.append(' ' * width + ''.join(f'  {head:>{cell}}' for head in heads))
        for name, row in zip(names, shown, strict=True):
            lines.append(f'{name:<{width}}' + ''.join(f'  {n:>{cell}}' for n in row))
    return '\n'.join(lines)


def language_model_report(
    loss: float, *, tokens: int | None = None, data_bytes: int | None = None
) -> tuple[dict[str, float], str]:
    """Loss, perplexity and bits per byte of a language model.

    Args:
        loss: mean cross entropy in nats per predicted token.
        tokens: predicted tokens; with data_bytes gives bits_per_byte = loss tokens / (bytes ln 2).
        data_bytes: bytes of text those tokens stand for; equal to tokens for a byte-level model.
    """
    scores = {'loss': loss, 'perplexity': math.exp(min(loss, 700.0))}
    text = f'loss {loss:.4f} nats per token, perplexity {scores["perplexity"]:.4g}'
    if tokens and data_bytes:
        scores['bits_per_byte'] = loss * tokens / (data_bytes * math.log(2))
        text += f', {scores["bits_per_byte"]:.4f} bits per byte'
    return scores, text


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Centred mean over up to `span` values; NaNs are passed over.

    The window stays symmetric at the start, where a mean of one side would lag behind a falling
    loss, and keeps its left half at the end, where single values would show as noise.
    """
    seen = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(seen, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(seen)])
    index = np.arange(len(values))
    half = np.minimum(span // 2, index)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)


def learning_curves(workdir: str | os.PathLike) -> Path | None:
    """Draws learning_curves.png from metrics.jsonl: losses, accuracy if there, learning rate.

    Returns:
        The picture's path, or None if nothing was recorded.
    """
    records = list(read_metrics(Path(workdir) / 'metrics.jsonl'))
    if not records:
        return None
    # Without pyplot there is no global figure list and no display to ask for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sets = list(dict.fromkeys(r.get('set', 'train') for r in records))
    panels = [('loss', 3.0)]
    if any('accuracy' in r for r in records):
        panels.append(('accuracy', 2.0))
    if any('learning_rate' in r for r in records):
        panels.append(('learning_rate', 1.2))
    figure = Figure(figsize=(8, 1 + sum(height for _, height in panels)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(panels), sharex=True, squeeze=False, height_ratios=[height for _, height in panels]
    )[:, 0]
    for ax, (metric, _) in zip(axes, panels, strict=True):
        ax.set_ylabel(metric.replace('_', '\n'))
        ax.grid(alpha=0.25)
        ax.spines[['top', 'right']].set_visible(False)
        for index, name in enumerate(sets):
            points = [(r['step'], r[metric]) for r in records if _has(r, name, metric)]
            if points:
                _draw(ax, np.array(points, np.float64).T, metric, name, f'C{index}')
        if metric == 'learning_rate':
            ax.ticklabel_format(axis='y', style='sci', scilimits=(-2, 2))
            ax.set_ylim(bottom=0)
        elif ax.has_data():
            ax.legend(frameon=False)
    axes[-1].set_xlabel('step')
    path = Path(workdir) / 'learning_curves.png'
    figure.savefig(path, dpi=120)
    return path


def _has(record: Mapping[str, Any], set_name: str, metric: str) -> bool:
    return record.get('set', 'train') == set_name and record.get(metric) is not None


def _draw(ax, points: np.ndarray, metric: str, name: str, color: str):
    steps, values = points
    if name != 'train':
        best = values.argmax() if metric == 'accuracy' else values.argmin()
        label = f'{name} (best {values[best]:.4g} at step {steps[best]:.0f})'
        ax.plot(steps, values, 'o-', color=color, markersize=4, label=label)
    elif metric == 'learning_rate' or len(values) < 20:
        ax.plot(steps, values, color=color, label=name, marker='.' if len(values) == 1 else '')
    else:
        ax.plot(steps, values, color=color, alpha=0.3, linewidth=0.8)
        ax.plot(steps, smooth(values, len(values) // 20), color=color, label=f'{name}, smoothed')
    if metric == 'loss' and name == 'train' and len(values) >= 20:
        # One wild step would flatten all the others.
        shown = np.concatenate([line.get_ydata() for line in ax.lines])
        low, high, top = shown.min(), shown.max(), np.quantile(values, 0.98)
        if high - low > 4 * (top - low) > 0:
            ax.set_ylim(low - 0.05 * (top - low), low + 2 * (top - low))
