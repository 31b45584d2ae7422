"""Subword tokenizers with special tokens: WordPiece, RoBERTa's BPE, those of pretrained models.

HF `tokenizers` does the work; here is what BERT-like models need to know of it.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bigjax.data.tokenizers import byte_letters, encoded, token_dtype
from bigjax.experiment import UsageError

if TYPE_CHECKING:
    import tokenizers

# What BERT and RoBERTa call begin, end (which separates, too), padding, unknown and mask.
BERT_SPECIAL = ('[CLS]', '[SEP]', '[PAD]', '[UNK]', '[MASK]')
ROBERTA_SPECIAL = ('<s>', '</s>', '<pad>', '<unk>', '<mask>')


@dataclasses.dataclass(frozen=True)
class Template:
    """How one text or two become a row of tokens: begin, first, (between, second,) end.

    Attributes:
        begin: token in front.
        between: tokens between two texts; the first of them ends the first text.
        end: token at the end.
    """

    begin: int
    between: tuple[int, ...]
    end: int

    def room(self, length: int, *, pair: bool) -> int:
        """Returns how many tokens of text a row of `length` tokens has room for."""
        return length - 2 - (len(self.between) if pair else 0)

    def join(
        self, first: np.ndarray, second: np.ndarray | None = None, *, length: int
    ) -> np.ndarray:
        """Returns int32 [length], -1 after the end; the longer of two texts is cut first."""
        room = self.room(length, pair=second is not None)
        row = np.full(length, -1, np.int32)
        parts: list[Sequence[int] | np.ndarray] = [[self.begin], first[:room], [self.end]]
        if second is not None:
            a, b = len(first), len(second)
            if a + b > room:
                a = min(a, max(room - b, (room + 1) // 2))
                b = room - a
            parts = [[self.begin], first[:a], self.between, second[:b], [self.end]]
        tokens = np.concatenate([np.asarray(part, np.int32) for part in parts])
        row[: len(tokens)] = tokens
        return row


class SubwordTokenizer:
    """A tokenizer of HF `tokenizers`, read from its file.

    Attributes:
        name: names the kind and the size.
        vocab_size: token numbers lie in [0, vocab_size).
        token_bytes: int32 [vocab_size], bytes of text each token stands for; 0 for special ones.
        continues: bool [vocab_size], whether a token goes on with the word before it.
        special: bool [vocab_size], whether it stands for no text.
        template: how rows are made, None where the special tokens for that are missing.
        mask: the token that hides others, None if there is none.
    """

    def __init__(self, path: Path):
        import tokenizers

        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.model.no_truncation()
        self.model.no_padding()
        # A text that holds '[SEP]' holds these five characters, not the end of a text.
        self.model.encode_special_tokens = True
        pieces, decoder = self.model.get_vocab(), str(self.model.decoder)
        self.vocab_size = max(pieces.values()) + 1
        self.name = f'subwords{self.vocab_size}'
        added = self.model.get_added_tokens_decoder()
        self.special = np.zeros(self.vocab_size, bool)
        self.special[[number for number, token in added.items() if token.special]] = True
        self.special[[pieces[p] for p in (*BERT_SPECIAL, *ROBERTA_SPECIAL) if p in pieces]] = True
        self.byte_level = 'ByteLevel' in decoder
        byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        self.continues = np.zeros(self.vocab_size, bool)
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for piece, number in pieces.items():
            # What was added to a byte-level vocabulary stands there as it is.
            kind = '' if self.byte_level and number in added else decoder
            if not self.special[number]:
                self.continues[number], self.token_bytes[number] = measured(piece, kind, byte_of)
        own = ROBERTA_SPECIAL if '<mask>' in pieces else BERT_SPECIAL
        begin, end, _, self.unknown, self.mask = (pieces.get(piece) for piece in own)
        self.template = None
        if begin is not None and end is not None:
            # RoBERTa ends the first text and begins the second with </s>.
            self.template = Template(begin, (end,) * (2 if own is ROBERTA_SPECIAL else 1), end)

    def encode(self, text: str) -> np.ndarray:
        """Returns the tokens of `text`, int32 [n], without special ones around it."""
        return np.array(self.model.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens, int32 [n], and where each stands in `text`, int32 [n, 2]."""
        encoding = self.model.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        return np.array(encoding.ids, np.int32), offsets

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of each word, one at least (a word of nothing is unknown)."""
        # In a sentence, a byte-level tokenizer sees a word with the space before it.
        texts = [f' {word}' for word in words] if self.byte_level else list(words)
        found = self.model.encode_batch(texts, add_special_tokens=False)
        unknown = self.unknown if self.unknown is not None else 0
        return [encoding.ids or [unknown] for encoding in found]

    def encode_documents(self, documents: Iterable[bytes]) -> Iterator[np.ndarray]:
        """Yields the tokens of each document, uint16 or uint32 [n]."""
        return encoded(self.model, documents, token_dtype(self.vocab_size))

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `tokens`, without negative and special ones."""
        kept = [token for token in np.asarray(tokens).tolist() if token >= 0]
        return self.model.decode(kept, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json into `folder`."""
        self.model.save(str(folder / 'tokenizer.json'))


def measured(piece: str, decoder: str, byte_of: Mapping[str, int]) -> tuple[bool, int]:
    """Returns whether a piece goes on with a word, and how many bytes it stands for.

    Args:
        piece: its letters in the vocabulary.
        decoder: description of the tokenizer's decoder.
        byte_of: the byte of each letter in a byte-level vocabulary.
    """
    if 'ByteLevel' in decoder:
        # One letter a byte; spaces and signs begin anew.
        first = byte_of[piece[0]]
        return first >= 0x80 or chr(first).isalnum(), len(piece)
    if 'Fuse' in decoder:  # SentencePiece
        is_byte = piece.startswith('<0x')
        size = 1 if is_byte else len(piece.replace('▁', ' ').encode())
        return not piece.startswith('▁'), size
    return piece.startswith('##'), len(piece.removeprefix('##').encode())


def train_subwords(texts: Iterable[str], *, kind: str, vocab: int, path: Path) -> None:
    """Trains a tokenizer of `vocab` tokens, special ones included, and writes it to `path`.

    Args:
        texts: what to train on.
        kind: 'wordpiece' (lower case, without accents), 'wordpiece_cased' or 'masked_bpe'.
        vocab: number of tokens.
        path: of the file, in the format of HF `tokenizers`.
    """
    import tokenizers

    trainer: tokenizers.trainers.Trainer
    if kind == 'masked_bpe':
        begin, end, pad, unknown, mask = ROBERTA_SPECIAL
        model = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[begin, pad, end, unknown, mask],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        begin, end, pad, unknown, mask = BERT_SPECIAL
        empty = tokenizers.models.WordPiece(unk_token=unknown)
        model = _wordpiece(empty, lowercase=kind == 'wordpiece')
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=vocab,
            special_tokens=[pad, unknown, begin, end, mask],
            show_progress=False,
        )
    model.train_from_iterator(texts, trainer)
    model.save(str(path))


def read_folder(folder: str) -> 'tokenizers.Tokenizer':
    """Returns the tokenizer of a pretrained model's folder, or of a tokenizer.json.

    A folder has tokenizer.json, or vocab.txt (BERT's WordPiece), or vocab.json and merges.txt
    (GPT-2's and RoBERTa's byte-level BPE).

    Raises:
        UsageError: it has none of them, or they cannot be read.
    """
    import tokenizers

    path = Path(folder).expanduser()
    file = path if path.is_file() else path / 'tokenizer.json'
    try:
        if file.is_file():
            return tokenizers.Tokenizer.from_file(str(file))
        if (path / 'vocab.txt').is_file():
            lower = _config(path).get('do_lower_case', True)
            vocab = tokenizers.models.WordPiece.read_file(str(path / 'vocab.txt'))
            words = tokenizers.models.WordPiece(vocab, unk_token='[UNK]')
            model = _wordpiece(words, lowercase=lower)
            special = [piece for piece in BERT_SPECIAL if piece in vocab]
        elif (path / 'vocab.json').is_file() and (path / 'merges.txt').is_file():
            files = str(path / 'vocab.json'), str(path / 'merges.txt')
            vocab, merges = tokenizers.models.BPE.read_file(*files)
            model = _byte_level(tokenizers.models.BPE(vocab, merges))
            special = [piece for piece in (*ROBERTA_SPECIAL, '<|endoftext|>') if piece in vocab]
        else:
            raise UsageError(
                f'--tokenizer={folder}: has neither tokenizer.json, nor vocab.txt, nor vocab.json '
                'with merges.txt; name the folder of a pretrained model, or try '
                '--tokenizer=wordpiece'
            )
    except UsageError:
        raise
    except Exception as error:  # what HF `tokenizers` raises is Exception itself
        raise UsageError(f'--tokenizer={folder}: cannot be read ({error})') from error
    model.add_special_tokens(special)
    return model


def _config(path: Path) -> dict:
    file = path / 'tokenizer_config.json'
    return json.loads(file.read_text('utf-8')) if file.is_file() else {}


def _wordpiece(words: 'tokenizers.models.Model', *, lowercase: bool) -> 'tokenizers.Tokenizer':
    import tokenizers

    model = tokenizers.Tokenizer(words)
    model.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    model.decoder = tokenizers.decoders.WordPiece()
    return model


def _byte_level(pairs: 'tokenizers.models.Model') -> 'tokenizers.Tokenizer':
    import tokenizers

    model = tokenizers.Tokenizer(pairs)
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    return model
