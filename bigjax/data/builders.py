"""TFDS builders of the data sets made from files that are on the machine anyway.

They write ArrayRecord and need no TensorFlow. Importing this module imports
tensorflow_datasets, so it is imported only where something has to be prepared.
"""

import abc
import contextlib
import dataclasses
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import absl.logging
import tensorflow_datasets as tfds

from bigjax.data.catalogues import read_messages, read_translations
from bigjax.data.corpora import STDLIB_CITATION, STDLIB_LICENSE


@dataclasses.dataclass(eq=False)
class FilesConfig(tfds.core.BuilderConfig):
    """A named list of files for each split.

    Attributes:
        root: folder the paths are relative to.
        splits: split -> paths, in order.
    """

    root: str = ''
    splits: dict[str, list[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class CataloguesConfig(tfds.core.BuilderConfig):
    """Compiled message catalogues of one language.

    Attributes:
        files: paths.
    """

    files: list[str] = dataclasses.field(default_factory=list)


with tfds.core.registered.skip_registration():

    class LocalBuilder(tfds.core.GeneratorBasedBuilder):
        """Examples in their order; subclasses say where they are from, and what is told of them.

        Attributes:
            ABOUT: arguments of TFDS's DatasetInfo; 'features' are a plain dict.
        """

        VERSION = tfds.core.Version('1.0.0')
        ABOUT: ClassVar[dict[str, Any]]

        @abc.abstractmethod
        def examples(self) -> dict[str, Iterable[dict[str, Any]]]:
            """Returns the examples of each split."""

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict(self.ABOUT['features'])
            about = {**self.ABOUT, 'features': features, 'disable_shuffling': True}
            return self.dataset_info_from_configs(**about)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: self._generate_examples(rows) for split, rows in self.examples().items()}

        def _generate_examples(self, rows: Iterable[dict[str, Any]]) -> Iterator:
            yield from enumerate(rows)

    class SourceBuilder(LocalBuilder):
        """Examples that files give one after the other; its configuration is a `FilesConfig`.

        Attributes:
            EVERY: of how many files one is read.
        """

        EVERY = 1

        @abc.abstractmethod
        def rows(self, path: str, data: bytes) -> Iterable[dict[str, Any]]:
            """Returns the examples of one file."""

        def examples(self):
            root, splits = Path(self.builder_config.root), self.builder_config.splits
            return {
                split: (
                    row
                    for path in paths[:: self.EVERY]
                    for row in self.rows(path, (root / path).read_bytes())
                )
                for split, paths in splits.items()
            }

    class StdlibText(SourceBuilder):
        """Source text of the Python standard library."""

        name = 'stdlib_text'
        ABOUT: ClassVar = {
            'description': (
                'Source text of the Python standard library of the interpreter that made it, '
                'one example a file, in path order.'
            ),
            'features': {'path': tfds.features.Text(), 'text': tfds.features.Text()},
            'homepage': 'https://docs.python.org/3/library/',
            'citation': STDLIB_CITATION,
            'license': STDLIB_LICENSE,
        }

        def rows(self, path, data):
            return [{'path': path, 'text': data}]

    class CatalogueLanguages(LocalBuilder):
        """Messages of an installed package, labelled with their language."""

        name = 'catalogue_languages'
        ABOUT: ClassVar = {
            'description': (
                'Sentences from the gettext catalogues of an installed Python package (by '
                'default Django), labelled with their language. No text is in two languages '
                'or in two splits; all translations of a message are in the same split.'
            ),
            'features': {
                'text': tfds.features.Text(doc='without placeholders and markup'),
                'language': tfds.features.Text(doc='gettext name, such as de or zh_Hans'),
                'message': tfds.features.Text(doc='as it stands in the catalogue'),
                'msgid': tfds.features.Text(doc='the English it translates'),
            },
            'supervised_keys': ('text', 'language'),
            'homepage': 'https://www.djangoproject.com/',
            'citation': 'Django Software Foundation and contributors. Django.',
            'license': 'BSD-3-Clause (Django); else that of the package',
        }

        def examples(self):
            splits = read_messages(self.builder_config.root)
            return {split: (row._asdict() for row in rows) for split, rows in splits.items()}

    class CataloguePairs(LocalBuilder):
        """Messages of installed packages with their translations into one language."""

        name = 'catalogue_pairs'
        ABOUT: ClassVar = {
            'description': (
                'English messages from the gettext catalogues of installed Python packages '
                '(Django and the language packs of JupyterLab) with their translations. No '
                'English message is there twice or in two splits.'
            ),
            'features': {
                'source': tfds.features.Text(doc='the message in English'),
                'target': tfds.features.Text(doc='its translation'),
            },
            'supervised_keys': ('source', 'target'),
            'homepage': 'https://www.djangoproject.com/',
            'citation': (
                'Django Software Foundation and contributors. Django. '
                'Project Jupyter contributors. JupyterLab language packs.'
            ),
            'license': 'BSD-3-Clause',
        }

        def examples(self):
            splits = read_translations(self.builder_config.files).splits
            return {
                split: ({'source': source, 'target': target} for source, target in pairs)
                for split, pairs in splits.items()
            }


def build(
    builder: type[tfds.core.GeneratorBasedBuilder],
    config: tfds.core.BuilderConfig,
    *,
    data_dir: str,
) -> tfds.core.DatasetBuilder:
    """Returns a builder whose data is prepared under `data_dir` as ArrayRecord, in silence."""
    verbosity = absl.logging.get_verbosity()
    # TFDS prints to stdout, which belongs to what the user asked for, and logs the whole config.
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            made = builder(data_dir=data_dir, config=config)
            made.download_and_prepare(file_format='array_record')
    finally:
        absl.logging.set_verbosity(verbosity)
    return made
