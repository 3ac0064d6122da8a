"""Text to ids and back, with image, begin, end and padding ids that no text can ever produce."""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as hf_decoders

from lcl_mcore.config.base import require
from lcl_mcore.config.schema import Cleaning, RunConfig, TokenizerConfig
from lcl_mcore.data.vocabulary_file import MAX_BYTES, read_definition, read_vocabulary, require_sound_ids
from lcl_mcore.errors import DataError, explain
from lcl_mcore.storage import atomic_write
from lcl_mcore.untrusted import open_regular, parse_object

CLIP_MERGES = 48_894
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MAX_MERGE_LIST_BYTES = 16 << 20


@dataclass(frozen=True)
class SpecialIds:
    """The ids that stand for structure instead of text."""

    bos: int
    eos: int
    pad: int
    boi: int
    eoi: int
    image: int
    vocab_size: int


class Tokenizer:
    """Encodes ordinary text only. Markers inside a document's text stay ordinary characters."""

    def __init__(self, backend: tokenizers.Tokenizer, ids: SpecialIds, *, cleaning: Cleaning = "none") -> None:
        self._definition = backend.to_str()
        self._backend = _without_special_matching(self._definition)
        self._ids = ids
        self.cleaning = cleaning
        self._reserved = {ids.bos, ids.eos, ids.boi, ids.eoi, ids.image}
        if ids.pad >= self.text_size:
            self._reserved.add(ids.pad)

    bos = property(lambda self: self._ids.bos, doc="begins a document")
    eos = property(lambda self: self._ids.eos, doc="ends a document")
    pad = property(lambda self: self._ids.pad, doc="fills the end of a sequence")
    boi = property(lambda self: self._ids.boi, doc="stands before an image")
    eoi = property(lambda self: self._ids.eoi, doc="stands after an image")
    image = property(lambda self: self._ids.image, doc="holds the place of one image latent")
    vocab_size = property(lambda self: self._ids.vocab_size, doc="text and special ids")

    @property
    def text_size(self) -> int:
        """Number of ids of the underlying vocabulary."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def fingerprint(self) -> str:
        """Changes with the vocabulary, its rules, the special ids and the cleaning of texts."""
        cleaning = self.ftfy_version or self.cleaning == "html"  # html or not is all that earlier versions knew
        content = json.dumps([json.loads(self._definition), self._ids.__dict__, cleaning])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def ftfy_version(self) -> str | None:
        """Of the package that cleans texts, whose versions differ in what they do; None without it."""
        return str(ftfy.__version__) if self.cleaning == "released" else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without begin or end."""
        return self._encode_cleaned([self._clean(text) for text in texts])

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without begin or end."""
        return self.encode_batch([text])[0]

    def encode_parts(self, parts: Sequence[str]) -> list[list[int]]:
        """Ids of the texts between the images of one document, which is cleaned as a whole.

        The released MMC4 loader does so: it writes images as words in angle brackets, cleans everything at once, and
        ftfy judges a line by all its characters. Here the document's hash stands for an image, which no text can hold.
        """
        digest = hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()
        return self._encode_cleaned(self._clean(f"<{digest}>".join(parts)).split(f"<{digest}>"))

    def _encode_cleaned(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[i for i in item.ids if i not in self._reserved] for item in encoded]

    def decode(self, ids: Iterable[int], *, markers: bool = False) -> str:
        """Text of ids; with `markers`, special ids appear as readable marks instead of vanishing."""
        names = {self.bos: "<bos>", self.eos: "<eos>", self.boi: "<BoI>", self.eoi: "<EoI>", self.image: "<image>"}
        parts: list[str] = []
        run: list[int] = []
        for i in ids:
            if i not in self._reserved and i != self.pad:
                run.append(i)
                continue
            parts.append(self._backend.decode(run))
            run = []
            if markers:
                parts.append(names.get(i, "<pad>"))
        parts.append(self._backend.decode(run))
        return "".join(parts)

    def save(self, path: Path) -> None:
        """Write the underlying vocabulary as `tokenizer.json`."""
        atomic_write(path, self._definition)

    def _clean(self, text: str) -> str:
        text = text.encode("utf-8", "replace").decode()  # lone surrogates become question marks
        if self.cleaning == "released":
            text = ftfy.fix_text(text)
        if self.cleaning != "none":
            text = " ".join(html.unescape(html.unescape(text)).split())
        return text.lower() if self.cleaning == "released" else text


def tokenizer_for(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run.

    Raises:
        ConfigError: it has more entries than the model's embedding.
    """
    tokenizer = build_tokenizer(config.data.tokenizer)
    rows = config.model.language.vocab_size
    require(
        tokenizer.vocab_size <= rows,
        f"a tokenizer of {tokenizer.vocab_size} entries with model.language.vocab_size = {rows}",
        "every id needs a row of the embedding",
        "Raise the model's vocab_size or train a smaller tokenizer.",
    )
    return tokenizer


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a configuration asks for."""
    if config.kind == "clip":
        ids = SpecialIds(bos=49406, eos=49407, pad=0, boi=49409, eoi=49410, image=49408, vocab_size=49411)
        return _named(config, ids, expected=49408, ends=("<|startoftext|>", "<|endoftext|>"))
    if config.kind == "opt":
        ids = SpecialIds(bos=2, eos=2, pad=1, boi=50265, eoi=50266, image=50267, vocab_size=50272)
        return _named(config, ids, expected=50265, ends=("</s>", "</s>"))
    backend = _read(config.path)
    _require_every_text(backend, config.path)
    return _after_last_id(backend, config.resolved_cleaning)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE vocabulary of at most `vocab_size` text ids, learnt from `texts`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf_decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return _after_last_id(backend)


def _after_last_id(backend: tokenizers.Tokenizer, cleaning: Cleaning = "none") -> Tokenizer:
    """Any vocabulary: six new ids follow its last one."""
    n = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    ids = SpecialIds(bos=n, eos=n + 1, pad=n + 2, boi=n + 3, eoi=n + 4, image=n + 5, vocab_size=n + 6)
    return Tokenizer(backend, ids, cleaning=cleaning)


def _named(config: TokenizerConfig, ids: SpecialIds, *, expected: int, ends: tuple[str, str]) -> Tokenizer:
    """OPT's or CLIP's vocabulary, checked to be just that."""
    backend = _read(config.path, kind=config.kind)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    found = (len(vocabulary), vocabulary.get(ends[0]), vocabulary.get(ends[1]))
    if found != (expected, ids.bos, ids.eos):
        raise DataError(
            explain(
                f"tokenizer {config.path}: size and ids of {ends} are {found}",
                f"{config.kind.upper()}'s are {(expected, ids.bos, ids.eos)}",
                "Point data.tokenizer.path at the right vocabulary, or use kind = file.",
            )
        )
    if config.kind == "clip" and config.resolved_cleaning == "released":
        backend.normalizer = normalizers.Sequence([])  # texts come cleaned: the file's own rules differ in rare letters
        backend.pre_tokenizer = _clip_words(f"(?i){CLIP_WORDS}")
    return Tokenizer(backend, ids, cleaning=config.resolved_cleaning)


def _read(path: str, *, kind: str = "file") -> tokenizers.Tokenizer:
    """A vocabulary from a file, a folder, or a model name in the local Hugging Face cache."""
    place = Path(path)
    if not place.exists():
        place = _cached_snapshot(path)
    # Of two files that belong together either may be given; nothing else stands for its folder.
    folder = place.parent if place.name in ("vocab.json", "merges.txt") and place.is_file() else place
    try:
        if place.name.endswith(".txt.gz"):
            return _clip_from_merges(place)
        if place.is_file() and folder == place:
            _refuse_sentencepiece(place)
            return _defined(read_definition(place))
        if (folder / "tokenizer.json").is_file():
            return _defined(read_definition(folder / "tokenizer.json"))
        packed = sorted(folder.glob("bpe_simple_vocab*.txt.gz"))
        if packed:
            return _clip_from_merges(packed[0])
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            if kind == "clip":  # its merges end words with </w>, unlike GPT-2's and OPT's
                return _clip_from_merges(folder / "merges.txt")
            return _byte_level(folder / "vocab.json", folder / "merges.txt")
        for other in sorted(folder.glob("*.model")):
            _refuse_sentencepiece(other)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception for a malformed file, and so does what reads it
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "Give a tokenizer.json, or the folder of a model that has one."
        raise DataError(explain(f"tokenizer {path}", f"is not a readable vocabulary ({reason})", remedy)) from error
    where = "that path" if place.exists() else f"that path, or under that name in {_cache()}"
    raise DataError(
        explain(
            f"tokenizer {path or '(no path)'}",
            f"no tokenizer.json, vocab.json with merges.txt, or bpe_simple_vocab_16e6.txt.gz is at {where}",
            "Set data.tokenizer.path to a file or folder that has one. Nothing is downloaded here: get a model's "
            "files with `hf download NAME vocab.json merges.txt` where there is a network.",
        )
    )


def _refuse_sentencepiece(path: Path) -> None:
    """SentencePiece's `tokenizer.model` is a protocol buffer that begins with its first piece.

    Raises:
        DataError: it is one.
    """
    with open_regular(path) as file:
        head = file.read(4)
    if path.suffix == ".model" or (head[:1] == b"\n" and head[2:3] == b"\n"):
        raise DataError(
            explain(
                f"tokenizer {path}",
                "a SentencePiece model is not read here, it must be converted to tokenizer.json",
                "With transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT), then give OUT.",
            )
        )


_ANY_TEXT = ("a", "Z", "7", "~", "\u00e9", "\u0416", "\u05d0", "\u0905", "\u4e2d", "\uac00", "\U0001f389")
"""Letters, digits and signs of many scripts, and one that few vocabularies have."""


def _require_every_text(backend: tokenizers.Tokenizer, path: str) -> None:
    """A vocabulary must have ids for whatever stands in a document.

    Raises:
        DataError: it has neither bytes nor an unknown token to fall back on.
    """
    try:
        encoded = backend.encode_batch(_ANY_TEXT, add_special_tokens=False)
    except Exception as error:  # bare, as above
        raise DataError(
            explain(
                f"tokenizer {path}",
                f"has no unknown token for texts outside its vocabulary ({' '.join(str(error).split())[:120]})",
                "Train it with an unknown token (unk_token, for Unigram also unk_id) or on bytes.",
            )
        ) from error
    lost = [text for text, item in zip(_ANY_TEXT, encoded, strict=True) if not item.ids]
    if lost:
        raise DataError(
            explain(
                f"tokenizer {path}",
                f"gives no ids at all for {', '.join(map(ascii, lost[:4]))}, which would vanish from every text",
                "Train it with an unknown token (unk_token) or on bytes.",
            )
        )


def _cache() -> Path:
    """The local Hugging Face cache."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def _cached_snapshot(name: str) -> Path:
    """The newest local snapshot of a Hugging Face model; nothing is downloaded."""
    snapshots = _cache() / f"models--{name.replace('/', '--')}" / "snapshots"
    found = sorted(snapshots.glob("*"), key=lambda p: p.stat().st_mtime) if snapshots.is_dir() else []
    return found[-1] if found else Path(name)


def _defined(definition: str) -> tokenizers.Tokenizer:
    with panics_are_errors():
        return tokenizers.Tokenizer.from_str(definition)


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """The library panics over some definitions; its `PanicException` is no `Exception` and cannot be imported."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ == "PanicException":
            raise ValueError(str(error)) from error
        raise


def _byte_level(vocab: Path, merges: Path) -> tokenizers.Tokenizer:
    """GPT-2's kind of vocabulary from its two files (OPT ships these)."""
    ids = parse_object(read_vocabulary(vocab), max_bytes=MAX_BYTES)
    require_sound_ids(str(vocab), list(ids.values()))
    lines = [line for line in read_vocabulary(merges).decode().splitlines() if not line.startswith("#version")]
    pairs = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    with panics_are_errors():
        backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf_decoders.ByteLevel()
    return backend


def _without_special_matching(definition: str) -> tokenizers.Tokenizer:
    """The same vocabulary, but `</s>` and the like in a text are plain characters."""
    content: dict[str, Any] = json.loads(definition)
    model_vocabulary = content.get("model", {}).get("vocab", {})
    if isinstance(model_vocabulary, dict) and all(
        token["content"] in model_vocabulary for token in content.get("added_tokens", [])
    ):
        content["added_tokens"] = []
    try:
        backend = _defined(json.dumps(content))
    except Exception as error:  # as in `_read`; some faults are found here alone
        raise DataError(explain("tokenizer", f"is not a usable vocabulary ({error})", "Download it again.")) from error
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    return backend


# --- CLIP's vocabulary from the merge list that CLIP and OpenCLIP ship: `bpe_simple_vocab_16e6.txt.gz`, or the same
# list as a Hugging Face repository's `merges.txt` ---


def _clip_from_merges(path: Path) -> tokenizers.Tokenizer:
    """Lower-cased byte-pair vocabulary of 49,408 ids: bytes, bytes ending a word, merges, two markers."""
    with open_regular(path) as file, gzip.open(file) if path.suffix == ".gz" else file as stream:
        lines = stream.read(MAX_MERGE_LIST_BYTES).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : CLIP_MERGES + 1]]
    letters = _bytes_in_clip_order()
    names = letters + [letter + "</w>" for letter in letters]
    names += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=[(left, right) for left, right in merges],
            end_of_word_suffix="</w>",
            unk_token="<|endoftext|>",
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = _clip_words()
    backend.decoder = hf_decoders.Sequence([hf_decoders.ByteLevel(), hf_decoders.Replace("</w>", " ")])
    return backend


def _clip_words(pattern: str = CLIP_WORDS) -> pre_tokenizers.PreTokenizer:
    """Words, single digits and runs of other characters, as bytes."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _bytes_in_clip_order() -> list[str]:
    """The 256 printable stand-ins for bytes: printable Latin-1 first, the others after them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
