"""Tables of numbers: scikit-learn's own and the user's CSV files."""

import csv
import dataclasses
import os

import numpy as np

from bigjax.data.card import Card
from bigjax.data.csv_labels import class_names
from bigjax.data.csv_rows import read_csv
from bigjax.data.pipeline import ArrayRecords
from bigjax.data.user_files import named_files
from bigjax.experiment import UsageError

BUILT_IN = ('diabetes', 'wine', 'breast_cancer', 'iris')
# A numeric column with more distinct values than this is a quantity, not a set of classes.
MOST_CLASSES = 20
# Every fifth row, of an order drawn once, is held out.
SHARE = 5


@dataclasses.dataclass(frozen=True)
class TableData:
    """Rows of numbers with a class or a quantity to predict, in two splits.

    Examples are 'features' float32 [B, F], with mean 0 and standard deviation 1 over the training
    rows, and 'label' int32 [B] or 'target' float32 [B], standardised likewise.

    Attributes:
        train: training records.
        test: held-out records.
        feature_names: the columns of 'features'.
        class_names: the name of each label; empty where a quantity is predicted.
        target_mean: training mean of the quantity, in its own unit.
        target_std: its standard deviation: `target * target_std + target_mean` undoes the scaling.
        card: description.
    """

    train: ArrayRecords
    test: ArrayRecords
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...]
    target_mean: float
    target_std: float
    card: Card

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where a quantity is predicted."""
        return len(self.class_names)


def open_table(dataset: str, *, label_column: str = 'label') -> TableData:
    """Returns the table named by `--dataset`.

    Args:
        dataset: 'diabetes' (regression), 'wine', 'breast_cancer', 'iris' or 'csv:FILE'.
        label_column: the CSV column to predict: classes if it holds words or a few whole numbers,
            else a quantity. All other columns must be numbers.

    Raises:
        UsageError: no such table, or a CSV file that is not one of numbers.
    """
    prefix, _, path = dataset.partition(':')
    if prefix == 'csv' and path:
        return open_csv(os.path.expanduser(path), label_column)
    if dataset not in BUILT_IN:
        raise UsageError(
            f'--dataset={dataset}: no such table; there are {", ".join(BUILT_IN)} and csv:FILE; '
            'try --dataset=wine'
        )
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f'load_{dataset}')()
    card = Card(
        name=dataset,
        description=next(line for line in bunch.DESCR.splitlines()[2:] if line.strip()),
        license='CC BY 4.0' if dataset != 'diabetes' else 'not stated',
        citation='scikit-learn toy datasets (UCI; diabetes: Efron et al., 2004)',
    )
    names = tuple(str(name) for name in bunch.get('target_names', ()))
    return split_table(bunch.data, bunch.target, tuple(map(str, bunch.feature_names)), names, card)


def open_csv(path: str, label_column: str) -> TableData:
    """Returns a CSV file of numbers with one column to predict."""
    ((flag, path),) = named_files(f'csv:{path}', path).items()
    rows = read_csv(path, {'label_column': label_column}, flag=flag)
    header = read_header(path)
    names = tuple(name for name in header if name != label_column)
    if not names:
        raise UsageError(f'{flag}: it has no column besides {label_column}')
    features = np.empty((len(rows), len(names)))
    for row, (line, words) in enumerate(read_csv(path, list(names), flag=flag)):
        for column, word in enumerate(words):
            features[row, column] = number(word, flag, line, names[column])
    labels = [label for _, (label,) in rows]
    card = Card(
        name=f'csv:{path}',
        description=f'{len(rows)} rows of {len(names)} numbers; {label_column} is predicted.',
        path=os.path.abspath(path),
    )
    if is_quantity(labels):
        values = [number(label, flag, line, label_column) for line, (label,) in rows]
        return split_table(features, np.array(values), names, (), card)
    classes = class_names(labels)
    if len(classes) < 2:
        raise UsageError(f'{flag}: every row has the label {classes[0]!r}; nothing to tell apart')
    index = {name: label for label, name in enumerate(classes)}
    target = np.array([index[label] for label in labels])
    return split_table(features, target, names, tuple(classes), card)


def read_header(path: str) -> list[str]:
    """Returns the column names of a CSV file that `read_csv` has accepted."""
    with open(path, encoding='utf-8-sig', newline='') as file:
        return next(csv.reader(file))


def is_quantity(labels: list[str]) -> bool:
    """Returns whether a column holds numbers that are not whole, or too many to be classes."""
    try:
        values = {float(label) for label in labels}
    except ValueError:
        return False
    return not all(value.is_integer() for value in values) or len(values) > MOST_CLASSES


def number(value: str, flag: str, line: int, column: str) -> float:
    """Returns a finite number, or raises naming line and column."""
    try:
        parsed = float(value)
    except ValueError:
        parsed = float('nan')
    if not np.isfinite(parsed):
        raise UsageError(f'{flag}: line {line}, column {column}: {value!r} is not a finite number')
    return parsed


def split_table(
    features: np.ndarray,
    target: np.ndarray,
    feature_names: tuple[str, ...],
    class_names: tuple[str, ...],
    card: Card,
) -> TableData:
    """Returns the table in two splits, standardised by the training rows."""
    # The rows of these tables are sorted by class, so an order is drawn, the same for ever.
    order = np.random.default_rng(0).permutation(len(features))
    held_out = order[::SHARE]
    kept = np.delete(order, np.s_[::SHARE])
    if not len(kept):
        raise UsageError(f'--dataset={card.name}: one row is too few to learn and to test')
    mean, std = features[kept].mean(0), features[kept].std(0)
    std[std == 0] = 1.0
    target_mean, target_std = 0.0, 1.0
    if not class_names:
        target_mean, target_std = float(target[kept].mean()), float(target[kept].std()) or 1.0

    def records(rows: np.ndarray) -> ArrayRecords:
        arrays = {'features': ((features[rows] - mean) / std).astype(np.float32)}
        if class_names:
            arrays['label'] = target[rows].astype(np.int32)
        else:
            arrays['target'] = ((target[rows] - target_mean) / target_std).astype(np.float32)
        return ArrayRecords(arrays)

    train, test = records(kept), records(held_out)
    card = dataclasses.replace(card, sizes={'train': len(train), 'test': len(test)})
    return TableData(
        train=train,
        test=test,
        feature_names=feature_names,
        class_names=class_names,
        target_mean=target_mean,
        target_std=target_std,
        card=card,
    )
