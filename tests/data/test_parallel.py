"""Parallel text: where pairs come from, what is left out, and rows of tokens."""

import struct

import numpy as np
import pytest

from bigjax.data import pairs as pairs_module
from bigjax.data.builders import CataloguePairs, CataloguesConfig, build
from bigjax.data.catalogues import catalogue_files, clean, package_root, read_translations
from bigjax.data.parallel import open_parallel
from bigjax.experiment import UsageError


def write_mo(path, messages):
    """Writes a compiled catalogue (GNU gettext manual, "The Format of GNU MO Files")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data, tables, texts = b'', [], [x for pair in messages for x in pair]
    offset = 28 + 8 * len(texts)
    for text in texts:
        tables.append((len(text.encode()), offset + len(data)))
        data += text.encode() + b'\0'
    originals, translations = tables[0::2], tables[1::2]
    head = struct.pack('<7I', 0x950412DE, 0, len(messages), 28, 28 + 4 * len(texts), 0, 0)
    numbers = [x for table in (originals, translations) for pair in table for x in pair]
    path.write_bytes(head + struct.pack(f'<{len(numbers)}I', *numbers) + data)


def test_translations_of_a_catalogue(tmp_path):
    file = tmp_path / 'de' / 'LC_MESSAGES' / 'app.mo'
    write_mo(
        file,
        [
            ('', 'Language: de\n'),
            ('Save all\n  files', 'Alle  Dateien\nsichern'),
            ('menu\4Open %(name)s', 'Öffne %(name)s'),
            ('%d file\0%d files', '%d Datei\0%d Dateien'),
            ('HTML', 'HTML'),
            ('%s: ', '%s:'),
        ],
    )
    write_mo(file.parent / 'b.mo', [('HTML', 'HTML'), ('Open %(name)s', 'Anders')])
    assert catalogue_files(str(tmp_path), 'de') == [str(file), str(file.parent / 'b.mo')]
    assert catalogue_files(str(tmp_path), 'd') == []
    found = read_translations(catalogue_files(str(tmp_path), 'de'))
    assert dict(found.splits['train'] + found.splits['test']) == {
        'Save all files': 'Alle Dateien sichern',
        'Open %(name)s': 'Öffne %(name)s',
        '%d file': '%d Datei',
        '%d files': '%d Dateien',
    }
    assert found.left_out == {'untranslated': 2, 'without words': 1, 'doubles': 1}


@pytest.mark.parametrize(
    ('folder', 'language'),
    [('de_DE', 'de'), ('zh_Hans', 'zh'), ('zh_CN', 'zh'), ('es_MX', 'es_MX')],
)
def test_names_of_languages_differ_between_packages(tmp_path, folder, language):
    write_mo(tmp_path / folder / 'LC_MESSAGES' / 'a.mo', [('one', 'two')])
    assert len(catalogue_files(str(tmp_path), language)) == 1
    assert not catalogue_files(str(tmp_path), 'es')


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp('data'))


def test_the_builder_writes_what_the_catalogues_hold(data_dir):
    files = catalogue_files(package_root('django'), 'fr')
    builder = build(CataloguePairs, CataloguesConfig(name='fr', files=files), data_dir=data_dir)
    expected = read_translations(files).splits
    for split in ('train', 'test'):
        rows = builder.as_data_source(split=split)
        found = [(row['source'].decode(), row['target'].decode()) for row in rows]
        assert found == expected[split]
    share = len(expected['test']) / sum(map(len, expected.values()))
    assert 0.07 < share < 0.14
    sides = ({clean(source).casefold() for source, _ in part} for part in expected.values())
    assert not set.intersection(*sides)  # Not even with other punctuation.
    assert 'BSD' in builder.info.redistribution_info.license


def test_rows_are_the_texts(data_dir):
    data = open_parallel('catalogues:fr', seq=12, data_dir=data_dir, vocab=400)
    assert data.vocab_size == 402
    assert (data.begin, data.end) == (400, 401)
    assert data.card.sizes == {'train': len(data.train), 'test': len(data.test)}
    cut = 0
    for start in range(0, len(data.test), 16):
        rows = data.test.take(np.arange(start, min(start + 16, len(data.test))))
        for side in ('source', 'target'):
            assert rows[side].dtype == np.int32
            for tokens, row in zip(rows[side], rows['row'], strict=True):
                whole = data.tokenizer.encode(text := getattr(data.test, side).text(row))
                expected = [*whole, data.end, *[-1] * 12][:12]
                assert tokens.tolist() == expected
                if data.end in tokens:
                    assert data.decode(tokens) == text
                cut += data.end not in tokens
    told = ' '.join(data.card.notes)
    counts = {
        side: sum(
            int((getattr(rows, side).lengths() >= 12).sum()) for rows in (data.train, data.test)
        )
        for side in ('source', 'target')
    }
    assert f'{counts["source"]} sources are cut to 12 tokens' in told
    assert f'{counts["target"]} targets are cut to 12 tokens' in told
    assert 'left out: untranslated' in told
    assert 0 < cut <= sum(counts.values())


def test_text_from_outside_is_read_as_the_data_is(data_dir):
    data = open_parallel('catalogues:fr', seq=12, data_dir=data_dir, vocab=400)
    row = next(i for i, n in enumerate(data.test.source.lengths()) if n < 12)
    np.testing.assert_array_equal(
        data.encode([data.test.source.text(row)]), data.test.take(np.array([row]))['source']
    )
    with pytest.raises(UsageError) as error:
        data.encode(['x' * 40])
    assert str(error.value).startswith(f'--prompt={"x" * 40}: is ')
    assert str(error.value).endswith('and the model reads 12; try a shorter one')
    with pytest.raises(UsageError) as error:
        data.encode([''])
    assert str(error.value) == '--prompt=: must hold at least one character; try --prompt=Save'


def csv_file(path, rows, header='article,summary'):
    path.write_text('\n'.join([header, *rows]) + '\n', encoding='utf-8')
    return path


def open_csv(path, **options):
    return open_parallel(
        f'csv:{path}',
        seq=8,
        data_dir=str(path.parent / 'data'),
        tokenizer='bytes',
        source_column='article',
        target_column='summary',
        **options,
    )


def all_pairs(rows):
    return [(rows.source.text(i), rows.target.text(i)) for i in range(len(rows))]


def test_pairs_of_a_csv_file(tmp_path):
    path = csv_file(
        tmp_path / 'a.csv',
        [*(f'text {i},sum {i}' for i in range(30)), 'text 1,other', 'text 2,sum 2', ' ,nothing'],
    )
    data = open_csv(path)
    found = all_pairs(data.train) + all_pairs(data.test)
    assert sorted(found) == sorted(
        [*((f'text {i}', f'sum {i}') for i in range(30)), ('text 1', 'other')]
    )
    sources = [{source for source, _ in all_pairs(rows)} for rows in (data.train, data.test)]
    assert len(sources[1]) == 3
    assert not sources[0] & sources[1]
    assert data.card.notes[:2] == ('1 left out: empty', '1 left out: doubles')


def test_a_file_of_its_own_to_test_on(tmp_path):
    path = csv_file(tmp_path / 'a.csv', [f'text {i},sum {i}' for i in range(9)])
    test = csv_file(tmp_path / 'b.csv', ['text 3,three', 'new,four'])
    data = open_csv(path, test_file=str(test))
    assert all_pairs(data.test) == [('text 3', 'three'), ('new', 'four')]
    assert ('text 3', 'sum 3') not in all_pairs(data.train)
    assert data.card.notes[0] == '1 left out: of the test file'


def refused(dataset, data_dir, **options):
    with pytest.raises(UsageError) as error:
        open_parallel(dataset, seq=8, data_dir=data_dir, **options)
    return str(error.value)


def test_what_cannot_be_opened(tmp_path, data_dir, monkeypatch):
    assert refused('wmt', data_dir) == (
        '--dataset=wmt: no such source of pairs; there are catalogues:LANG (such as de), csv:FILE '
        'and tfds:NAME; try --dataset=catalogues:zh'
    )
    assert refused('catalogues:tlh', data_dir) == (
        '--dataset=catalogues:tlh: Django has no messages in it; name a folder of '
        'django/conf/locale; try --dataset=catalogues:zh'
    )
    path = csv_file(tmp_path / 'a.csv', ['one,two'])
    assert refused(f'csv:{path}', data_dir, source_column='article').startswith(
        f"--dataset=csv:{path}: no column 'target'; the columns are article, summary"
    )
    empty = csv_file(tmp_path / 'c.csv', [' ,two', 'one,'], header='source,target')
    assert refused(f'csv:{empty}', data_dir) == (
        f'--dataset=csv:{empty}: no row has text in both source and target'
    )
    assert (
        refused(f'csv:{path}', data_dir, test_file='no.csv') == '--test_file=no.csv: no such file'
    )
    assert refused('catalogues:fr', data_dir, tokenizer='wordpiece') == (
        '--tokenizer=wordpiece: must be bytes or bpe; try --tokenizer=bpe'
    )
    with pytest.raises(UsageError, match=r'^--seq=1: must be at least 2; try --seq=64$'):
        open_parallel('catalogues:fr', seq=1, data_dir=data_dir)


def test_without_the_language_pack_django_is_enough(data_dir, monkeypatch):
    monkeypatch.setattr(pairs_module, 'PACKAGES', ('django', 'no_such_package_{}'))
    source = pairs_module.catalogue_pairs('de', data_dir=data_dir)
    assert source.key.startswith('catalogues-de_django_')
    assert 'no_such' not in source.key


def test_pairs_of_a_tfds_set(data_dir):
    """The builder's own set, read as any other; `hash` of the text keeps splits apart."""
    files = catalogue_files(package_root('django'), 'fr')
    build(CataloguePairs, CataloguesConfig(name='fr', files=files), data_dir=data_dir)
    source = pairs_module.open_pairs(
        'tfds:catalogue_pairs/fr',
        data_dir=data_dir,
        source_column='target',
        target_column='source',
        test_file='',
    )
    found = source.read()
    expected = read_translations(files).splits
    assert found.test == [(target, source) for source, target in expected['test']]
    held_out = {source for source, _ in found.test}
    assert not any(source in held_out for source, _ in found.train)
    options = {'source_column': 'en', 'target_column': 'fr', 'test_file': ''}
    with pytest.raises(UsageError) as error:
        pairs_module.open_pairs('tfds:catalogue_pairs/fr', data_dir=data_dir, **options)
    assert str(error.value) == (
        '--source_column=en: --dataset=tfds:catalogue_pairs/fr has no such feature; it has '
        'source, target; try --source_column=source'
    )
