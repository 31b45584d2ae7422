"""The builders of labelled words and questions, on a small source of their own."""

from bigjax.data import builders, source_builders

SOURCE = '''
import os


def area(width, height):
    """Returns the product of both sides."""
    return os.fspath(width * height)
'''


def test_both_builders_write_what_the_parser_finds(tmp_path):
    for name in ('a.py', 'b.py'):
        (tmp_path / name).write_text(SOURCE)
    config = builders.FilesConfig(
        name='small', root=str(tmp_path), splits={'train': ['a.py'], 'validation': ['b.py']}
    )
    data_dir = str(tmp_path / 'data')
    names = builders.build(source_builders.PythonNames, config, data_dir=data_dir)
    found = [
        pair
        for row in names.as_data_source(split='train')
        for pair in zip(row['words'], row['labels'], strict=True)
        if pair[1] != b'O'
    ]
    assert found == [
        (b'os', b'B-module'), (b'width', b'B-parameter'), (b'height', b'B-parameter'),
        (b'os', b'B-function'), (b'.', b'I-function'), (b'fspath', b'I-function'),
    ]  # fmt: skip
    asked = builders.build(source_builders.DocstringQuestions, config, data_dir=data_dir)
    (row,) = asked.as_data_source(split='validation')
    assert row['question'] == b'What does area return?'
    assert row['answer'] == b'the product of both sides'
    assert row['context'][row['start'] :].startswith(row['answer'])
    assert names.info.redistribution_info.license.startswith('Python Software Foundation')


def test_docstrings_keep_where_they_are_from(tmp_path, monkeypatch):
    monkeypatch.setattr(source_builders.DocstringOrigins, 'TEXTS', 5)

    def write(path, texts):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        functions = [f'def f{n}():\n    """{text}"""\n' for n, text in enumerate(texts)]
        (tmp_path / path).write_text('\n'.join(functions))

    told = [f'Number {n} of a package.' for n in range(20)]
    write('pack/one.py', [*told[:10], 'What both of them say.'])
    write('pack/two.py', [*told[10:], 'Too short.'])
    write('alone.py', [*(f'The module has {n}.' for n in range(5)), 'What both of them say.'])
    write('few.py', ['Four of these in all.', 'Not as many as needed.'])
    (tmp_path / 'broken.py').write_text('def')
    paths = ['alone.py', 'broken.py', 'few.py', 'pack/one.py', 'pack/two.py']
    config = builders.FilesConfig(
        name='small', root=str(tmp_path), splits={'train': paths[:2], 'validation': paths[2:]}
    )
    made = builders.build(source_builders.DocstringOrigins, config, data_dir=str(tmp_path / 'data'))
    parts = [
        [(row['text'].decode(), row['origin'].decode()) for row in made.as_data_source(split=split)]
        for split in ('train', 'test')
    ]
    assert [len(part) for part in parts] == [23, 2]
    expected = dict.fromkeys(told, 'pack') | {f'The module has {n}.': 'alone' for n in range(5)}
    assert dict(parts[0] + parts[1]) == expected
