"""One picture of a file for all readers: trainer, CLIP, generator, check and report, through the fast decoders too."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from loaders import pictures
from loaders.base import ImageSet, file_set
from loaders.sources import Sources
from runtime.cli import UserError
from spectrum import embeddings
from training import stores

SIDE = 32
RED, WHITE = (200, 20, 30), (255, 255, 255)


def halves(size=(SIDE, SIDE), left=RED, right=(20, 40, 220)) -> Image.Image:
    """A picture of two halves, which shows whether it was turned."""
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def odd_files(root) -> dict[str, np.ndarray]:
    """Files of every odd kind, and what each shows, by hand: uint8 (32, 32, 3)."""
    plain = np.asarray(halves())
    shown = {}
    # Orientation 6: the stored picture must be turned by 90 degrees clockwise to stand upright.
    for ending in ("jpg", "png", "webp", "tif"):
        halves().rotate(90).save(
            root / f"turned.{ending}", exif=exif(6), **({"lossless": True} if ending == "webp" else {})
        )
        shown[f"turned.{ending}"] = plain
    halves().save(root / "broken_exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\xff", quality=95)
    shown["broken_exif.jpg"] = plain
    clear = halves().convert("RGBA")
    clear.putalpha(
        Image.fromarray(np.where(np.arange(SIDE) < SIDE // 2, 255, 0).astype(np.uint8)[None].repeat(SIDE, 0))
    )
    clear.save(root / "clear.png")
    clear.save(root / "clear.webp", lossless=True)
    shown["clear.png"] = shown["clear.webp"] = np.asarray(halves(right=WHITE))
    palette = halves().convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(root / "palette.png")
    palette.save(root / "palette.gif")
    shown["palette.png"] = shown["palette.gif"] = plain
    halves().save(root / "frames.gif", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "green")])
    shown["frames.gif"] = plain
    deep = np.where(np.arange(SIDE) < SIDE // 2, 100 * 257, 200 * 257).astype(np.uint16)[None].repeat(SIDE, 0)
    Image.fromarray(deep).save(root / "deep.png")
    Image.fromarray(deep).save(root / "deep.tif")
    shown["deep.png"] = shown["deep.tif"] = np.asarray(halves(left=(100,) * 3, right=(200,) * 3))
    halves(left=(100,) * 3, right=(200,) * 3).convert("L").save(root / "grey.jpg", quality=95)
    shown["grey.jpg"] = shown["deep.png"]
    halves(left=(255, 0, 0), right=(0, 0, 255)).convert("CMYK").save(root / "cmyk.jpg", quality=100, subsampling=0)
    shown["cmyk.jpg"] = np.asarray(halves(left=(255, 0, 0), right=(0, 0, 255)))
    return shown


def by_reader(path, root) -> dict[str, np.ndarray]:
    """What each reader sees of a file."""
    train = file_set(root, [path.name], [0])
    crop = stores.Crop(zoom=1.0)
    trainer = next(stores.Decoded([path], "cpu", SIDE, 0, crop=crop).evaluation(np.array([0]), 1))
    clip = next(embeddings.read_training_images(train, root)([path.name]))
    return {
        "trainer": trainer[0].permute(1, 2, 0).numpy(),
        "clip": np.asarray(clip),
        "generator": np.asarray(Sources(ImageSet([], np.array([], int), []), root).read(path.name)[0]),
        "check": np.asarray(train.read(0)[0]),
        "report": np.asarray(pictures.read_image(path)),
    }


def test_all_readers_see_one_picture(tmp_path):
    for name, wanted in odd_files(tmp_path).items():
        for reader, pixels in by_reader(tmp_path / name, tmp_path).items():
            assert pixels.shape == (SIDE, SIDE, 3), (name, reader)
            inside = np.r_[2:14, 18:30]  # lossy formats blur the edge between the halves
            off = np.abs(pixels[2:-2, inside].astype(int) - wanted[2:-2, inside]).max()
            assert off <= 24, (name, reader, off)


def test_the_fast_paths_turn_and_shrink_a_large_photograph(tmp_path):
    stored = halves((640, 480)).rotate(90, expand=True)  # 480 x 640 in the file, 640 x 480 upright
    stored.save(tmp_path / "photo.jpg", exif=exif(6), quality=95)
    stored.rotate(-90, expand=True).save(tmp_path / "upright.jpg", quality=95)
    assert Sources(ImageSet([], np.array([], int), []), tmp_path).size("photo.jpg") == (640, 480)
    turned, upright = (stores.decode(tmp_path / f"{name}.jpg", SIDE, None).astype(int) for name in ("photo", "upright"))
    assert (
        np.abs(turned[:, :13] - RED).max() < 12 and np.abs(turned - upright)[:, [*range(14), *range(18, 32)]].max() < 12
    )


def damaged() -> dict[str, bytes]:
    whole = io.BytesIO()
    halves().save(whole, "PNG")
    jpeg = io.BytesIO()
    Image.effect_noise((256, 256), 80).convert("RGB").save(jpeg, "JPEG")
    content = whole.getvalue()
    return {
        "empty.png": b"",
        "text.jpg": b"no image at all",
        "half.png": content[: len(content) // 2],
        "half.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "header.png": content[:20],
        "chunk.png": content[:33] + b"\xff" * 40,
        "bomb.png": content[:16] + (200_000).to_bytes(4) * 2 + content[24:],
    }


@pytest.mark.parametrize("name", damaged())
def test_whatever_a_decoder_raises_is_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(damaged()[name])
    readers = [
        lambda: pictures.read_image_file(path, f"source {name}"),
        lambda: pictures.read_image(path),
        lambda: stores.decode(path, SIDE, None),
    ]
    for read in readers:
        with pytest.raises(UserError, match=f"{name}: not a readable image") as caught:
            read()
        assert "0x" not in str(caught.value) and "\n" not in str(caught.value)
    assert not pictures.decodes(path)


def test_a_header_tells_what_it_can(tmp_path):
    for name in ("empty.png", "text.jpg", "header.png"):
        (tmp_path / name).write_bytes(damaged()[name])
    halves().save(tmp_path / "fine.png")
    found = [pictures.header_error(tmp_path / name) for name in ("fine.png", "empty.png", "none.png", "text.jpg")]
    assert found[:3] == ["", "empty", "missing"] and found[3].startswith("not a readable image")


@pytest.mark.parametrize("part", [stores.PART, None])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_whole_and_in_order_whatever_workers_decode_at_a_time(workers, part, tmp_path):
    """Workers get parts of a GPU's batches; each file here is of one grey value, its place's."""
    paths = [tmp_path / f"{place}.png" for place in range(90)]
    for place, path in enumerate(paths):
        Image.new("L", (8, 8), place).save(path)
    assert stores.Decoded(paths, "cuda", 8, workers).part == stores.PART
    store = stores.Decoded(paths, "cpu", 8, workers)
    assert store.part is None
    store.part = part
    order = np.random.default_rng(0).permutation(90)
    wanted = [order[:1], order[1 : 1 + stores.PART], order[1 + stores.PART : 85], order[85:]]  # 1, 32, 52 and 5
    places = [torch.from_numpy(part) for part in wanted]
    for found in (list(store.training(places, places, 0)), list(store.training(places[::-1], places[::-1], 0))[::-1]):
        assert [batch[:, 0, 0, 0].tolist() for batch in found] == [part.tolist() for part in wanted]
    found = list(store.evaluation(order, 40))
    assert [batch.shape for batch in found] == [(40, 3, 8, 8), (40, 3, 8, 8), (10, 3, 8, 8)]
    assert torch.cat(found)[:, 0, 0, 0].tolist() == order.tolist() and not list(store.evaluation(order[:0], 40))
