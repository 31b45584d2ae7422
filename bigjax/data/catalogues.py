"""Messages in many languages, from the gettext catalogues of an installed package."""

import collections
import hashlib
import html
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from bigjax.experiment import UsageError

# A language with fewer distinct messages is left out.
MESSAGES_NEEDED = 300
PLACEHOLDERS = re.compile(
    r'%\([^)]*\)[#0\- +]*\d*(?:\.\d+)?[a-zA-Z]'  # %(name)s
    r'|%[#0\-+]*\d*(?:\.\d+)?[sdifrxc%]'  # %s
    r'|\{[^{}]*\}'  # {name}
    r'|<[^<>]*>'  # markup
)
IDEOGRAPHIC = re.compile(
    '[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]'
)


class Message(NamedTuple):
    """One translated message.

    Attributes:
        language: gettext's name of it, such as 'de' or 'zh_Hans'.
        text: the message without placeholders and markup.
        message: the message as it stands in the catalogue.
        msgid: what it translates, in English.
    """

    language: str
    text: str
    message: str
    msgid: str


def read_messages(root: str) -> dict[str, list[Message]]:
    """Returns the training and test messages in the catalogues below `root`.

    English is what the messages translate. Regional variants are left out where the language
    itself is there, and so are languages with few messages. A text found in two languages is left
    out of both; one found twice in a language stays once. All translations of an English message
    fall into the same split, a tenth of them into 'test', by a hash of that message.
    """
    by_language: dict[str, dict[str, Message]] = collections.defaultdict(dict)
    for message in all_messages(root):
        by_language[message.language].setdefault(message.text.casefold(), message)
    bases = {
        name: texts for name, texts in by_language.items() if not is_variant(name, by_language)
    }
    seen_in = collections.Counter(text for texts in bases.values() for text in texts)
    splits: dict[str, list[Message]] = {'train': [], 'test': []}
    for language in sorted(bases):
        own = {text: m for text, m in bases[language].items() if seen_in[text] == 1}
        if len(own) < MESSAGES_NEEDED:
            continue
        for text in sorted(own):
            digest = hashlib.sha256(clean(own[text].msgid).casefold().encode()).digest()
            splits['test' if digest[0] < 26 else 'train'].append(own[text])
    return splits


def is_variant(language: str, languages: Iterable[str]) -> bool:
    """Returns whether `language` is, like 'es_MX', a form of another one there."""
    base = language.split('_')[0]
    return base != language and base in languages


def all_messages(root: str) -> Iterator[Message]:
    """Yields the messages of every catalogue below `root` that have enough letters."""
    for path in sorted(Path(root).rglob('LC_MESSAGES/*.mo')):
        language = path.parent.parent.name
        for msgid, translations in read_mo(path):
            # A plural message holds both English forms, and one translation for each number.
            pairs = [(language, text) for text in translations]
            for name, text in (*pairs, *(('en', text) for text in msgid.split('\0'))):
                cleaned = clean(text)
                if worth_keeping(cleaned) and (name == 'en' or text != msgid):
                    yield Message(name, cleaned, text, msgid.split('\0')[0])


def clean(text: str) -> str:
    """Returns a message without placeholders, markup, entities and runs of spaces."""
    text = html.unescape(PLACEHOLDERS.sub(' ', text))
    return ' '.join(text.split()).strip(' "\'“”„«»:;,.…()[]-–—')


def worth_keeping(text: str) -> bool:
    """Returns whether a text has enough letters for its language to be told."""
    letters = sum(character.isalpha() for character in text)
    return letters >= (4 if IDEOGRAPHIC.search(text) else 10) and letters >= len(text) / 2


def read_mo(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields the English text and the translations of each message in a compiled catalogue.

    The format is that of the GNU gettext manual, section "The Format of GNU MO Files".

    Raises:
        UsageError: the file is damaged; it is named.
    """
    data = path.read_bytes()
    try:
        order = {b'\xde\x12\x04\x95': '<', b'\x95\x04\x12\xde': '>'}[data[:4]]
        count, originals, translations = struct.unpack_from(f'{order}3I', data, 8)
        for row in range(count):
            texts = []
            for table in (originals, translations):
                length, start = struct.unpack_from(f'{order}2I', data, table + 8 * row)
                if start + length > len(data):
                    raise ValueError(f'message {row} lies past its end')
                texts.append(data[start : start + length].decode())
            msgid, message = texts
            if msgid and message:  # the empty message is the header
                yield msgid.split('\4')[-1], message.split('\0')
    except (KeyError, ValueError, struct.error) as error:
        raise UsageError(f'{path}: damaged message catalogue ({error})') from error


def package_root(package: str) -> str:
    """Returns the folder of an installed package, which is not imported.

    Raises:
        UsageError: it is not installed.
    """
    import importlib.util

    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f'--dataset=catalogues: the package {package}, whose message catalogues it is made '
            f'of, is not installed; try pip install {package}'
        )
    return os.fspath(spec.submodule_search_locations[0])


class Translations(NamedTuple):
    """Messages of several packages with their translations into one language.

    Attributes:
        splits: 'train' and 'test' -> (English, translation) pairs, no English text twice.
        left_out: how many messages are not among them, by reason.
    """

    splits: dict[str, list[tuple[str, str]]]
    left_out: dict[str, int]


def catalogue_files(root: str, language: str) -> list[str]:
    """Returns the catalogues below `root` in a language, such as 'de', 'es_MX' or 'zh'.

    A regional name is accepted for the language where packages differ in it: de and de_DE.
    """
    names = {language, f'{language}_{language.upper()}'}
    if language == 'zh':
        names |= {'zh_Hans', 'zh_CN'}
    files = sorted(Path(root).rglob('LC_MESSAGES/*.mo'))
    return [os.fspath(path) for path in files if path.parent.parent.name in names]


def read_translations(files: Iterable[str]) -> Translations:
    """Returns the messages of catalogues as pairs of texts.

    Placeholders and markup stay, as a translation keeps them; runs of spaces and line ends become
    one space. Of a plural message, singular and plural are pairs of their own. An English text that
    occurs twice keeps its first translation; one whose translation equals it is left out. A tenth
    of the pairs falls into 'test', by a hash of the English words alone, so that messages that
    differ in punctuation, case or markup are on the same side.
    """
    left_out = {'untranslated': 0, 'without words': 0, 'doubles': 0}
    pairs: dict[str, str] = {}
    for file in files:
        for msgid, translations in read_mo(Path(file)):
            forms = msgid.split('\0')
            # The first form of a translation is the singular, the last one a plural.
            ends = translations[0], translations[-1]
            for english, translation in zip(forms, ends, strict=False):
                source, target = (' '.join(text.split()) for text in (english, translation))
                if not clean(source) or not clean(target):
                    left_out['without words'] += 1
                elif source == target:
                    left_out['untranslated'] += 1
                elif source in pairs:
                    left_out['doubles'] += 1
                else:
                    pairs[source] = target
    splits: dict[str, list[tuple[str, str]]] = {'train': [], 'test': []}
    for source, target in sorted(pairs.items()):
        digest = hashlib.sha256(clean(source).casefold().encode()).digest()
        splits['test' if digest[0] < 26 else 'train'].append((source, target))
    return Translations(splits, left_out)
