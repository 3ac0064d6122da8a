"""Pixels: every kind of image comes out right, back ends agree, failures keep their place."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from corpora import config, image_bytes, make_dataset, open_loader
from lcl_mcore import optional_packages
from lcl_mcore.data.crop import Window, centre_window, random_window
from lcl_mcore.data.dali import DaliDecoder
from lcl_mcore.data.decode import CpuDecoder, Decoder, DecodeTask, decode_one, reduced_axis
from lcl_mcore.data.image_reader import build_decoder, decode_threads
from lcl_mcore.data.images import BadImageError, may_be_turned, open_image, upright_rgb
from lcl_mcore.data.images import orientation as orientation_of
from lcl_mcore.distributed.device import SideStream
from lcl_mcore.errors import ConfigError, DataError
from lcl_mcore.rng import KeyedRandom


def saved(image: Image.Image, container: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, container, **options)
    return stream.getvalue()


def upright(content: bytes) -> np.ndarray:
    return np.asarray(upright_rgb(open_image(content))).astype(int)


def colours(width: int = 96, height: int = 64) -> Image.Image:
    return Image.open(io.BytesIO(image_bytes(3, width, height, "PNG"))).convert("RGB")


def test_every_kind_of_image_comes_out_right() -> None:
    image = colours()
    wanted = np.asarray(image).astype(int)
    for container in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(upright(saved(image, container)), wanted)
    lossless = saved(image, "WEBP", lossless=True)
    assert np.array_equal(upright(lossless), wanted)
    grey = image.convert("L")
    assert np.array_equal(upright(saved(grey, "PNG"))[..., 0], np.asarray(grey))
    palette = image.quantize(64)
    for container in ("PNG", "GIF"):
        assert np.array_equal(upright(saved(palette, container)), np.asarray(palette.convert("RGB")))
    assert np.abs(upright(saved(image.convert("CMYK"), "JPEG", quality=95)) - wanted).mean() < 3


def test_transparency_becomes_white() -> None:
    layered = np.dstack([np.zeros((40, 40, 3), np.uint8), np.full((40, 40), 255, np.uint8)])
    layered[:20, :, 3] = 0
    layered[20:30, :, 3] = 128
    pixels = upright(saved(Image.fromarray(layered), "PNG"))
    assert pixels[:20].min() == 255
    assert abs(int(pixels[25, 0, 0]) - 127) <= 1
    assert pixels[30:].max() == 0
    grey_alpha = Image.fromarray(layered).convert("LA")
    assert upright(saved(grey_alpha, "PNG"))[:20].min() == 255
    keyed = Image.new("P", (40, 40), 0)
    keyed.putpalette([10, 20, 30, 200, 100, 50])
    assert upright(saved(keyed, "PNG", transparency=0)).min() == 255


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = upright(saved(Image.fromarray(ramp), "PNG"))
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1
    assert 126 < pixels.mean() < 129


def png(values: np.ndarray, bits: int, colours: int, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG written by hand: Pillow writes neither 16-bit colours nor greys of 2 bits. `colours`: its colour type."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        rows = [
            np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:]).tobytes() for row in values.astype(np.uint8)
        ]
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)) if transparent else b"",
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
            chunk(b"IEND", b""),
        ]
    )


HALVES = np.repeat(np.array([[60_000], [200]], dtype=np.uint16), 20, axis=0).repeat(40, axis=1)  # bright, dark
OPAQUE = np.full_like(HALVES, 65_535)


@pytest.mark.parametrize(
    ("content", "bright", "dark"),
    [
        (png(HALVES, 16, 0), 233, 1),
        (png(HALVES, 16, 0, (200,)), 233, 255),
        (png(np.dstack([HALVES] * 3), 16, 2), 234, 0),
        (png(np.dstack([HALVES, OPAQUE]), 16, 4), 234, 0),
        (png(np.dstack([HALVES] * 3 + [OPAQUE]), 16, 6), 234, 0),
        (png(HALVES // 20_000, 2, 0), 255, 0),
        (png(HALVES // 60_000, 2, 0, (1,)), 255, 0),
        (saved(Image.fromarray(HALVES), "TIFF"), 233, 1),
        (saved(Image.fromarray(HALVES), "TIFF", tiffinfo={262: 0}), 22, 254),
        (b"P5 40 40 65535\n" + HALVES.astype(">u2").tobytes(), 233, 1),
        (b"P5 40 40 60000\n" + HALVES.astype(">u2").tobytes(), 255, 1),
    ],
)
def test_ranges_are_those_that_the_file_states(content: bytes, bright: int, dark: int) -> None:
    pixels = upright(content)
    assert (pixels[0, 0].tolist(), pixels[-1, -1].tolist()) == ([bright] * 3, [dark] * 3)


@pytest.mark.parametrize(
    "content",
    [
        saved(Image.fromarray(HALVES.astype(np.float32)), "TIFF"),
        saved(Image.fromarray(HALVES.astype(np.int32)), "TIFF"),
        png(np.dstack([HALVES] * 3), 16, 2, (200, 200, 200)),
    ],
)
def test_ranges_that_no_file_states_are_refused(content: bytes) -> None:
    with pytest.raises(BadImageError, match=r"whose range nothing states|a transparent colour of 16 bits") as caught:
        upright(content)
    assert caught.value.reason == "undecodable"


def test_many_scans_are_refused_before_they_cost_time() -> None:
    content = saved(colours(), "JPEG", progressive=True)
    assert 5 < content.count(b"\xff\xda") < 20
    with pytest.raises(BadImageError, match=r"too many scans: 2.. > 200"):
        open_image(content.replace(b"\xff\xda", b"\xff\xda" * 21, 10))


def turned(orientation: int, byte_order: str = "", xmp: str = "") -> bytes:
    exif = Image.Exif()
    if byte_order:
        exif.endian = byte_order
        exif[0x0112] = orientation
    exif[0x010E] = "a description"
    return saved(colours(), "JPEG", exif=exif, xmp=xmp.format(orientation).encode())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("byte_order", "xmp"),
    [("<", ""), (">", ""), ("", '<x tiff:Orientation="{}"/>'), ("", "<tiff:Orientation>{}</tiff:Orientation>")],
)
def test_only_upright_jpegs_pass_without_a_closer_look(orientation: int, byte_order: str, xmp: str) -> None:
    content = turned(orientation, byte_order, xmp)
    assert orientation_of(open_image(content)) == orientation
    assert may_be_turned(content) == (orientation != 1)


def test_odd_jpeg_headers_are_left_to_pillow() -> None:
    content = saved(colours(), "JPEG")
    assert not may_be_turned(content)
    for odd in (content[:2], content[:30], content[:2] + b"\xff" + content[2:], content[:2] + b"\0" + content[2:]):
        assert may_be_turned(odd)


def test_exif_orientation_turns_the_image() -> None:
    image = colours()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright(saved(image, "JPEG", exif=exif, quality=95))
    assert turned.shape == (96, 64, 3)
    assert np.abs(turned - np.asarray(image.rotate(-90, expand=True)).astype(int)).mean() < 3


def test_animations_show_their_first_frame() -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert upright(content)[0, 0].tolist() == [255, 0, 0] or upright(content)[0, 0, 0] > 250


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>not found</html>", "not an image"),
        (b"\x00" * 5000, "not an image"),
        (image_bytes(1)[:900], "undecodable"),
        (image_bytes(1, 200, 150, "PNG")[:4000], "undecodable"),
        (saved(Image.new("L", (20_000, 2_500)), "PNG"), "oversized"),
        (saved(Image.new("1", (17_000, 10)), "PNG"), "oversized"),
    ],
)
def test_bad_images_name_their_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BadImageError) as caught:
        upright_rgb(open_image(content))
    assert caught.value.reason == reason


def test_windows_follow_the_rule() -> None:
    scale, ratio = (0.9, 1.0), (0.75, 4 / 3)
    for n in range(300):
        width, height = 50 + n % 83, 60 + n % 41
        w = random_window(width, height, scale, ratio, KeyedRandom(n))
        assert 0 <= w.left <= width - w.width
        assert 0 <= w.top <= height - w.height
        if 0.8 < width / height < 1.25:
            assert 0.85 < w.width * w.height / (width * height) <= 1.0
        assert 0.72 < w.width / w.height < 1.38
    wide = random_window(1000, 50, scale, ratio, KeyedRandom(1))
    assert (wide.width, wide.height, wide.left) == (67, 50, 466)
    assert centre_window(100, 60) == Window(20, 0, 60, 60)


def tasks(count: int, container: str = "JPEG") -> list[DecodeTask]:
    result = []
    for n in range(count):
        width, height = 90 + 37 * (n % 9), 80 + 53 * (n % 7)
        options = {"quality": 90} if container == "JPEG" else {}
        content = image_bytes(n, width, height, container, **options)
        window = random_window(width, height, (0.9, 1.0), (0.75, 4 / 3), KeyedRandom("w", n))
        result.append(DecodeTask(lambda content=content: content, width, height, window))  # type: ignore[misc]
    return result


# DALI is an optional extra of 700 MB; `dali-resize` is the pipeline of a GPU, on the CPU's operators
BACKENDS = ["cpu", "dali", "dali-resize"] if optional_packages.dali().usable else ["cpu"]
CPU = torch.device("cpu")


def make(backend: str) -> Decoder:
    return (
        CpuDecoder(2, CPU)
        if backend == "cpu"
        else DaliDecoder(2, CPU, SideStream(CPU), resize_inside=backend == "dali-resize")
    )


def exact(task: DecodeTask, side: int, resampling: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    """Full decode, resize of the window by Pillow: no shortcut for speed."""
    image = Image.open(io.BytesIO(task.read())).convert("RGB")
    w = task.window
    box = (w.left, w.top, w.left + w.width, w.top + w.height)
    return np.asarray(image.resize((side, side), resampling, box=box)).transpose(2, 0, 1).astype(int)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP"])
def test_decoders_agree_with_a_plain_decode(backend: str, container: str) -> None:
    """Smooth images: 1 level of 255 on average per image, whatever the path and the scale."""
    decoder = make(backend)
    work = tasks(24, container)
    pixels, reasons = decoder.decode(work, 64)
    decoder.close()
    assert reasons == [""] * 24
    for i, task in enumerate(work):
        assert np.abs(pixels[i].numpy().astype(int) - exact(task, 64)).mean() < 1.0


PHOTO_SIZE = (512, 600)


def photo_tasks(count: int) -> list[DecodeTask]:
    """Random windows of a real photograph with fine detail."""
    matplotlib = pytest.importorskip("matplotlib", reason="part of the demo extra, which the tests install")
    content = (Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").read_bytes()
    assert Image.open(io.BytesIO(content)).size == PHOTO_SIZE
    windows = [random_window(*PHOTO_SIZE, (0.9, 1.0), (0.75, 4 / 3), KeyedRandom("photo", n)) for n in range(count)]
    return [DecodeTask(lambda: content, *PHOTO_SIZE, window) for window in windows]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cpu"])
@pytest.mark.parametrize("side", [96, 112, 224])
def test_dali_agrees_on_a_real_photograph(backend: str, side: int) -> None:
    decoder = make(backend)
    work = photo_tasks(12)
    pixels, reasons = decoder.decode(work, side)
    decoder.close()
    assert reasons == [""] * 12
    worst = max(np.abs(pixels[i].numpy().astype(int) - exact(task, side)).mean() for i, task in enumerate(work))
    assert worst < 0.7


@pytest.mark.parametrize("side", [64, 112, 224])
def test_reduced_decoding_stays_within_the_documented_tolerance(side: int) -> None:
    """33 dB for every image, and on average no more than bilinear differs from bicubic in the same images."""
    ours, filters, noise = [], [], []
    for task in photo_tasks(24):
        decoded = decode_one(task.read(), task, side).numpy().astype(int)
        bicubic, bilinear = exact(task, side), exact(task, side, Image.Resampling.BILINEAR)
        ours.append(np.abs(decoded - bicubic).mean())
        filters.append(np.abs(bilinear - bicubic).mean())
        noise.append(10 * np.log10(255**2 / np.square(decoded - bicubic).mean()))
    assert min(noise) > 33
    assert np.mean(ours) < 1.1 * np.mean(filters)


def test_large_jpegs_are_decoded_at_a_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []
    whole = simplejpeg.decode_jpeg

    def decode_jpeg(*args: Any, **options: Any) -> np.ndarray:
        pixels = whole(*args, **options)
        decoded.append(pixels.shape[1::-1])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    for side, wanted in [(400, (512, 600)), (220, (256, 300)), (160, (192, 225)), (100, (128, 150)), (50, (64, 75))]:
        decoded.clear()
        for task in photo_tasks(24):
            decode_one(task.read(), task, side)
        assert decoded.count(wanted) >= 20, (side, decoded)
        assert min(width for width, _ in decoded) >= side


@given(begin=st.integers(0, 4000), length=st.integers(8, 4000), eighths=st.integers(1, 4), side=st.integers(8, 512))
def test_a_reduced_window_begins_where_it_should(begin: int, length: int, eighths: int, side: int) -> None:
    """Place of the first and last output pixel's centre, by torch's rule for a factor, within 1/16 of a pixel."""
    low, size = begin * eighths / 8, length * eighths / 8
    assume(size >= side)
    axis = reduced_axis(low, size, side)
    if axis is None:  # the whole image is decoded
        return
    first, last = (axis.first + (axis.extra + i + 0.5) / axis.factor for i in (0, side - 1))
    step = size / side
    assert abs(first - (low + 0.5 * step)) <= 1 / 16 + 1e-6
    assert abs(last - (low + size - 0.5 * step)) <= 1 / 16 + 1e-6
    assert int((axis.last - axis.first) * axis.factor) >= axis.extra + side
    assert axis.last <= math.ceil(low + size)


def test_a_missing_dali_is_named_with_its_right_package(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = optional_packages.Probe("nvidia-dali", False, "", "No module named 'nvidia'")
    monkeypatch.setattr(optional_packages, "dali", lambda: missing)
    with pytest.raises(ConfigError) as refused:
        build_decoder(config(decode_backend="dali"), CPU, SideStream(CPU))
    assert str(refused.value) == (
        "data.decode_backend = dali: DALI cannot be imported (No module named 'nvidia'). pip install "
        "nvidia-dali-cuda130 (or -cuda120); the package named nvidia-dali is not NVIDIA's."
    )
    assert build_decoder(config(decode_backend="auto"), torch.device("cuda"), SideStream(CPU)).name == "cpu"


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(192, "8", 16), (24, "8", 3), (2, "8", 1), (8, None, 8)])
def test_threads_by_cores_and_ranks(
    cores: int, ranks: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert decode_threads(config()) == threads
    assert decode_threads(config(decode_threads=5)) == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_does_not_depend_on_its_batch(backend: str) -> None:
    decoder = make(backend)
    work = tasks(12)
    together, _ = decoder.decode(work, 48)
    for i in (0, 5, 11):
        alone, _ = decoder.decode([work[i]], 48)
        assert torch.equal(alone[0], together[i])
    reverse, _ = decoder.decode(work[::-1], 48)
    assert torch.equal(reverse.flip(0), together)
    empty, reasons = decoder.decode([], 48)
    assert empty.shape == (0, 3, 48, 48)
    assert reasons == []
    decoder.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_image_is_grey_and_its_neighbours_are_not(backend: str) -> None:
    decoder = make(backend)
    work = tasks(6)
    broken = work[2].read()[:1500]
    pixels, _ = decoder.decode(work, 48)
    work[2] = DecodeTask(lambda: broken, work[2].width, work[2].height, work[2].window)
    for _ in range(2):
        after, reasons = decoder.decode(work, 48)
        assert [bool(reason) for reason in reasons] == [False, False, True, False, False, False]
        assert after[2].eq(128).all()
        assert all((after[i].int() - pixels[i].int()).abs().float().mean() < 4 for i in (0, 1, 3, 4, 5))
    decoder.close()


def flip_bytes(path: Path, names: list[str]) -> None:
    """Change a byte in the middle of some members of a tar."""
    import tarfile

    with tarfile.open(path) as tar:
        places = {m.name: m.offset_data + m.size // 2 for m in tar.getmembers()}
    content = bytearray(path.read_bytes())
    for name in names:
        content[places[name]] ^= 0xFF
    path.write_bytes(content)


def test_failed_images_become_placeholders_and_the_order_stays(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", "pair", 30, per_shard=30)
    data = config(folder)

    def take(count: int) -> list:
        loader = open_loader(data)
        try:
            return [next(loader) for _ in range(count)]
        finally:
            loader.close()

    before = take(3)
    flip_bytes(folder / "shard-000.tar", ["doc-000003.0.jpg", "doc-000010.0.jpg"])
    after = take(3)
    assert sum(step.statistics["failed_images"] for step in before) == 0
    failed = sum(step.statistics["failed_images"] for step in after)
    assert failed >= 2
    lost = sum(sum(a.counts.contexts) - sum(b.counts.contexts) for a, b in zip(before, after, strict=True))
    assert 0 <= lost <= failed
    for a, b in zip(before, after, strict=True):
        assert a.order_hash == b.order_hash
        assert (a.counts.images, a.counts.targets) == (b.counts.images, b.counts.targets)
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True):
            grey = y.images.eq(128).flatten(1).all(1)
            assert torch.equal(x.tokens, y.tokens)
            assert torch.equal(x.images[~grey], y.images[~grey])
            assert not grey[y.context_images].any()


def test_too_many_failures_in_a_row_stop_the_run(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", "pair", 20, per_shard=20)
    flip_bytes(folder / "shard-000.tar", [f"doc-{n:06d}.0.jpg" for n in range(20)])
    loader = open_loader(config(folder, max_consecutive_failures=5))
    with pytest.raises(DataError, match=r"set/shard-000\.tar/doc-\d+\.0\.jpg: the 5th image in succession"):
        next(loader)
    loader.close()
