"""TFDS builders of labelled words, texts and questions from the standard library's source.

Importing this module imports tensorflow_datasets, so it is imported only where something has to be
prepared.
"""

import collections
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from bigjax.data.builders import FilesConfig, LocalBuilder, SourceBuilder, build
from bigjax.data.card import Card
from bigjax.data.corpora import STDLIB_CITATION, STDLIB_LICENSE
from bigjax.data.source_code import docstrings, labelled_lines, questions
from bigjax.data.user_files import hold_out

with tfds.core.registered.skip_registration():

    class PythonNames(SourceBuilder):
        """Lines of Python with labelled names."""

        name = 'python_names'
        EVERY = 4
        ABOUT: ClassVar = {
            'description': (
                'Logical lines of every fourth file of the Python standard library as words, '
                'each with a label that the parser gives: names of modules imported, functions '
                'called, exceptions raised or caught, classes derived from and parameters '
                'declared, in the form O, B-TYPE, I-TYPE. Lines without any are left out.'
            ),
            'features': {
                'words': tfds.features.Sequence(tfds.features.Text()),
                'labels': tfds.features.Sequence(tfds.features.Text()),
            },
            'citation': STDLIB_CITATION,
            'license': STDLIB_LICENSE,
        }

        def rows(self, path, data):
            return (line._asdict() for line in labelled_lines(data))

    class DocstringQuestions(SourceBuilder):
        """Questions that docstrings answer."""

        name = 'docstring_questions'
        ABOUT: ClassVar = {
            'description': (
                'What functions of the Python standard library return or raise. A context is '
                'the docstrings of consecutive functions of a file, each under its name; the '
                'answer is what follows "return" in the docstring of the function asked about, '
                'up to the end of the sentence, or the exception that follows "raise".'
            ),
            'features': {
                'context': tfds.features.Text(),
                'question': tfds.features.Text(),
                'answer': tfds.features.Text(),
                'start': tfds.features.Scalar(np.int64, doc='characters before the answer'),
            },
            'citation': STDLIB_CITATION,
            'license': STDLIB_LICENSE,
        }

        def rows(self, path, data):
            return (question._asdict() for question in questions(data))

    class DocstringOrigins(LocalBuilder):
        """Docstrings, labelled with where they stand; its configuration is a `FilesConfig`."""

        name = 'docstring_origins'
        WORDS, TEXTS = 4, 100
        ABOUT: ClassVar = {
            'description': (
                'Docstrings of four words or more from the Python standard library, labelled with '
                'the module or package they are from, where it has a hundred or more. What stands '
                'in several of them is left out; a tenth of the texts is held out.'
            ),
            'features': {
                'text': tfds.features.Text(),
                'origin': tfds.features.Text(doc='module or package, such as email'),
            },
            'supervised_keys': ('text', 'origin'),
            'citation': STDLIB_CITATION,
            'license': STDLIB_LICENSE,
        }

        def examples(self):
            root, origins = Path(self.builder_config.root), collections.defaultdict(set)
            for path in (path for paths in self.builder_config.splits.values() for path in paths):
                for text in docstrings((root / path).read_bytes()):
                    origins[text].add(Path(path).parts[0].removesuffix('.py'))
            found = [
                (text, *where)
                for text, where in sorted(origins.items())
                if len(where) == 1 and len(text.split()) >= self.WORDS
            ]
            texts = collections.Counter(origin for _, origin in found)
            kept = [row for row in found if texts[row[1]] >= self.TEXTS]
            train, test = hold_out(kept, lambda row: row[0], 'docstrings')
            return {
                split: ({'text': text, 'origin': origin} for text, origin in rows)
                for split, rows in (('train', train), ('test', test))
            }


def prepare(
    builder: type[LocalBuilder], config: FilesConfig, description: str, *, data_dir: str
) -> tuple[tfds.core.DatasetBuilder, Card]:
    """Returns a builder whose data is prepared from the standard library's files, and a card."""
    made = build(builder, config, data_dir=data_dir)
    card = Card(
        name='stdlib',
        description=description,
        license=STDLIB_LICENSE,
        citation=STDLIB_CITATION,
        path=str(made.data_path),
    )
    return made, card
