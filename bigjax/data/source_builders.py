"""TFDS builders of labelled words and answered questions from the standard library's source.

Importing this module imports tensorflow_datasets, so it is imported only where something has to be
prepared.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from bigjax.data.source_code import labelled_lines, questions

LICENSE = 'Python Software Foundation License Version 2'
CITATION = 'Python Software Foundation. The Python Standard Library.'

with tfds.core.registered.skip_registration():

    class PythonNames(tfds.core.GeneratorBasedBuilder):
        """Lines of Python with labelled names."""

        VERSION = tfds.core.Version('1.0.0')
        name = 'python_names'

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description=(
                    'Logical lines of every fourth file of the Python standard library as words, '
                    'each with a label that the parser gives: names of modules imported, functions '
                    'called, exceptions raised or caught, classes derived from and parameters '
                    'declared, in the form O, B-TYPE, I-TYPE. Lines without any are left out.'
                ),
                features=tfds.features.FeaturesDict(
                    {
                        'words': tfds.features.Sequence(tfds.features.Text()),
                        'labels': tfds.features.Sequence(tfds.features.Text()),
                    }
                ),
                citation=CITATION,
                license=LICENSE,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            config = self.builder_config
            return {
                split: self._generate_examples(Path(config.root), paths[::4])
                for split, paths in config.splits.items()
            }

        def _generate_examples(self, root: Path, paths: list[str]) -> Iterator:
            lines = (line for path in paths for line in labelled_lines((root / path).read_bytes()))
            for number, line in enumerate(lines):
                yield number, line._asdict()

    class DocstringQuestions(tfds.core.GeneratorBasedBuilder):
        """Questions that docstrings answer."""

        VERSION = tfds.core.Version('1.0.0')
        name = 'docstring_questions'

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description=(
                    'What functions of the Python standard library return or raise. A context is '
                    'the docstrings of consecutive functions of a file, each under its name; the '
                    'answer is what follows "return" in the docstring of the function asked about, '
                    'up to the end of the sentence, or the exception that follows "raise".'
                ),
                features=tfds.features.FeaturesDict(
                    {
                        'context': tfds.features.Text(),
                        'question': tfds.features.Text(),
                        'answer': tfds.features.Text(),
                        'start': tfds.features.Scalar(np.int64, doc='characters before the answer'),
                    }
                ),
                citation=CITATION,
                license=LICENSE,
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            config = self.builder_config
            return {
                split: self._generate_examples(Path(config.root), paths)
                for split, paths in config.splits.items()
            }

        def _generate_examples(self, root: Path, paths: list[str]) -> Iterator:
            found = (one for path in paths for one in questions((root / path).read_bytes()))
            for number, question in enumerate(found):
                yield number, question._asdict()
