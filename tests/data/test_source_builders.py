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
