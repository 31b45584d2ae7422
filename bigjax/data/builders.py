"""TFDS builders of the data sets made from files that are on the machine anyway.

They write ArrayRecord and need no TensorFlow. Importing this module imports
tensorflow_datasets (0.15 s), so it is imported only where something has to be prepared.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import tensorflow_datasets as tfds

from bigjax.data.catalogues import Message, read_messages, read_translations


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

    class StdlibText(tfds.core.GeneratorBasedBuilder):
        """Source text of the Python standard library."""

        VERSION = tfds.core.Version('1.0.0')
        name = 'stdlib_text'

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description=(
                    'Source text of the Python standard library of the interpreter that made it, '
                    'one example a file, in path order.'
                ),
                features=tfds.features.FeaturesDict(
                    {'path': tfds.features.Text(), 'text': tfds.features.Text()}
                ),
                homepage='https://docs.python.org/3/library/',
                citation='Python Software Foundation. The Python Standard Library.',
                license='Python Software Foundation License Version 2',
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
            for number, path in enumerate(paths):
                yield number, {'path': path, 'text': (root / path).read_bytes()}

    class CatalogueLanguages(tfds.core.GeneratorBasedBuilder):
        """Messages of an installed package, labelled with their language."""

        VERSION = tfds.core.Version('1.0.0')
        name = 'catalogue_languages'

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description=(
                    'Sentences from the gettext catalogues of an installed Python package (by '
                    'default Django), labelled with their language. No text is in two languages '
                    'or in two splits; all translations of a message are in the same split.'
                ),
                features=tfds.features.FeaturesDict(
                    {
                        'text': tfds.features.Text(doc='without placeholders and markup'),
                        'language': tfds.features.Text(doc='gettext name, such as de or zh_Hans'),
                        'message': tfds.features.Text(doc='as it stands in the catalogue'),
                        'msgid': tfds.features.Text(doc='the English it translates'),
                    }
                ),
                supervised_keys=('text', 'language'),
                homepage='https://www.djangoproject.com/',
                citation='Django Software Foundation and contributors. Django.',
                license='BSD-3-Clause (Django); else that of the package',
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            splits = read_messages(self.builder_config.root)
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows: list[Message]) -> Iterator:
            for number, row in enumerate(rows):
                yield number, row._asdict()

    class CataloguePairs(tfds.core.GeneratorBasedBuilder):
        """Messages of installed packages with their translations into one language."""

        VERSION = tfds.core.Version('1.0.0')
        name = 'catalogue_pairs'

        def _info(self) -> tfds.core.DatasetInfo:
            return self.dataset_info_from_configs(
                description=(
                    'English messages from the gettext catalogues of installed Python packages '
                    '(Django and the language packs of JupyterLab) with their translations. No '
                    'English message is there twice or in two splits.'
                ),
                features=tfds.features.FeaturesDict(
                    {
                        'source': tfds.features.Text(doc='the message in English'),
                        'target': tfds.features.Text(doc='its translation'),
                    }
                ),
                supervised_keys=('source', 'target'),
                homepage='https://www.djangoproject.com/',
                citation=(
                    'Django Software Foundation and contributors. Django. '
                    'Project Jupyter contributors. JupyterLab language packs.'
                ),
                license='BSD-3-Clause',
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            splits = read_translations(self.builder_config.files).splits
            return {split: self._generate_examples(pairs) for split, pairs in splits.items()}

        def _generate_examples(self, pairs: list[tuple[str, str]]) -> Iterator:
            for number, (source, target) in enumerate(pairs):
                yield number, {'source': source, 'target': target}


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
