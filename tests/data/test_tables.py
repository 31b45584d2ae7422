import re

import numpy as np
import pytest

from bigjax.data.tables import open_table
from bigjax.experiment import UsageError


@pytest.mark.parametrize(
    ('name', 'rows', 'columns', 'classes'),
    [
        ('diabetes', 442, 10, 0),
        ('wine', 178, 13, 3),
        ('breast_cancer', 569, 30, 2),
        ('iris', 150, 4, 3),
    ],
)
def test_built_in(name, rows, columns, classes):
    data = open_table(name)
    assert sum(data.card.sizes.values()) == rows
    assert data.num_classes == classes
    assert len(data.feature_names) == columns
    train = data.train.take(np.arange(len(data.train)))
    assert train['features'].dtype == np.float32
    np.testing.assert_allclose(train['features'].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train['features'].std(0), 1, atol=1e-4)
    if classes:
        labels = data.test.arrays['label']
        assert labels.dtype == np.int32
        assert set(labels.tolist()) == set(range(classes))
    else:
        target = train['target'] * data.target_std + data.target_mean
        assert 25 <= target.min() < target.max() <= 346.1
    again = open_table(name)
    np.testing.assert_array_equal(again.test.arrays['features'], data.test.arrays['features'])


def test_csv_of_classes_and_of_quantities(tmp_path):
    path = tmp_path / 'a.csv'
    rows = [f'{n},{n % 3},{n * 0.5},{"hot" if n > 9 else "cold"}' for n in range(20)]
    path.write_text(
        '\n'.join(['a,b,half,kind', *rows]).replace(',hot', ',1').replace(',cold', ',0')
    )
    data = open_table(f'csv:{path}', label_column='kind')
    assert data.class_names == ('0', '1')
    assert data.feature_names == ('a', 'b', 'half')
    path.write_text('\n'.join(['a,b,half', *(row.rsplit(',', 1)[0] for row in rows)]))
    data = open_table(f'csv:{path}', label_column='half')
    assert data.num_classes == 0
    target = [
        r.arrays['target'] * data.target_std + data.target_mean for r in (data.train, data.test)
    ]
    np.testing.assert_allclose(np.sort(np.concatenate(target)), np.arange(20) * 0.5, atol=1e-5)


@pytest.mark.parametrize(
    ('dataset', 'content', 'message'),
    [
        (
            'boston',
            '',
            '--dataset=boston: no such table; there are diabetes, wine, breast_cancer, iris and '
            'csv:FILE; try --dataset=wine',
        ),
        ('csv:{path}x', '', '--dataset=csv:{path}x: no such file; try --dataset=csv:{path}'),
        (
            'csv:{path}',
            'a,label\n1,0\nmany,1\n',
            "--dataset=csv:{path}: line 3, column a: 'many' is not a finite number",
        ),
        (
            'csv:{path}',
            'a,kind\n1,0\n',
            "--dataset=csv:{path}: no column 'label'; the columns are a, kind; try "
            '--label_column=a',
        ),
        (
            'csv:{path}',
            'a,label\n1,0\n2,0\n',
            "--dataset=csv:{path}: every row has the label '0'; nothing to tell apart",
        ),
        ('csv:{path}', 'label\n1\n2\n', '--dataset=csv:{path}: it has no column besides label'),
    ],
)
def test_errors(tmp_path, dataset, content, message):
    path = tmp_path / 'a.csv'
    path.write_text(content)
    with pytest.raises(UsageError, match=f'^{re.escape(message.replace("{path}", str(path)))}$'):
        open_table(dataset.replace('{path}', str(path)))
